"""The task list. Its filters are in the URL."""

import asyncio
import html
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs

import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from doubles.manifests import manifest
from sandbox.dashboard.pages import task_list
from sandbox.dashboard.pages.task_list import distinguishing_hints
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact, DiffStatistics
from sandbox.model.display_text import format_timestamp
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import SEARCHED_PROMPT_CHARACTERS_MAX
from sandbox.model.manifest.schema import Repository


def rows(page):
    return re.findall(r'class="row-link" id="task-([^"]+)"', page.text)


@pytest.fixture
def pages_with_tasks(pages):
    pages.tasks.add("waits")
    pages.tasks.add("works", *TO_RUNNING, labels={"team": "a&b"})
    pages.tasks.add("done", *TO_RUNNING, *TO_COMPLETED, labels={"team": "a&b", "kind": "bug"})
    return pages


def test_task_list_is_filtered_by_states_and_labels(pages_with_tasks):
    assert set(rows(pages_with_tasks.get("/"))) == {"waits", "works", "done"}
    assert rows(pages_with_tasks.get("/?state=completed")) == ["done"]
    assert rows(pages_with_tasks.get("/?label.team=a%26b&label.kind=bug")) == ["done"]
    assert rows(pages_with_tasks.get("/?state=failed")) == []
    assert "No tasks match these filters" in pages_with_tasks.get("/?state=failed").text


@pytest.mark.parametrize(
    ("states", "shown", "selected"),
    [
        ("failed", {"kept", "removed"}, "Failed"),
        ("failed,failed_preserved", {"kept", "removed"}, "Failed"),
        ("failed_preserved", {"kept"}, None),
    ],
)
def test_filter_for_failed_tasks_includes_those_with_a_preserved_sandbox(pages, states, shown, selected):
    failure = Failure(FailureCode.AGENT_FAILED, "It failed.")
    for task_id, action in (("kept", "preserve"), ("removed", "destroy")):
        asyncio.run(pages.tasks.submit(manifest(task_id, lifecycle={"failure_action": action})))
        pages.tasks.record(task_id, *TO_RUNNING, e.AgentExited(1, None, failure), e.TaskFinished())
    page = pages.get(f"/?state={states}")
    assert set(rows(page)) == shown
    found = re.search(r'id="group-[^"]*" href="[^"]*" aria-current="true">(\w+)', page.text)
    assert (found and found[1]) == selected


def test_state_shows_whether_a_sandbox_is_still_preserved(pages):
    tasks, failure = pages.tasks, Failure(FailureCode.AGENT_FAILED, "It failed.")
    for task_id in ("kept", "released"):
        asyncio.run(tasks.submit(manifest(task_id, lifecycle={"failure_action": "preserve"})))
        tasks.record(task_id, *TO_RUNNING, e.AgentExited(1, None, failure), e.TaskFinished())
    tasks.preserved.add("kept")
    text = pages.get("/").text
    assert text.count("failed, preserved") == text.count("failed, released") == 1
    for task_id, label in (("kept", "preserved"), ("released", "released")):
        assert set(re.findall("failed, [a-z]+", pages.get(f"/tasks/{task_id}").text)) == {f"failed, {label}"}


def test_cancellation_of_a_running_task_is_shown_as_requested(pages):
    pages.tasks.add("stops", *TO_RUNNING, e.CancelRequested("it is late"))
    pages.tasks.add("stopped", *TO_RUNNING, e.CancelRequested("it is late"), *TO_COMPLETED)
    assert pages.get("/").text.count("Cancellation requested") == 1
    assert "<strong>Cancellation requested.</strong> Reason: it is late" in pages.get("/tasks/stops").text
    assert "<strong>Cancelled.</strong> Reason: it is late" in pages.get("/tasks/stopped").text


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Done: **all** tests pass.\n\nMore.", "Done: all tests pass."),
        ("\n---\n## Result of `npm test`\nMore.", "Result of <code>npm test</code>"),
        ("- first **\n- second", "first **"),
        ("<b>bold</b>\u202e", "&lt;b&gt;bold&lt;/b&gt;‹U+202E›"),
        ("word " * 2000, "word " * 60),
        ("```\n***\n", "Claude Code finished its work"),
        (None, "Claude Code finished its work"),
    ],
)
def test_completed_task_shows_the_first_line_of_its_final_message(pages, message, shown):
    exited = e.AgentExited(0, {"is_error": False}, final_message=message)
    pages.tasks.add("done", *TO_RUNNING, exited, e.TaskFinished())
    cell = re.search(r'<td class="c-now"><span class="muted[^"]*">(.*?)</span>', pages.get("/").text, re.DOTALL)
    assert cell is not None
    assert cell[1] == shown


def test_failed_task_shows_its_reason_instead_of_the_final_message(pages):
    exited = e.AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It failed."), final_message="I tried.")
    pages.tasks.add("failed", *TO_RUNNING, exited, e.TaskFinished())
    text = pages.get("/").text
    assert "It failed." in text
    assert "I tried." not in text


def test_filtered_list_shows_its_total_cost(pages_with_tasks):
    pages_with_tasks.tasks.add("costs", *TO_RUNNING, e.Progress(cost_usd=1.5), *TO_COMPLETED, labels={"team": "a&b"})
    text = pages_with_tasks.get("/?label.team=a%26b").text
    assert re.search(r'>3 tasks<span class="total-cost" [^\n]*"><span> · \$1\.50</span></span>', text)
    pages_with_tasks.tasks.queries.clear()
    pages_with_tasks.get("/")
    assert not any(query.with_totals for query in pages_with_tasks.tasks.queries)


def test_periodic_refresh_of_the_list_does_not_request_totals(pages_with_tasks):
    pages_with_tasks.tasks.add("costs", *TO_RUNNING, e.Progress(cost_usd=1.5), *TO_COMPLETED, labels={"team": "a&b"})
    path = "/?label.team=a%26b"
    (element_id,) = re.findall(r'class="total-cost" id="([^"]+)" hx-preserve="true"', pages_with_tasks.get(path).text)
    for target, is_requested in (("tasks", False), ("list", True), (element_id, True)):
        pages_with_tasks.tasks.queries.clear()
        text = pages_with_tasks.get(path, HX_Target=target).text
        assert any(query.with_totals for query in pages_with_tasks.tasks.queries) == is_requested
        assert ("$1.50</span>" in text, f'id="{element_id}"' in text, "3 tasks" in text) == (is_requested, True, True)
    assert element_id not in pages_with_tasks.get("/?state=completed").text


def test_label_form_redirects_to_the_filter_url(pages_with_tasks):
    response = pages_with_tasks.get("/?state=completed&label=team%3Da%26b")
    assert (response.status_code, response.headers["location"]) == (303, "/?state=completed&label.team=a%26b")
    assert pages_with_tasks.get("/?label=").headers["location"] == "/?"


def test_label_with_empty_value_is_a_filter(pages):
    for number in range(51):
        pages.tasks.add(f"task-{number:03}", *TO_RUNNING, *TO_COMPLETED, labels={"team": "", "kind": "bug"})
    pages.tasks.add("other", labels={"team": "a", "kind": "bug"})
    assert pages.get("/?label=team%3D").headers["location"] == "/?label.team="
    assert pages.get("/?label=team").headers["location"] == "/?q=team"
    first = pages.get("/?label.team=&sort=name")
    links = [link.replace("&amp;", "&") for link in re.findall(r'href="(/\?[^"]*)"', first.text)]
    assert "/?label.team=&sort=name&label.kind=bug" in links
    assert "/?sort=name" in links
    next_link = html.unescape(re.search(r'hx-get="([^"]*cursor=[^"]*)"', first.text)[1])
    assert "label.team=&" in next_link
    assert rows(pages.get(next_link)) == ["task-050"]


def test_filter_links_lead_to_existing_pages(pages_with_tasks):
    links = {
        link.replace("&amp;", "&")
        for link in re.findall(r'href="(/\?[^"]*)"', pages_with_tasks.get("/?label.team=a%26b").text)
    }
    assert len(links) > 8
    statuses = {link: pages_with_tasks.get(link).status_code for link in links}
    assert statuses == dict.fromkeys(links, 200)


def sections(page):
    """Return the ids of the tasks below each heading."""
    parts = re.split(r"<h2[^>]*>([^<]+)", page.text)
    names = [name.strip() for name in parts[1::2]]
    return dict(zip(names, (re.findall(r'id="task-([^"]+)"', part) for part in parts[2::2]), strict=True))


@pytest.mark.parametrize("name", ["unknown", "label.team"], ids=["unknown", "known"])
def test_long_query_is_not_repeated_in_every_link_of_every_row(pages, name):
    value = "v" * 4000
    for number in range(20):
        pages.tasks.add(f"task-{number}", *TO_RUNNING, *TO_COMPLETED, labels={"team": value, "a": "1", "b": "2"})
    short, long = (len(pages.get(f"/?{query}").content) for query in ("label.a=1", f"label.a=1&{name}={value}"))
    assert len(rows(pages.get(f"/?{name}={value}"))) == 20
    assert long - short < 40 * len(value)


@pytest.mark.parametrize(("count", "status"), [(64, 200), (65, 400)])
def test_number_of_label_filters_is_limited(pages, count, status):
    assert pages.get("/?" + "&".join(f"label.{number}=1" for number in range(count))).status_code == status


def test_links_of_the_filters_are_built_in_another_thread(pages_with_tasks, monkeypatch):
    build, threads = task_list._encode_query, set()

    def encode_query(*arguments):
        threads.add(threading.current_thread())
        return build(*arguments)

    monkeypatch.setattr(task_list, "_encode_query", encode_query)
    loop_threads = []
    health = pages_with_tasks.tasks.health

    async def find_loop_thread():
        loop_threads.append(threading.current_thread())
        return await health()

    monkeypatch.setattr(pages_with_tasks.tasks, "health", find_loop_thread)
    assert pages_with_tasks.get("/?state=completed&label.team=a%26b").status_code == 200
    assert threads
    assert threads.isdisjoint(loop_threads)
    assert loop_threads


def test_links_in_rows_keep_the_current_filters(pages_with_tasks):
    text = html.unescape(pages_with_tasks.get("/?state=completed&label.team=a%26b&unknown=1").text)
    assert 'href="/?state=completed&label.team=a%26b&label.kind=bug"' in text
    assert 'href="/?state=completed&label.team=a%26b&repository=' in text
    assert "unknown=1&" not in text


def test_unfinished_tasks_come_first_with_reasons(pages_with_tasks):
    page = pages_with_tasks.get("/")
    assert sections(page) == {"Running": ["works"], "Waiting for capacity": ["waits"], "Finished": ["done"]}
    assert "Waiting to be started" in page.text
    assert sections(pages_with_tasks.get("/?state=running,completed")) == {}
    assert set(rows(pages_with_tasks.get("/?state=running,completed"))) == {"works", "done"}


@pytest.mark.parametrize("query_count", [1, 2, 3])
def test_task_that_changes_between_two_queries_is_listed_once(pages_with_tasks, monkeypatch, query_count):
    query, queries = pages_with_tasks.tasks.query, []

    async def query_and_change(task_query):
        page = await query(task_query)
        queries.append(task_query)
        if len(queries) == query_count:
            pages_with_tasks.tasks.record("waits", *TO_RUNNING)
            pages_with_tasks.tasks.record("works", *TO_COMPLETED)
        return page

    monkeypatch.setattr(pages_with_tasks.tasks, "query", query_and_change)
    page = pages_with_tasks.get("/")
    assert len(queries) == 3
    assert sorted(rows(page)) == ["done", "waits", "works"]
    counts = re.findall(r'id="section-[0-9]">[^<]*<span class="tally">([0-9]+)<', page.text)
    unfinished = [ids for name, ids in sections(page).items() if name != "Finished"]
    assert [int(count) for count in counts] == [len(ids) for ids in unfinished]


def test_number_of_unfinished_tasks_is_limited_and_all_tasks_are_linked(pages):
    for number in range(25):
        pages.tasks.add(f"task-{number:03}")
    page = pages.get("/")
    assert len(sections(page)["Waiting for capacity"]) == 20
    assert re.search(r'<a href="/\?state=pending">All 25</a>', page.text)


def test_row_has_cost_and_failure_and_changes_and_repository(pages):
    pages.tasks.add("broken", *TO_RUNNING)
    failure = Failure(FailureCode.AGENT_FAILED, "The agent exited with 1.")
    pages.tasks.record("broken", e.AgentExited(1, failure=failure), e.TaskFinished())
    pages.tasks.add("done", *TO_RUNNING, e.Progress(cost_usd=1.5, current_tool="Bash", current_subject="npm <test>"))
    assert 'class="mono" title="Bash npm &lt;test&gt;">Bash npm &lt;test&gt;</span>' in pages.get("/").text
    pages.tasks.record("done", e.Progress(cost_usd=1.5, current_tool="Bash"))
    assert 'class="mono" title="Bash">Bash</span>' in pages.get("/").text
    patch = Artifact("done.patch", ".sandbox/done.patch", 9, "text/x-diff", "sha256:" + "0" * 64)
    pages.tasks.record("done", e.ArtifactCollected(patch, diff=DiffStatistics(2, 376, 3)), *TO_COMPLETED)
    text = pages.get("/").text
    assert ("The agent exited with 1." in text, "$1.50" in text, "+376" in text, "−3" in text) == (True,) * 4
    assert re.search(
        r'href="/\?repository=https%3A%2F%2Fgithub.com%2Forg%2Frepo.git"[^>]*>(?:<span [^>]*>)?org/<', text
    )
    assert "@main</span>" in text


def test_filters_for_repository_and_search_and_period_can_be_removed(pages_with_tasks):
    url = "/?q=two+words&repository=org%2Frepo&created_after=2026-01-29T10:00:00Z&label.team=a%26b&state=completed"
    page = pages_with_tasks.get(url)
    query = pages_with_tasks.tasks.queries[0]
    assert (query.search, query.repository, query.created_after) == (
        "two words",
        "org/repo",
        datetime(2026, 1, 29, 10, tzinfo=UTC),
    )
    chips = re.findall(r'<a class="label chosen" id="[^"]+" href="([^"]+)"[^>]*>([^<]+)<', page.text)
    assert [text for _, text in chips] == [
        "“two words”",
        "Completed",
        "org/repo",
        "since 2026-01-29 10:00 UTC",
        "team=a&amp;b",
    ]
    removed = [set(parse_qs(url[2:])) - set(parse_qs(html.unescape(link)[2:])) for link, _ in chips]
    assert removed == [{"q"}, {"state"}, {"repository"}, {"created_after"}, {"label.team"}]
    assert 'value="two words"' in page.text


def test_period_filter_moves_with_the_current_time(pages):
    page = pages.get("/?q=a&since=24h")
    age = datetime.now(UTC) - pages.tasks.queries[0].created_after
    assert timedelta(hours=24) <= age < timedelta(hours=24, minutes=5)
    chips = re.findall(r'<a class="label chosen" id="[^"]+" href="([^"]+)"[^>]*>([^<]+)<', page.text)
    assert chips == [("/?since=24h", "“a”"), ("/?q=a", "Last 24 hours")]
    page = pages.get("/?created_after=2026-01-29T10:00:00Z")
    assert '<a href="/?since=7d">Last 7 days</a>' in page.text
    assert "since 2026-01-29 10:00 UTC" in page.text
    assert ">last 3d<" in pages.get("/?since=3d").text
    for invalid in ("1y", "0h", "-1h", "99999d", "h"):
        assert pages.get(f"/?since={invalid}").status_code == 400
    assert pages.get("/?since=").status_code == 200


def test_viewers_cannot_select_tasks(pages_with_tokens):
    pages = pages_with_tokens(FakeTokenStore(ann="operator", bob="viewer"))
    pages.tasks.add("works", *TO_RUNNING)
    pages.tasks.add("done", *TO_RUNNING, *TO_COMPLETED)
    for name, is_offered in (("ann", True), ("bob", False)):
        text = pages.get("/", authorization=f"Bearer {name}").text
        parts = ("pick-works", "pick-done", "bulk", "bulk-delete")
        assert [f'id="{part}"' in text for part in parts] == [is_offered] * len(parts)


def test_rows_show_which_tasks_have_ended(pages_with_tasks):
    boxes = re.findall(
        r'<input type="checkbox" id="pick-([a-z]+)"[^>]*?( data-ended)?(?: aria-label="[^"]*")>',
        pages_with_tasks.get("/").text,
    )
    assert dict(boxes) == {"waits": "", "works": "", "done": " data-ended"}


@pytest.mark.parametrize("query", ["state=lost", "sort=price", "limit=0", "cursor=x", "offset=-1", "order=up"])
def test_invalid_filter_is_reported(pages_with_tasks, query):
    response = pages_with_tasks.get(f"/?{query}")
    assert (response.status_code, query.split("=")[0] in response.text) == (400, True)


def test_repeated_filter_is_rejected_as_in_the_api(pages_with_tasks):
    response = pages_with_tasks.get("/?state=completed&state=failed")
    assert (response.status_code, "state is given more than once" in response.text) == (400, True)
    assert pages_with_tasks.get("/?label.team=a&label.team=b").status_code == 200  # a label may be repeated


def test_pages_without_scripts_do_not_overlap(pages):
    for number in range(120):
        pages.tasks.add(f"task-{number:03}", *TO_RUNNING, *TO_COMPLETED)
    page, seen = pages.get("/?sort=created_at"), []
    while True:
        seen += rows(page)
        link = re.search(r'href="([^"]+)" rel="next"', page.text)
        if not link:
            break
        page = pages.get(html.unescape(link[1]))
    assert (len(seen), len(set(seen))) == (120, 120)
    previous = re.search(r'href="([^"]+)" rel="prev"', page.text)
    assert rows(pages.get(html.unescape(previous[1]))) == seen[50:100]
    first = re.search(r'href="([^"]+)" rel="prev"', pages.get(html.unescape(previous[1])).text)
    assert rows(pages.get(html.unescape(first[1]))) == seen[:50]


def test_next_rows_are_loaded_by_cursor_without_overlap(pages):
    for number in range(120):
        pages.tasks.add(f"task-{number:03}", *TO_RUNNING, *TO_COMPLETED)
    page, seen = pages.get("/"), []
    while True:
        seen += rows(page)
        link = re.search(r'hx-get="(/\?cursor=[^"]+)" hx-select="#rest', page.text)
        if not link:
            break
        page = pages.get(html.unescape(link[1]))
        assert page.text.index('id="rest"') < page.text.index("row-link")
    assert (len(seen), len(set(seen))) == (120, 120)


def test_empty_list_shows_how_to_submit(pages):
    assert "Submit your first task" in pages.get("/").text


def hints(page):
    """Return, by task id, the text that distinguishes a row from others with the same name."""
    rows = re.findall(r'id="task-([^"]+)"(.*?)</td>', page.text, re.DOTALL)
    pattern = re.compile(r'class="(?:hint|beginning|found) muted" title="([^"]*)"')
    found = {task_id: " | ".join(map(html.unescape, pattern.findall(row))) for task_id, row in rows}
    return {task_id: hint for task_id, hint in found.items() if hint}


def add_named(tasks, task_id, name, prompt, parent=None, rerun_of=None):
    settings = manifest(task_id, name=name, claude={"prompt": prompt})
    origin = parent and e.Parent(parent, "0" * 40, ())
    tasks._apply(task_id, e.TaskSubmitted(task_id, settings, None, origin, rerun_of))
    tasks.record(task_id, *TO_RUNNING, *TO_COMPLETED)


def test_rows_with_the_same_name_are_distinguished(pages):
    add_named(pages.tasks, "first", "Fix the login", "Fix it & test it.\nBe quick.")
    add_named(pages.tasks, "second", "Fix the login", "Now the docs.", parent="first")
    add_named(pages.tasks, "third", "Fix the login", "Fix it & test it.", rerun_of="first")
    add_named(pages.tasks, "other", "Update the docs", "Update them.")
    assert hints(pages.get("/")) == {
        "first": "Fix it & test it.",
        "second": "Now the docs.",
        "third": "Fix it & test it.",
    }
    text = pages.get("/").text
    for task_id, title in (("second", "Continues first"), ("third", "Rerun of first")):
        assert f'id="relation-{task_id}" href="/tasks/first" title="{title}"' in text
    assert text.count('class="relation"') == 2


def test_hint_does_not_repeat_the_name(pages):
    add_named(pages.tasks, "first", "Fix the login", "Fix the login")
    add_named(pages.tasks, "second", "Now the…", "## Now the docs", parent="first")
    assert hints(pages.get("/")) == {}
    assert 'id="to-parent" href="/tasks/first"' in pages.get("/tasks/second").text
    assert 'id="to-parent"' not in pages.get("/tasks/first").text


def test_rows_with_the_same_prompt_show_their_ids(pages):
    add_named(pages.tasks, "first", "Fix the login", "Fix it.")
    for task_id in ("second", "third"):
        add_named(pages.tasks, task_id, "Fix the login", "Fix it.", rerun_of="first")
    assert hints(pages.get("/")) == {
        "first": "Fix it.",
        "second": "id second · Fix it.",
        "third": "id third · Fix it.",
    }


def test_prompt_that_repeats_the_name_is_not_used_as_a_hint(pages):
    add_named(pages.tasks, "1a59f2d4-2f3c-4c9e-8f0a-5b9c8d7e6f5a", "Fix the login", "Fix the login, please")
    assert hints(pages.get("/")) == {}
    add_named(pages.tasks, "second", "Fix the login", "Fix the login")
    assert hints(pages.get("/")) == {"1a59f2d4-2f3c-4c9e-8f0a-5b9c8d7e6f5a": "id 1a59f2d4", "second": "id second"}
    add_named(pages.tasks, "third", "Other", "x " * 500, rerun_of="removed")
    assert hints(pages.get("/"))["third"].startswith("x x x")
    assert len(hints(pages.get("/"))["third"]) < 150


@pytest.mark.parametrize(
    ("search", "hint"),
    [
        ("docs", "Pages are missing."),  # the name contains the word
        ("lAst", "The last page of the list"),
        ("docs last", "The last page of the list"),
        ("page", "Pages are missing."),
        ("rocket", "…before the rocket that the search found"),
        ("absent", "Pages are missing."),
    ],
)
def test_rows_found_by_a_search_show_where_the_prompt_contains_the_word(pages, search, hint):
    words = "many words " * 20 + "and a lot of words before the rocket that the search found"
    add_named(pages.tasks, "first", "Update the docs", f"Pages are missing.\nThe last page of the list\n{words}")
    assert hints(pages.get(f"/?q={search}")) == {"first": hint}
    assert hints(pages.get("/")) == {}


def state_counts(page):
    """Return the count next to each state filter."""
    return dict(re.findall(r'id="group-[^>]*>(\w+) <span class="tally">(\d+)<', page.text))


def test_counts_of_states_match_the_other_filters(pages_with_tasks):
    counts = {"All": "2", "Waiting": "0", "Running": "1", "Completed": "1", "Failed": "0", "Cancelled": "0"}
    for query in ("label.team=a%26b", "label.team=a%26b&state=failed", "label.team=a%26b&offset=50"):
        assert state_counts(pages_with_tasks.get(f"/?{query}")) == counts
    # Without another filter, the counts need no extra queries.
    pages_with_tasks.tasks.queries.clear()
    assert state_counts(pages_with_tasks.get("/?state=completed"))["All"] == "1"
    assert [query.limit for query in pages_with_tasks.tasks.queries] == [50]


def test_periodic_refresh_of_a_filtered_list_does_not_count(pages_with_tasks):
    path = "/?label.team=a%26b"
    text = pages_with_tasks.get(path).text
    (counts_id,) = re.findall(r'id="(counts-[^"]+)" hx-preserve="true"', text)
    (cost_id,) = re.findall(r'id="(total-cost-[^"]+)" hx-preserve="true"', text)
    for target, limits in (("tasks", [20, 50, 50]), (cost_id, [20, 50, 50]), (counts_id, [20, 50, 50, *[1] * 5])):
        pages_with_tasks.tasks.queries.clear()
        page = pages_with_tasks.get(path, HX_Target=target)
        assert [query.limit for query in pages_with_tasks.tasks.queries] == limits
        assert bool(state_counts(page)) == (target == counts_id)
        assert f'id="{counts_id}"' in page.text
    # Without another filter, each refresh includes the counts.
    assert state_counts(pages_with_tasks.get("/?state=completed", HX_Target="tasks"))["All"] == "1"
    assert "counts-" not in pages_with_tasks.get("/?state=completed").text


def test_first_label_is_shown_and_all_labels_are_in_a_list(pages):
    pages.tasks.add("none")
    pages.tasks.add("one", labels={"team": "a"})
    pages.tasks.add("three", labels={"team": "a&b", "kind": "bug", "area": "web"})
    text = pages.get("/").text
    assert re.findall(r'<button type="button" class="label"[^>]*>([^<]*)<', text) == ["+2"]
    row = text[text.index('id="task-three"') :].partition("</td>")[0]
    labels = ["team=a&amp;b", "kind=bug", "area=web"]
    assert re.findall(r'<a class="label"[^>]*>([^<]*)</a>', row) == [labels[0], *labels]


def test_task_that_ends_while_the_page_is_read_is_listed_once(pages_with_tasks, monkeypatch):
    tasks, original = pages_with_tasks.tasks, pages_with_tasks.tasks.query

    async def query(task_query):
        page = await original(task_query)
        if tasks.entries["works"].task.state == "running":
            tasks.record("works", *TO_COMPLETED)
        return page

    monkeypatch.setattr(tasks, "query", query)
    assert sorted(rows(pages_with_tasks.get("/"))) == ["done", "waits", "works"]
    assert sections(pages_with_tasks.get("/")) == {"Waiting for capacity": ["waits"], "Finished": ["works", "done"]}


def test_search_for_many_words_in_long_prompts_takes_little_time(pages):
    """The search finds every task, because the word is in each repository, but no prompt contains the word."""
    for number in range(200):
        add_named(pages.tasks, f"task-{number}", f"Task {number}", "")
    tasks = [asyncio.run(pages.tasks.status(f"task-{number}")) for number in range(200)]
    prompts = {task.id: ("Fix the tests now. " * 1000)[:SEARCHED_PROMPT_CHARACTERS_MAX] for task in tasks}
    started_at = time.thread_time()
    assert distinguishing_hints(tasks, prompts, "github " * 28).keys() == prompts.keys()
    assert time.thread_time() - started_at < 0.5


def test_hints_are_not_computed_on_the_event_loop(pages, monkeypatch):
    def find_hints(*arguments):
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return distinguishing_hints(*arguments)

    add_named(pages.tasks, "first", "Update the docs", "Fix the parser.")
    monkeypatch.setattr(task_list, "distinguishing_hints", find_hints)
    assert hints(pages.get("/?q=parser")) == {"first": "Fix the parser."}


def test_completed_task_with_refused_connections_is_marked(pages):
    for task_id, events in (("kept", TO_COMPLETED), ("works", ())):
        pages.tasks.add(task_id, *TO_RUNNING, e.Progress(egress_denied=2), *events)
    pages.tasks.add("quiet", *TO_RUNNING, *TO_COMPLETED)
    marks = re.findall(r'href="([^"]+)" title="[^"]*">(\d+ refused)<', pages.get("/").text)
    assert marks == [("/tasks/kept#network", "2 refused")]


@pytest.mark.parametrize(
    ("sort", "heading", "field"),
    [
        ("", "Changed", "state_changed_at"),
        ("?sort=created_at", "Submitted", "created_at"),
        ("?sort=started_at", "Started", "started_at"),
        ("?sort=cost", "Submitted", "created_at"),
        ("?sort=name", "Submitted", "created_at"),
    ],
)
def test_time_column_shows_the_time_by_which_the_list_is_sorted(pages_with_tasks, sort, heading, field):
    text = pages_with_tasks.get(f"/{sort}").text
    assert re.findall(r'class="c-age number">(\w+)</th>', text)[0] == heading
    shown = dict(re.findall(r'id="task-(\w+)".*?c-age number muted">(?:<time datetime="([^"]*)")?', text, re.DOTALL))
    for task_id, entry in pages_with_tasks.tasks.entries.items():
        expected = getattr(entry.task, field)
        assert shown[task_id] == (format_timestamp(expected) if expected else ""), task_id


def test_name_and_owner_of_a_repository_are_separate(pages):
    repository = Repository(url="http://127.0.0.1:9643/example", branch="main")
    asyncio.run(pages.tasks.submit(manifest("task-001").replace(repository=repository)))
    text = pages.get("/").text
    assert (
        '<span class="repository-owner">127.0.0.1:9643/</span><span class="repository-name">example</span></a>' in text
    )
