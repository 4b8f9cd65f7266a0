"""The list of tasks: its filters are in the address, so that what one sees can be passed on."""

import re

import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING


def rows(page):
    return re.findall(r'class="row-link" id="task-([^"]+)"', page.text)


@pytest.fixture
def some(pages):
    pages.tasks.add("waits")
    pages.tasks.add("works", *TO_RUNNING, labels={"team": "a&b"})
    pages.tasks.add("done", *TO_RUNNING, *TO_COMPLETED, labels={"team": "a&b", "kind": "bug"})
    return pages


def test_states_and_labels_narrow_it(some):
    assert set(rows(some.get("/"))) == {"waits", "works", "done"}
    assert rows(some.get("/?state=completed")) == ["done"]
    assert rows(some.get("/?label.team=a%26b&label.kind=bug")) == ["done"]
    assert rows(some.get("/?state=failed")) == []
    assert "No task fits these filters" in some.get("/?state=failed").text


def test_the_form_for_a_label_leads_to_its_address(some):
    answer = some.get("/?state=completed&label=team%3Da%26b")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?state=completed&label.team=a%26b")
    assert some.get("/?label=").headers["location"] == "/?"


def test_a_label_without_a_value_is_a_filter_too(pages):
    for number in range(51):
        pages.tasks.add(f"task-{number:03}", labels={"team": "", "kind": "bug"})
    pages.tasks.add("other", labels={"team": "a", "kind": "bug"})
    assert pages.get("/?label=team%3D").headers["location"] == "/?label.team="
    assert pages.get("/?label=team").headers["location"] == "/?"
    first = pages.get("/?label.team=&sort=name")
    links = [link.replace("&amp;", "&") for link in re.findall(r'href="(/\?[^"]*)"', first.text)]
    assert "/?label.team=&sort=name&label.kind=bug" in links
    assert "/?sort=name" in links
    following = next(link for link in links if "cursor=" in link)
    assert "label.team=&" in following
    assert rows(pages.get(following)) == ["task-050"]


def test_every_link_of_a_filter_leads_to_a_page(some):
    links = {
        link.replace("&amp;", "&") for link in re.findall(r'href="(/\?[^"]*)"', some.get("/?label.team=a%26b").text)
    }
    assert len(links) > 8
    assert {some.get(link).status_code for link in links} == {200}


def test_who_waits_is_told_above_the_list_with_what_for(some):
    text = some.get("/").text
    queue = text[text.index('class="queue"') : text.index('class="list-frame"')]
    assert ("Waiting to be started" in queue, 'href="/tasks/waits"' in queue, "works" in queue) == (True, True, False)


@pytest.mark.parametrize("query", ["state=lost", "sort=cost", "limit=0", "cursor=x", "offset=-1", "order=up"])
def test_a_mistaken_filter_is_told(some, query):
    answer = some.get(f"/?{query}")
    assert (answer.status_code, query.split("=")[0] in answer.text) == (400, True)


def test_a_filter_that_is_given_twice_is_told_as_the_api_tells_it(some):
    answer = some.get("/?state=completed&state=failed")
    assert (answer.status_code, "state is given more than once" in answer.text) == (400, True)
    assert some.get("/?label.team=a&label.team=b").status_code == 200  # of labels each counts


def test_pages_follow_each_other(pages):
    for number in range(60):
        pages.tasks.add(f"task-{number:03}")
    first = pages.get("/")
    following = re.search(r'href="(/\?cursor=[^"]+)" rel="next"', first.text)
    assert following
    second = pages.get(following[1])
    assert (len(rows(first)), len(rows(second))) == (50, 10)
    assert not set(rows(first)) & set(rows(second))


def test_an_empty_server_says_how_to_begin(pages):
    assert "Hand in the first one" in pages.get("/").text
