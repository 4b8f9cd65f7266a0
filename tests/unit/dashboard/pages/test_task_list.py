"""The task list. Its filters are in the URL."""

import re

import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING


def rows(page):
    return re.findall(r'class="row-link" id="task-([^"]+)"', page.text)


@pytest.fixture
def pages_with_tasks(pages):
    pages.tasks.add("waits")
    pages.tasks.add("works", *TO_RUNNING, labels={"team": "a&b"})
    pages.tasks.add("done", *TO_RUNNING, *TO_COMPLETED, labels={"team": "a&b", "kind": "bug"})
    return pages


def test_list_is_filtered_by_states_and_labels(pages_with_tasks):
    assert set(rows(pages_with_tasks.get("/"))) == {"waits", "works", "done"}
    assert rows(pages_with_tasks.get("/?state=completed")) == ["done"]
    assert rows(pages_with_tasks.get("/?label.team=a%26b&label.kind=bug")) == ["done"]
    assert rows(pages_with_tasks.get("/?state=failed")) == []
    assert "No tasks match these filters" in pages_with_tasks.get("/?state=failed").text


def test_label_form_redirects_to_the_filter_url(pages_with_tasks):
    response = pages_with_tasks.get("/?state=completed&label=team%3Da%26b")
    assert (response.status_code, response.headers["location"]) == (303, "/?state=completed&label.team=a%26b")
    assert pages_with_tasks.get("/?label=").headers["location"] == "/?"


def test_label_with_empty_value_is_a_filter(pages):
    for number in range(51):
        pages.tasks.add(f"task-{number:03}", labels={"team": "", "kind": "bug"})
    pages.tasks.add("other", labels={"team": "a", "kind": "bug"})
    assert pages.get("/?label=team%3D").headers["location"] == "/?label.team="
    assert pages.get("/?label=team").headers["location"] == "/?"
    first = pages.get("/?label.team=&sort=name")
    links = [link.replace("&amp;", "&") for link in re.findall(r'href="(/\?[^"]*)"', first.text)]
    assert "/?label.team=&sort=name&label.kind=bug" in links
    assert "/?sort=name" in links
    next_link = next(link for link in links if "cursor=" in link)
    assert "label.team=&" in next_link
    assert rows(pages.get(next_link)) == ["task-050"]


def test_filter_links_lead_to_pages(pages_with_tasks):
    links = {
        link.replace("&amp;", "&")
        for link in re.findall(r'href="(/\?[^"]*)"', pages_with_tasks.get("/?label.team=a%26b").text)
    }
    assert len(links) > 8
    assert {pages_with_tasks.get(link).status_code for link in links} == {200}


def test_pending_tasks_are_shown_in_the_queue_with_reasons(pages_with_tasks):
    text = pages_with_tasks.get("/").text
    queue = text[text.index('class="queue"') : text.index('class="list-frame"')]
    assert ("Waiting to be started" in queue, 'href="/tasks/waits"' in queue, "works" in queue) == (True, True, False)


@pytest.mark.parametrize("query", ["state=lost", "sort=cost", "limit=0", "cursor=x", "offset=-1", "order=up"])
def test_invalid_filter_is_reported(pages_with_tasks, query):
    response = pages_with_tasks.get(f"/?{query}")
    assert (response.status_code, query.split("=")[0] in response.text) == (400, True)


def test_repeated_filter_is_rejected_like_in_the_api(pages_with_tasks):
    response = pages_with_tasks.get("/?state=completed&state=failed")
    assert (response.status_code, "state is given more than once" in response.text) == (400, True)
    assert pages_with_tasks.get("/?label.team=a&label.team=b").status_code == 200  # labels may repeat


def test_pagination_has_no_overlap(pages):
    for number in range(60):
        pages.tasks.add(f"task-{number:03}")
    first = pages.get("/")
    next_link = re.search(r'href="(/\?cursor=[^"]+)" rel="next"', first.text)
    assert next_link
    second = pages.get(next_link[1])
    assert (len(rows(first)), len(rows(second))) == (50, 10)
    assert not set(rows(first)) & set(rows(second))


def test_empty_list_shows_how_to_submit(pages):
    assert "Submit your first task" in pages.get("/").text
