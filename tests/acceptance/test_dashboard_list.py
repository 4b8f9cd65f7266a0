"""The list of tasks in a real browser: search, filters, rows, loading on scroll, and actions on several tasks.

The module also tests the actions on a task's page that need stored tasks.
"""

import re
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest

from doubles.browser import accessibility_violations
from doubles.deployment import Deployment, wait_until
from doubles.stored_tasks import StoredTasks
from sandbox.model.artifacts import Artifact, DiffStatistics
from sandbox.model.events import ArtifactCollected, Parent, Progress
from sandbox.model.failure import Failure, FailureCode

FINISHED_COUNT = 1000
FAILED = "failed-task"
REASON = "The model's provider refused the request: overloaded. Submit the task again later."
LONG_NAME = "Repair the export of yearly reports now, and check all of its totals once again"
BLOCKED_MILLISECONDS_MAX = 2000
"""On a busy machine, a page of 50 rows takes 200 ms; without content-visibility and paging, 1,000 rows take seconds."""
FIND_WORD_SCRIPT = """(word) => [...document.querySelectorAll("td.c-name")].map((line) => {
  for (const element of line.querySelectorAll(".found, .hint")) {
    const at = element.textContent.indexOf(word);
    if (at < 0) continue;
    const range = document.createRange();
    range.setStart(element.firstChild, at);
    range.setEnd(element.firstChild, at + word.length);
    const [box, frame] = [range.getBoundingClientRect(), element.getBoundingClientRect()];
    const isOnTop = document.elementFromPoint((box.left + box.right) / 2, (box.top + box.bottom) / 2)?.closest("tr");
    return box.width > 0 && box.left >= frame.left && box.right <= frame.right && isOnTop === line.closest("tr");
  }
  return false;
})"""
READ_ROW_IDS_SCRIPT = "[...document.querySelectorAll('.row-link')].map((link) => link.id)"


def store_tasks(data_dir):
    """Store finished tasks, a failed task, and three pending tasks, which a draining server does not start."""
    tasks = StoredTasks(data_dir)
    tasks.current_time = datetime.now(UTC) - timedelta(minutes=FINISHED_COUNT + 100)
    options = {"lines": 0, "artifacts": ()}
    labels = {"team": "docs-and-examples", "kind": "chore", "area": "web"}
    failure = Failure(FailureCode.AGENT_FAILED, REASON)
    for task_id in ("old-1", "old-2", "old-3", "old-4", "old-5"):
        tasks.add_failed_task(task_id, failure, name=f"Empty the cache {task_id}", **options)
    chain = {"name": "Translate the guide", "labels": labels, **options}
    tasks.add_failed_task("chain-1", failure, claude={"prompt": "Translate it to French."}, **chain)
    tasks.add_failed_task(
        "chain-2", failure, claude={"prompt": "Now to Welsh."}, parent=Parent("chain-1", "0" * 40, ()), **chain
    )
    tasks.add_failed_task("chain-3", failure, claude={"prompt": "Translate it to French."}, rerun_of="chain-1", **chain)
    spent = Failure(FailureCode.BUDGET_EXCEEDED, "lifecycle.budget_usd (0.5 USD) is spent. Raise the budget.")
    for task_id, name in (("long-name", LONG_NAME), ("short-name", "Repair the export")):
        kept = {"failure_action": "preserve"}
        tasks.add_failed_task(task_id, spent, name=name, labels=labels, lifecycle=kept, **options)
    documented = {"prompt": "Read each module of the package, and add docstrings to all functions that have none. " * 3}
    tasks.add_failed_task("documented", failure, name="Document it", labels=labels, claude=documented, **options)
    glossary = {"prompt": "Collect the terms that the pages of the guide do not explain, and add a glossary. " * 2}
    name = "Explain all of the terms that new users of the guide would otherwise have to look up in another book"
    for task_id, options_of_task in (("terms-1", {}), ("terms-2", {"labels": labels}), ("terms-3", {"labels": labels})):
        own_name = f"{name}, part 1" if task_id == "terms-1" else name
        tasks.add_failed_task(task_id, failure, name=own_name, claude=glossary, **options_of_task, **options)
    for number in range(5):
        tasks.add_failed_task(f"imports-{number}", failure, name=f"Sort the imports {number}", **options)
    hosted = {"url": "http://127.0.0.1:9643/example", "branch": "main"}
    tasks.add_failed_task("hosted", failure, name="Hosted", repository=hosted, **options)
    for number in range(FINISHED_COUNT):
        url = f"https://github.com/org/{('web', 'app')[number % 2]}.git"
        tasks.add_completed_task(f"done-{number:04}", name=f"Update page {number}", repository={"url": url}, **options)
    recorder = tasks.add_running_task(FAILED, name="Fix the login", labels={"team": "platform"}, **options)
    recorder.record(Progress(cost_usd=1.25))
    patch = Artifact(f"{FAILED}.patch", f".sandbox/{FAILED}.patch", 9, "text/x-diff", "sha256:" + "0" * 64)
    recorder.record(ArtifactCollected(patch, diff=DiffStatistics(12, 376, 3)))
    tasks.fail(recorder, Failure(FailureCode.AGENT_FAILED, REASON))
    for number in range(3):
        tasks.add_task(f"waits-{number}", name=f"Waits {number}").writer.close()
    tasks.index()
    (data_dir / "draining").write_text(datetime.now(UTC).isoformat())


@pytest.fixture(scope="module")
def list_server(tmp_path_factory):
    """A draining server with stored tasks."""
    deployment = Deployment(tmp_path_factory.mktemp("list"))
    try:
        store_tasks(deployment.data_dir)
        deployment.model_url = "http://127.0.0.1:9"
        deployment.start_server()
        yield deployment
    finally:
        deployment.close()


@pytest.fixture
def base_url(list_server, browser):
    """The server's URL. After the test, the fixture fails on console errors or requests to other hosts."""
    address = list_server.server.ready_message["http"]
    yield address
    browser.assert_no_errors(address)


def test_search_filters_the_list_while_the_user_types(base_url, browser):
    page = browser.open(base_url)
    search = page.get_by_role("searchbox", name="Search tasks")
    search.focus()
    page.keyboard.type("login fix")
    wait_until(lambda: page.evaluate(READ_ROW_IDS_SCRIPT) == [f"task-{FAILED}"], 30, "the row that matches")
    assert parse_qs(urlsplit(page.url).query) == {"q": ["login fix"]}
    assert page.evaluate("document.activeElement.id") == "q"
    page.get_by_role("link", name="“login fix” remove filter").wait_for()
    page.reload()
    assert search.input_value() == "login fix"
    assert page.evaluate(READ_ROW_IDS_SCRIPT) == [f"task-{FAILED}"]
    search.fill("")
    wait_until(lambda: len(page.evaluate(READ_ROW_IDS_SCRIPT)) >= 50, 30, "all rows")


def type_search(page, text):
    page.get_by_role("searchbox", name="Search tasks").focus()
    page.keyboard.type(text)


def shown_query(page, url):
    """Return the query of the page that replaces this one."""
    page.wait_for_url(lambda current: current != url)
    return parse_qs(urlsplit(page.url).query)


def test_link_clicked_right_after_typing_keeps_the_search(base_url, browser):
    page = browser.open(base_url)
    type_search(page, "login")
    page.locator("#group-failed").click()
    assert shown_query(page, f"{base_url}/") == {"q": ["login"], "state": ["failed,failed_preserved"]}
    assert page.evaluate(READ_ROW_IDS_SCRIPT) == [f"task-{FAILED}"]
    url = page.url
    page.get_by_role("searchbox", name="Search tasks").fill("")
    page.locator("#group-all").click()
    assert shown_query(page, url) == {}


def test_link_clicked_before_the_search_is_answered_keeps_the_search(base_url, browser):
    page = browser.open(f"{base_url}/?q=page")
    page.route(re.compile(r"/\?q=login$"), lambda _: None)  # no response
    with page.expect_request(re.compile("q=login$")):
        page.get_by_role("searchbox", name="Search tasks").fill("login")
    page.locator("#group-failed").click()
    assert shown_query(page, f"{base_url}/?q=page") == {"q": ["login"], "state": ["failed,failed_preserved"]}


def test_filter_added_right_after_typing_keeps_the_search(base_url, browser):
    page = browser.open(base_url)
    page.locator("#filter").click()
    page.locator("#label-filter").fill("team=platform")
    type_search(page, "login")
    page.locator("#label-filter").press("Enter")
    assert shown_query(page, f"{base_url}/") == {"q": ["login"], "label.team": ["platform"]}


@pytest.mark.parametrize(
    ("query", "link", "kept"),
    [
        ("?q=page&state=completed", "“page” remove filter", {"state": ["completed"]}),
        ("?label.team=platform&state=failed", "Clear all", {}),
    ],
)
def test_link_that_removes_the_search_also_removes_what_was_typed(base_url, browser, query, link, kept):
    page = browser.open(f"{base_url}/{query}")
    type_search(page, "login")
    page.get_by_role("link", name=link).click()
    assert shown_query(page, f"{base_url}/{query}") == kept


@pytest.mark.parametrize("width", [1440, 1024])
def test_beginning_of_a_prompt_leaves_room_for_the_first_label(base_url, browser, width):
    page = browser.open(f"{base_url}/?q=document", width=width)
    widths = {name: page.locator(name).bounding_box()["width"] for name in (".first-label > .label", ".beginning")}
    assert widths[".first-label > .label"] >= 60
    assert widths[".beginning"] > 0
    assert page.locator(".row-link").evaluate("(link) => link.scrollWidth - link.clientWidth") <= 1


@pytest.mark.parametrize("width", [1440, 1280, 1024, 820, 390])
def test_found_word_is_visible_next_to_a_long_name(base_url, browser, width):
    """Two of the tasks share their name, and two have labels."""
    page = browser.open(f"{base_url}/?q=glossary", width=width)
    assert sorted(page.evaluate(READ_ROW_IDS_SCRIPT)) == [f"task-terms-{number}" for number in (1, 2, 3)]
    assert page.evaluate(FIND_WORD_SCRIPT, "glossary") == [True] * 3
    for link in page.locator(".row-link").all():
        assert link.bounding_box()["width"] > 80
    assert page.locator(".hint", has_text="id terms-2").bounding_box()["width"] > 50
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_tasks_are_selected_with_shift_and_with_the_box_above_them(base_url, browser):
    page = browser.open(f"{base_url}/?q=imports", width=1280)
    boxes, all_of_them = (
        page.locator("tbody .c-pick input"),
        page.get_by_role("checkbox", name="Select all listed tasks"),
    )
    boxes.nth(0).click()
    boxes.nth(3).click(modifiers=["Shift"])
    assert [box.is_checked() for box in boxes.all()] == [True, True, True, True, False]
    assert page.locator("#bulk-count").inner_text() == "4 selected"
    assert all_of_them.evaluate("(box) => box.indeterminate")
    boxes.nth(3).click()
    boxes.nth(1).click(modifiers=["Shift"])
    assert [box.is_checked() for box in boxes.all()] == [True, False, False, False, False]
    all_of_them.click()
    assert page.locator("#bulk-count").inner_text() == "5 selected"
    assert all_of_them.is_checked()
    page.evaluate("htmx.trigger('#tasks', 'refresh')")
    page.wait_for_timeout(500)
    assert all_of_them.is_checked()
    assert accessibility_violations(page) == []
    all_of_them.click()
    assert page.locator("tbody .c-pick input:checked").count() == 0
    assert page.locator("#bulk").is_hidden()


def test_search_keeps_other_filters_and_each_filter_can_be_removed(base_url, browser):
    page = browser.open(f"{base_url}/?state=completed")
    page.locator("#filter").click()
    page.get_by_label("Repository", exact=True).fill("org/web")
    page.get_by_label("Repository", exact=True).press("Enter")
    page.wait_for_url("**repository=org%2Fweb*")
    page.get_by_role("searchbox", name="Search tasks").fill("page 1 done")
    page.wait_for_url("**q=page*")
    chips = page.locator(".filter-chips .label")
    chips.nth(2).wait_for()
    assert [text.split(" ×")[0] for text in chips.all_inner_texts()] == ["“page 1 done”", "Completed", "org/web"]
    page.get_by_role("link", name="org/web remove filter").click()
    page.wait_for_url(lambda url: "repository" not in url)
    assert "state=completed" in page.url
    assert "q=page" in page.url
    page.locator("#filter").click()
    page.get_by_role("link", name="Last 24 hours").click()
    page.wait_for_url("**since=24h*")
    page.get_by_role("link", name="Last 24 hours remove filter").wait_for()
    page.get_by_role("link", name="Clear all").click()
    page.wait_for_url(f"{base_url}/")


def test_row_opens_its_task_by_click_and_middle_click_and_keyboard(base_url, browser):
    page = browser.open(f"{base_url}/?q=login")

    def click(selector, button="left"):
        box = page.locator(selector).first.bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, button=button)

    with page.context.expect_page() as opened:
        click("td.c-age", "middle")
    opened.value.wait_for_url(f"**/tasks/{FAILED}")
    opened.value.close()
    page.locator(".row-link").focus()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/tasks/{FAILED}")
    page.go_back()
    click("td.c-now")
    page.wait_for_url(f"**/tasks/{FAILED}")
    page.go_back()
    page.locator(".repository").click()
    page.wait_for_url("**repository=*")


def test_keyboard_shortcuts_move_the_focus_and_select_tasks_and_open_the_search(base_url, browser):
    page = browser.open(base_url)
    page.keyboard.press("j")
    page.keyboard.press("j")
    links = page.evaluate(READ_ROW_IDS_SCRIPT)
    assert page.evaluate("document.activeElement.id") == links[1]
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.id") == links[0]
    page.keyboard.press("x")
    assert page.get_by_role("checkbox", checked=True).count() == 1
    page.keyboard.press("/")
    page.keyboard.type("jk")
    assert page.locator("#q").input_value() == "jk"


def test_scrolling_a_thousand_tasks_does_not_block_the_page(base_url, browser):
    observe = """window.longest = 0; new PerformanceObserver((list) => {
        for (const each of list.getEntries()) window.longest = Math.max(window.longest, each.duration);
    }).observe({ type: "longtask" })"""
    page = browser.open(f"{base_url}/?state=completed", init_script=observe)
    page.locator(".row-link").first.wait_for()

    def scroll():
        page.mouse.wheel(0, 5000)
        page.wait_for_timeout(50)
        return len(page.evaluate(READ_ROW_IDS_SCRIPT)) >= FINISHED_COUNT

    wait_until(scroll, 120, "all rows")
    rows = page.evaluate(READ_ROW_IDS_SCRIPT)
    expected = [f"task-done-{number:04}" for number in reversed(range(FINISHED_COUNT))]
    assert rows == expected
    assert page.evaluate("window.longest") < BLOCKED_MILLISECONDS_MAX
    assert page.locator(".pager .load").count() == 0


def test_selected_tasks_are_cancelled_and_each_result_is_reported(list_server, base_url, browser):
    page = browser.open(base_url)
    page.get_by_role("heading", name="Waiting for capacity 3").wait_for()
    before = page.evaluate(READ_ROW_IDS_SCRIPT)
    page.get_by_label("Select Waits 0").check()
    page.get_by_role("button", name="Select all").click()
    assert page.locator("#bulk-count").inner_text() == "3 selected"
    assert page.get_by_role("button", name="Delete").count() == 0
    page.get_by_label("Select Waits 2").uncheck()
    assert page.locator("#bulk-count").inner_text() == "2 selected"
    assert accessibility_violations(page) == [], "with a selection"
    page.get_by_role("button", name="Cancel 2 tasks").click()
    dialog = page.get_by_role("dialog", name="Cancel 2 tasks?")
    assert accessibility_violations(page) == [], "with the dialog"
    dialog.get_by_role("button", name="Back").click()
    assert list_server.status("waits-0")["state"] == "pending"

    refusal = {"error": "task_already_terminal", "message": "The task has ended."}
    page.route("**/api/v1/tasks/waits-1", lambda route: route.fulfill(status=409, json=refusal))
    page.get_by_role("button", name="Cancel 2 tasks").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel 2 tasks").click()
    page.get_by_role("heading", name="1 task cancelled, 1 not").wait_for()
    results = page.locator("#bulk-tasks li").all_inner_texts()
    assert [" ".join(text.split()) for text in results] == ["Waits 0 is being cancelled", "Waits 1 The task has ended."]
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    browser.ignore_errors("status of 409")
    list_server.wait("waits-0")
    # The cancelled task moves into the list of finished tasks; no row is lost or duplicated.
    page.get_by_role("heading", name="Waiting for capacity 2").wait_for()
    rows = page.evaluate(READ_ROW_IDS_SCRIPT)
    assert (len(set(rows)), set(before) - set(rows)) == (len(rows), set())
    assert page.locator("#first-rows .row-link").first.inner_text() == "Waits 0"
    assert page.locator("#bulk-count").inner_text() == "1 selected"
    assert page.get_by_label("Select Waits 1").is_checked()


def open_finished(browser, url, **options):
    """Open a list in which the tasks `old-N` are the last ones, below the first page."""
    page = browser.open(f"{url}/?q=cache", **options)
    page.locator(".row-link").first.wait_for()
    return page


def test_selected_finished_tasks_are_deleted_and_each_result_is_reported(list_server, base_url, browser):
    page = open_finished(browser, base_url)
    rows = page.evaluate(READ_ROW_IDS_SCRIPT)
    page.get_by_label("Select Empty the cache old-2").check()
    page.keyboard.press("x")  # has no effect outside a row
    page.locator(f"#{rows[-1]}").focus()
    page.keyboard.press("x")
    page.get_by_role("button", name="Delete 2 tasks").click()
    dialog = page.get_by_role("dialog", name="Delete 2 tasks?")
    note = dialog.locator("#bulk-note").inner_text()
    assert [part in note for part in ("conversation", "patch", "preserved sandbox", "cannot undo")] == [True] * 4
    assert dialog.get_by_role("listitem").all_inner_texts() == ["Empty the cache old-2", "Empty the cache old-1"]
    assert accessibility_violations(page) == []
    # Enter does not delete: the Back button has the focus.
    assert page.evaluate("document.activeElement.id") == "bulk-back"
    page.keyboard.press("Enter")
    dialog.wait_for(state="hidden")
    assert list_server.status("old-1")["state"] == "failed"

    refusal = {"error": "task_not_ended", "message": "The task has not ended."}
    page.route("**/api/v1/tasks/old-2/data", lambda route: route.fulfill(status=409, json=refusal))
    page.get_by_role("button", name="Delete 2 tasks").click()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="1 task deleted, 1 not").wait_for()
    results = [" ".join(text.split()) for text in page.locator("#bulk-tasks li").all_inner_texts()]
    assert results == ["Empty the cache old-2 The task has not ended.", "Empty the cache old-1 was deleted"]
    page.keyboard.press("Enter")
    dialog.wait_for(state="hidden")
    browser.ignore_errors("status of 409")
    assert list_server.http.get("/api/v1/tasks/old-1").status_code == 404
    # The deleted row was the last one. It does not return with a refresh.
    page.get_by_text(f"{len(rows) - 1} tasks", exact=True).wait_for()
    assert page.evaluate(READ_ROW_IDS_SCRIPT) == rows[:-1]
    assert page.locator("#bulk-count").inner_text() == "1 selected"


def test_cancel_and_delete_apply_only_to_suitable_tasks_on_a_phone(base_url, browser):
    page = browser.open(f"{base_url}/?sort=name", width=390)
    page.get_by_label("Select Waits 1").check()
    page.get_by_label("Select Empty the cache old-3").check()
    bulk = page.locator("#bulk")
    assert bulk.get_by_role("button").all_inner_texts() == ["Cancel 1 task", "Delete 1 task", "Select all", "Clear"]
    box = bulk.bounding_box()
    assert (box["x"] >= 0, box["x"] + box["width"] <= 390) == (True, True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    bulk.get_by_role("button", name="Delete 1 task").click()
    dialog = page.get_by_role("dialog", name="Delete 1 task?")
    assert dialog.get_by_role("listitem").all_inner_texts() == ["Empty the cache old-3"]
    assert dialog.bounding_box()["width"] <= 390
    dialog.get_by_role("button", name="Back").click()
    page.get_by_label("Select Waits 1").scroll_into_view_if_needed()
    box = page.get_by_label("Select Waits 1").bounding_box()
    page.mouse.click(box["x"] - 5, box["y"] - 5)
    assert not page.get_by_label("Select Waits 1").is_checked(), "a tap next to the checkbox counts"
    bulk.get_by_role("button", name="Select all").click()
    assert page.locator(".c-pick input:checked:not([data-ended])").count() == 0
    assert page.locator(".c-pick input:checked").count() > 1


def test_total_cost_stays_visible_while_the_list_is_refreshed(base_url, browser):
    page = browser.open(f"{base_url}/?q=login")
    page.get_by_text("1 task · $1.25").wait_for()

    def targets():
        page.title()  # receives the browser's events
        return [request.headers.get("hx-target", "") for request in browser.requests_to("/")]

    wait_until(lambda: targets().count("tasks") >= 2, 30, "two refreshes")
    assert page.locator(".filter-chips .muted").inner_text() == "1 task · $1.25"
    assert not any(target.startswith("total-cost") for target in targets())
    # The cost is refreshed separately. This test makes the page refresh it more often than usual.
    page.locator(".total-cost").evaluate("(cost) => { cost.dataset.refresh = 1; cost.firstChild.textContent = ''; }")
    page.get_by_text("1 task · $1.25").wait_for()
    page.get_by_role("searchbox", name="Search tasks").fill("export")
    page.get_by_role("link", name="“export” remove filter").wait_for()
    assert "$1.25" not in page.locator(".filter-chips").inner_text()


def test_counts_of_a_filtered_list_stay_visible_while_it_is_refreshed(base_url, browser):
    page = browser.open(f"{base_url}/?q=login")
    counts = page.locator(".chips").inner_text()
    assert "Failed 1" in " ".join(counts.split())

    def targets():
        page.title()  # receives the browser's events
        return [request.headers.get("hx-target", "") for request in browser.requests_to("/")]

    page.evaluate("document.querySelector('.chips .tally').textContent = '7'")
    page.locator("#tasks").evaluate("(list) => list.append('changed')")
    wait_until(lambda: targets().count("tasks") >= 2, 30, "two refreshes")
    assert page.locator(".chips .tally").first.inner_text() == "7"
    assert not any(target.startswith("counts-") for target in targets())
    assert page.locator(".state-filters .tally").first.text_content() == "7"
    page.locator(".chips").evaluate("(chips) => { chips.dataset.refresh = 1; }")
    wait_until(lambda: page.locator(".chips").inner_text() == counts, 30, "the counts")
    page.get_by_role("searchbox", name="Search tasks").fill("export")
    wait_until(lambda: "Failed 2" in " ".join(page.locator(".chips").inner_text().split()), 30, "other counts")


def test_row_shows_changes_and_cost_and_reason_at_every_width(base_url, browser):
    for width in (1440, 1024, 390):
        page = browser.open(f"{base_url}/?q=login", width=width)
        row = page.locator(".tasks tbody tr")
        for text in ("+376", "−3", "$1.25", "The model's provider refused", "Fix the login", "failed"):
            row.get_by_text(text, exact=False).first.wait_for(state="visible")


@pytest.mark.parametrize("width", [1440, 390])
def test_name_of_a_repository_stays_visible_in_a_narrow_row(base_url, browser, width):
    page = browser.open(f"{base_url}/?q=hosted", width=width)
    name, owner = page.locator(".repository-name"), page.locator(".repository-owner")
    assert name.inner_text() == "example"
    widths = "(element) => [element.clientWidth, element.scrollWidth]"
    shown, needed = name.evaluate(widths)
    assert shown == needed
    shown, needed = page.locator(".branch").evaluate(widths)
    assert shown == needed
    shown, needed = owner.evaluate(widths)
    assert (shown < needed) == (width == 390)
    assert accessibility_violations(page) == []


def test_labels_are_hidden_next_to_a_long_name(base_url, browser):
    page = browser.open(f"{base_url}/?q=repair", width=1440)
    for task_id, is_shown in (("long-name", False), ("short-name", True)):
        row = page.locator("tr", has=page.locator(f"#task-{task_id}"))
        name = row.locator(".row-link")
        assert name.evaluate("(link) => link.scrollWidth <= link.clientWidth"), task_id
        box, shown = row.locator(".first-label").bounding_box(), row.locator(".first-label > .label").bounding_box()
        assert (shown["y"] < box["y"] + box["height"]) == is_shown
        assert row.get_by_role("button", name="+2 more labels").is_visible()


def test_label_gives_way_to_the_name_and_the_hint_in_a_narrow_window(base_url, browser):
    page = browser.open(f"{base_url}/?q=translate", width=1024)
    rows = page.locator("tr", has=page.locator(".hint"))
    assert rows.count() == 3
    for row in rows.all():
        name, box = row.locator(".row-link"), row.locator(".first-label").bounding_box()
        is_cut = name.evaluate("(link) => link.scrollWidth > link.clientWidth")
        assert (is_cut, box["width"] > 0) in {(False, False), (False, True), (True, False)}


@pytest.mark.parametrize("width", [1440, 1280, 390])
def test_reason_starts_with_what_happened_and_the_state_is_not_cut_off(base_url, browser, width):
    page = browser.open(f"{base_url}/?q=repair", width=width)
    row = page.locator("tr", has=page.locator("#task-short-name"))
    assert row.locator(".reason").inner_text().startswith("The task used its budget of $0.50. Raise")
    pill = row.locator(".pill")
    assert pill.inner_text() == "failed, released"
    pill.evaluate("(pill) => { pill.lastChild.data = 'failed, preserved'; }")
    assert row.locator(".c-state").evaluate("(cell) => cell.scrollWidth <= cell.clientWidth")


def test_list_has_no_accessibility_violations(base_url, browser):
    page = browser.open(base_url)
    page.locator("#filter").click()
    page.get_by_label("Label", exact=True).fill("team=platform")
    assert page.locator("#filter-menu").get_attribute("open") is not None
    assert accessibility_violations(page) == []
    page.goto(f"{base_url}/?q=login&label.team=platform")
    assert accessibility_violations(page) == [], "with filters"


def test_hint_directly_follows_a_short_name(base_url, browser):
    page = browser.open(f"{base_url}/?q=translate", width=1440)
    gaps = page.evaluate(
        """[...document.querySelectorAll(".row-link + .hint")].map((hint) =>
          hint.getBoundingClientRect().left - hint.previousElementSibling.getBoundingClientRect().right)"""
    )
    texts = page.evaluate("""[...document.querySelectorAll(".row-link:has(+ .hint)")].map((link) => {
      const range = document.createRange();
      range.selectNodeContents(link);
      return link.getBoundingClientRect().width - range.getBoundingClientRect().width;
    })""")
    assert gaps
    assert max(gaps) <= 12
    assert max(texts) < 2  # the link has no space after the name


@pytest.mark.parametrize("width", [1440, 1280, 390])
def test_rows_with_the_same_name_show_what_distinguishes_them(base_url, browser, width):
    page = browser.open(f"{base_url}/?q=translate", width=width)
    for text in ("Now to", "Translate it"):
        assert page.locator(".hint", has_text=text).first.is_visible()
        assert page.locator(".hint", has_text=text).first.bounding_box()["width"] > 80
    hints = [" ".join(text.split()) for text in page.locator(".hint").all_inner_texts()]
    texts = dict(zip(page.evaluate(READ_ROW_IDS_SCRIPT), hints, strict=True))
    assert (texts["task-chain-2"], texts["task-chain-3"]) == (
        "Now to Welsh.",
        "Translate it to French.",
    )
    for task_id, mark in (("chain-2", "↳"), ("chain-3", "↻")):
        link, name = page.locator(f"#relation-{task_id}"), page.locator(f"#task-{task_id}")
        assert link.inner_text().startswith(mark)
        assert abs(link.bounding_box()["y"] - name.bounding_box()["y"]) < 6
    assert page.locator(".row-link").first.bounding_box()["width"] > 70


@pytest.mark.parametrize("width", [1440, 1280, 390])
def test_first_label_is_visible_and_all_labels_appear_on_hover_and_focus(base_url, browser, width):
    page = browser.open(f"{base_url}/?q=translate", width=width)
    row = page.locator("tr", has=page.locator("#task-chain-2"))
    first, everything = row.locator(".first-label > .label"), row.locator(".all-labels")
    assert first.inner_text() == "team=docs-and-examples"
    assert first.bounding_box()["width"] > 60
    assert not everything.is_visible()
    row.get_by_role("button", name="+2 more labels").hover()
    everything.get_by_role("link", name="kind=chore").wait_for()
    page.mouse.move(0, 0)
    everything.wait_for(state="hidden")
    row.get_by_role("button", name="+2 more labels").focus()
    everything.wait_for()
    box = everything.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert accessibility_violations(page) == []
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**label.kind=chore*")


def test_filters_take_one_row_on_a_phone(base_url, browser):
    page = browser.open(base_url, width=390)
    assert page.locator(".toolbar").bounding_box()["height"] <= 34
    assert page.get_by_role("navigation", name="Filter by state").count() == 0
    page.locator("#filter").click()
    menu = page.locator("#filter-menu .menu-items")
    box = menu.bounding_box()
    assert (box["x"] >= 0, box["x"] + box["width"] <= 390) == (True, True)
    menu.get_by_role("link", name="Failed").click()
    page.wait_for_url("**state=failed*")
    page.get_by_role("link", name="Failed remove filter").wait_for()
    page.set_viewport_size({"width": 1280, "height": 800})
    page.get_by_role("navigation", name="Filter by state").get_by_role("link", name="Completed").wait_for()


def test_change_request_is_not_offered_for_a_task_that_cannot_be_continued(base_url, browser):
    page = browser.open(f"{base_url}/tasks/done-0001")
    page.get_by_role("link", name="Run again").first.wait_for()
    assert page.get_by_role("button", name="Ask for a change").count() == 0
    page.keyboard.press("q")
    assert page.get_by_role("dialog").count() == 0


def test_dialog_explains_why_a_task_with_a_patch_cannot_be_continued(base_url, browser):
    page = browser.open(f"{base_url}/tasks/{FAILED}")
    page.get_by_role("button", name="Ask for a change").click()
    dialog = page.get_by_role("dialog", name="Ask for a change")
    dialog.get_by_text(f"Task {FAILED} cannot be continued: its patch cannot be read").wait_for()
    dialog.get_by_label("What should change?").fill("Use tabs.")
    assert dialog.get_by_role("button", name="Copy as prompt").is_enabled()
    assert dialog.get_by_role("button", name="Submit task").count() == 0
    assert accessibility_violations(page) == []


@pytest.mark.parametrize(("task_id", "width"), [("old-4", 1280), ("old-5", 390)])
def test_finished_task_is_deleted_from_its_page_after_a_confirmation(list_server, base_url, browser, task_id, width):
    page = browser.open(f"{base_url}/tasks/{task_id}", width=width)
    page.evaluate("(id) => localStorage.setItem(`sandbox.review.${id}.patch`, '{}')", task_id)
    # With the keyboard.
    page.locator("#copy").focus()
    page.keyboard.press("Enter")
    page.locator("#delete").focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Delete this task?")
    text = dialog.locator("#ask-text").inner_text()
    assert text == "This removes the conversation and the output. You cannot undo this."
    assert not dialog.get_by_label("Reason").is_visible()
    assert accessibility_violations(page) == []
    page.set_viewport_size({"width": width, "height": 900})
    page.keyboard.press("Escape")
    assert list_server.status(task_id)["state"] == "failed"

    page.locator("#copy").click()
    page.get_by_role("button", name="Delete task").click()
    dialog.get_by_role("button", name="Delete task").click()
    page.wait_for_url(f"{base_url}/")
    page.get_by_text(f"Task {task_id} was deleted.").wait_for()
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('review'))") == []
    assert list_server.http.get(f"/api/v1/tasks/{task_id}").status_code == 404
    page.reload()
    page.locator(".row-link").first.wait_for()
    assert page.locator(".toast").count() == 0


def test_task_menu_stays_within_the_window_on_a_phone(base_url, browser):
    page = browser.open(f"{base_url}/tasks/{FAILED}", width=390)
    page.locator("#copy").click()
    menu = page.locator("#copy-menu .menu-items")
    menu.get_by_role("link", name="Run again").wait_for()
    box = menu.bounding_box()
    assert (box["x"] >= 0, box["x"] + box["width"] <= 390) == (True, True)
    assert page.locator(".actions").bounding_box()["height"] <= 40
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.goto(f"{base_url}/tasks/hosted")  # a task with few buttons
    page.locator("#copy").click()
    box = menu.bounding_box()
    assert (box["x"] >= 0, box["x"] + box["width"] <= 390) == (True, True)


@pytest.mark.parametrize(
    ("origin", "option"),
    [
        ("http://localhost:8122", ""),
        ("http://127.0.0.1:8122", ""),
        ("http://sandbox.example:8122", " --server http://sandbox.example:8122"),
        ("http://localhost:9122", " --server http://localhost:9122"),
        ("http://[::1]:8122", " --server http://[::1]:8122"),
        ("http://localhost", " --server http://localhost"),
    ],
)
def test_copied_command_names_the_server_unless_it_is_the_default(list_server, browser, origin, option):
    """No request reaches `origin`: the route handler answers each one with the real server's response."""
    address = list_server.server.ready_message["http"]

    def answer(route):
        url = route.request.url
        assert url.startswith(f"{origin}/"), url
        route.fulfill(response=route.fetch(url=address + url.removeprefix(origin), headers={"accept": "text/html"}))

    page = browser.open(f"{origin}/tasks/{FAILED}", prepare=lambda page: page.route("**/*", answer))
    page.get_by_role("button", name="Copy apply command").click()
    page.get_by_text(f"Copied: sandbox task apply {FAILED}{option}", exact=True).wait_for()
