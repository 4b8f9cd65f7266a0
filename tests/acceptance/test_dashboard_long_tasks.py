"""The page of a task whose event stream is long or bursty, or has gaps."""

import json

import pytest

from doubles.browser import accessibility_violations
from doubles.deployment import Deployment, wait_until
from doubles.fake_event_stream import (
    FakeEventStream,
    agent_message,
    agent_result,
    output,
    tool_call,
    tool_call_started,
    tool_result,
)
from doubles.stored_tasks import StoredTasks
from sandbox.model.events import Parent
from sandbox.model.failure import Failure, FailureCode

LINES_PER_EVENT = 1000
BLOCKED_MILLISECONDS_MAX = 2000
"""On an idle machine, the longest task of the browser's event loop takes less than 100 ms."""
BUDGET_SPENT_MESSAGE = (
    "lifecycle.budget_usd (0.5 USD) is spent; no more model requests are forwarded. Raise the budget."
)
OVERLOADED_MESSAGE = (
    "API Error: 529 Overloaded. This is a server-side issue, usually temporary — try again in a moment."
)
FAILURES = {
    "overloaded": f"The model could not be used: {OVERLOADED_MESSAGE.rstrip('.')}; submit the task again later.",
    "spent": BUDGET_SPENT_MESSAGE,
    "refused-model": "The model could not be used; check claude.model.",
    "refusal": "The model refused: I will not  do this; change claude.prompt.",
    "other-failure": "Claude Code exited with code 1.",
}
RECORD_BLOCKED_TIME_SCRIPT = """window.longTasks = [];
new PerformanceObserver((list) => window.longTasks.push(...list.getEntries().map((entry) => entry.duration)))
  .observe({ type: "longtask", buffered: true });"""


@pytest.fixture(scope="module")
def base_url(tmp_path_factory):
    """URL of a server with finished tasks; most tests replace a task's event stream with a fake one."""
    deployment = Deployment(tmp_path_factory.mktemp("stories"))
    tasks = StoredTasks(deployment.data_dir)
    tasks.add_completed_task("chat")
    tasks.add_completed_task("labelled", labels={"team": "a"})
    tasks.add_completed_task(
        "patched", artifacts=[("patched.patch", b"diff --git a/a b/a\nnew file mode 100644\nindex 0..e\n")]
    )
    tasks.add_completed_task("session", claude={"headless": False})
    tasks.add_completed_task("large", lines=2000)
    tasks.add_completed_task("resumed", parent=Parent("chat", "0" * 40, (), session_id="a"))
    tasks.add_completed_task("continued", parent=Parent("chat", "0" * 40, ()))
    for task_id, message in FAILURES.items():
        tasks.add_failed_task(task_id, Failure(FailureCode.AGENT_FAILED, message), lines=0, artifacts=())
    tasks.index()
    deployment.model_url = "http://127.0.0.1:9"  # not used
    deployment.start_server()
    yield deployment.server.ready_message["http"]
    deployment.close()


@pytest.fixture
def open_task(base_url, browser):
    """Opens a task's page; returns the page and its empty event stream."""

    def open_task(path, init_script=None):
        stream = None

        def attach_stream(page):
            nonlocal stream
            stream = FakeEventStream(page, path.partition("#")[0])

        page = browser.open(f"{base_url}/tasks/{path}", init_script=init_script, prepare=attach_stream)
        return page, stream

    yield open_task
    assert browser.console_errors == []


@pytest.fixture
def open_running_task(base_url, browser):
    """Opens an ended task as if it were running; returns the page and its empty event stream."""

    def open_running_task(task_id, init_script=None):
        stream = None

        def attach_stream(page):
            nonlocal stream
            stream = FakeEventStream(page, task_id)
            page.route(f"{base_url}/tasks/{task_id}", show_as_running)

        return browser.open(f"{base_url}/tasks/{task_id}", init_script=init_script, prepare=attach_stream), stream

    yield open_running_task
    assert browser.console_errors == []


def show_as_running(route):
    response = route.fetch()
    activity = (
        '<p class="activity"><span id="activity-state">Claude Code is working</span> '
        '<span id="activity-now" hidden><span class="activity-text"></span> <time data-for></time></span></p>'
    )
    body = response.text().replace(' data-over="completed"', "").replace("<title>✓", "<title>▶")
    body = body.replace('hx-trigger="refresh"', 'hx-trigger="refresh" data-refresh="5"', 1)
    body = body.replace('<dl class="figures">', f'{activity}<dl class="figures">')
    route.fulfill(response=response, body=body)


def test_entries_skipped_in_a_burst_are_loaded_on_request(open_task):
    page, stream = open_task("chat")
    stream.send(*(agent_message(f"entry {number}.") for number in range(100)))
    page.get_by_text("entry 99.", exact=True).wait_for()
    stream.send(*(agent_message(f"entry {number}.") for number in range(100, 1500)))
    page.get_by_text("entry 1499.", exact=True).wait_for()
    earlier = page.get_by_role("button", name="Show earlier")
    while earlier.count():
        earlier.first.click()
    texts = page.locator(".says").all_text_contents()  # content that has never been on screen has no inner text
    assert [text.strip() for text in texts] == [f"entry {number}." for number in range(1500)]


MESSAGES = [agent_message(f"entry {number}.") for number in range(400)]


def wait_for_value(page, expression):
    """Replace Playwright's `wait_for_function`, which the pages' content security policy forbids."""
    wait_until(lambda: page.wait_for_timeout(50) or page.evaluate(expression), 30, expression)


def test_linked_view_stays_at_the_top_until_the_user_scrolls(open_task):
    page, stream = open_task("large#output")
    result = {"is_error": False, "reason": "", "turns": 3, "duration_ms": 5, "cost_usd": None, "omitted_characters": 0}
    stream.send(*(output(f"line {number}\n") for number in range(200)))
    page.get_by_text("line 199", exact=True).wait_for()
    stream.send({"type": "agent_result", "text": "A long message.\n\n" * 20, **result})
    page.get_by_text("A long message.").first.wait_for()
    wait_for_value(page, "Math.abs(document.querySelector('.tabs').getBoundingClientRect().top - 44) < 20")
    page.mouse.wheel(0, -5000)
    wait_for_value(page, "scrollY === 0")
    stream.send({"type": "agent_result", "text": "Another message.\n\n" * 30, **result})
    page.get_by_text("Another message.").first.wait_for()
    page.wait_for_timeout(300)  # long enough for a scroll that must not happen
    assert page.evaluate("scrollY") == 0


def test_page_of_an_ended_task_opens_at_the_outcome(open_task):
    page, stream = open_task("chat")
    result = {"is_error": False, "reason": "", "turns": 3, "duration_ms": 5, "cost_usd": None, "omitted_characters": 0}
    stream.send(*MESSAGES, {"type": "agent_result", "text": "All **done**.", **result})
    page.get_by_text("entry 399.", exact=True).wait_for(state="attached")
    message = page.get_by_role("region", name="Final message").locator("strong")
    message.wait_for()
    assert (message.inner_text(), page.evaluate("scrollY")) == ("done", 0)
    assert message.bounding_box()["y"] < 600
    page.locator("#talk").evaluate("(list) => list.scrollIntoView()")
    page.get_by_role("link", name="A task").wait_for()  # shown in the bar while the header is scrolled out of view
    page.get_by_role("button", name="Jump to the latest").click()
    page.get_by_role("button", name="Jump to the latest").wait_for(state="hidden")
    page.get_by_role("link", name="A task").click()
    wait_for_value(page, "scrollY === 0")


@pytest.mark.parametrize(
    ("is_error", "reason", "title"),
    [
        (True, "success", "Ended with an error"),
        (True, "error_max_turns", "Ended: the maximum number of turns was reached"),
        (True, "error_during_execution", "Ended with an error"),
        (True, "error_new", "Ended: error_new"),
        (False, "success", "Result"),
    ],
)
def test_result_shows_how_the_agent_ended(open_task, is_error, reason, title):
    page, stream = open_task("chat")
    result = {"turns": 1, "duration_ms": 5, "cost_usd": None, "omitted_characters": 0}
    stream.send({"type": "agent_result", "text": "Text.", "is_error": is_error, "reason": reason, **result})
    shown = page.locator(".result")
    shown.wait_for()
    assert shown.locator("h3").inner_text() == title
    assert shown.locator(".muted").inner_text().startswith("1 turn ·")


def test_refused_host_can_be_allowed_in_a_new_run(open_task):
    page, stream = open_task("chat#network")
    refused = {"type": "egress_denied", "timestamp": "2026-01-29T10:00:00.000Z"}
    listed, other_port = "vm.allowed_hosts does not list it.", "vm.allowed_hosts does not list it at this port."
    stream.send(
        {**refused, "host": "hooks.example.com", "port": 443, "reason": listed},
        {**refused, "host": "xn--80ak6aa92e.example", "port": 8443, "reason": other_port},
        {**refused, "host": "10.0.0.1", "port": 80, "reason": "it is not a public address."},
        *(
            {**refused, "host": host, "port": 443, "reason": listed}
            for host in ("<i>&allow=x", "*.com", "[REDACTED:A].com")
        ),
    )
    rows = page.locator(".refused tbody tr")
    rows.nth(5).wait_for()
    links = page.get_by_role("link", name="Allow it in a new run")
    assert [rows.nth(at).get_by_role("link").count() for at in range(6)] == [1, 1, 0, 0, 0, 0]
    assert [link.get_attribute("href") for link in links.all()] == [
        "/submit?from=chat&allow=hooks.example.com",
        "/submit?from=chat&allow=xn--80ak6aa92e.example%3A8443",
    ]
    assert page.locator("#refusals").get_by_role("link", name="Allow 2 hosts in a new run").get_attribute("href") == (
        "/submit?from=chat&allow=hooks.example.com&allow=xn--80ak6aa92e.example%3A8443"
    )
    assert page.locator("#tally-network").inner_text() == "6 refused"
    note = (
        "6 hosts refused: hooks.example.com, xn--80ak6aa92e.example, 10.0.0.1, and 3 more · Allow 2 hosts in a new run"
    )
    assert page.locator("#refused-note").inner_text() == note
    page.evaluate("htmx.trigger('#head', 'refresh')")
    page.wait_for_timeout(300)
    assert page.locator("#refused-note").inner_text() == note
    assert accessibility_violations(page) == []
    links.first.click()
    page.get_by_text("adds hooks.example.com to the hosts that the new task may reach").wait_for()
    page.get_by_text("Ready to submit.").wait_for()
    assert page.get_by_label("Allowed hosts").input_value() == "hooks.example.com"


@pytest.mark.parametrize(("task_id", "is_shown"), [("chat", True), ("continued", True), ("resumed", False)])
def test_result_of_a_resumed_session_has_no_cost(open_task, task_id, is_shown):
    """The agent counts the cost of the whole session."""
    page, stream = open_task(task_id)
    result = {"text": "Done.", "is_error": False, "reason": "success", "turns": 2, "duration_ms": 5}
    stream.send({"type": "agent_result", "cost_usd": 0.0406, "omitted_characters": 0, **result})
    facts = page.locator(".result .muted")
    facts.wait_for()
    assert facts.inner_text().startswith("2 turns ·")
    assert ("$0.0406 as counted by the agent" in facts.inner_text()) == is_shown


def test_equal_refusals_share_one_conversation_entry(open_task):
    page, stream = open_task("chat")
    refused = {"type": "egress_denied", "port": 443, "reason": "vm.allowed_hosts does not list it."}
    mirror, other = {**refused, "host": "files.example.org"}, {**refused, "host": "example.com"}
    stream.send(mirror, mirror, other, agent_message("I try again."))
    page.get_by_text("I try again.").wait_for()
    entries = page.locator(".aside > span:first-child")
    assert [text.partition(":443 ")[2].partition(":")[0] for text in entries.all_inner_texts()] == [
        "refused 2 times",
        "refused",
    ]
    stream.send(
        {**mirror, "timestamp": "2026-01-29T10:12:00.000Z"}, {**mirror, "reason": "it is not a public address."}
    )
    page.get_by_text("files.example.org:443 refused 3 times: vm.allowed_hosts does not list it.").wait_for()
    page.get_by_text("files.example.org:443 refused: it is not a public address.").wait_for()
    assert entries.count() == 3
    assert " – " in page.locator(".aside > .muted").first.inner_text()
    links = page.get_by_role("link", name="Allow it in a new run")
    assert [link.get_attribute("href") for link in links.all()] == [
        "/submit?from=chat&allow=files.example.org",
        "/submit?from=chat&allow=example.com",
    ]
    assert accessibility_violations(page) == []


def test_expanded_command_repeats_neither_the_command_nor_the_exit_code(open_task):
    page, stream = open_task("chat")
    fields = {"description": "Run the tests", "run_in_background": "false", "timeout": "9"}
    stream.send(
        tool_call_started("t", command="make test", summary="make test", input=fields),
        tool_result("t", "Exit code 2\nmake: *** [test]", is_error=True, exit_code=2),
        tool_call_started("u", command="exit 3", summary="exit 3"),
        tool_result("u", "Exit code 3", is_error=True, exit_code=3),
        tool_call_started("v", "Edit", summary="a.py", input={"replace_all": "false"}),
        tool_call_started("w", "Edit", summary="b.py", input={"replace_all": "true"}),
        tool_result("w", "No match.", is_error=True),
    )
    page.get_by_text("No match.").wait_for()
    first, second, third, fourth = page.locator(".tool").all()
    assert first.locator("summary").inner_text().split("\n") == ["Bash", "Run the tests", "exit 2"]
    assert first.locator(".field-name, pre").all_inner_texts() == [
        "make test",
        "timeout",
        "9",
        "Output",
        "make: *** [test]",
    ]
    assert second.inner_text().split() == ["Bash", "exit", "3", "exit", "3", "No", "output."]
    third.locator("summary").click()
    assert third.locator(".field-name, pre").count() == 0
    assert fourth.locator(".field-name, pre").all_inner_texts() == ["replace_all", "true", "Output", "No match."]
    first.locator("summary").click()
    assert first.inner_text().split("\n") == ["Bash", "make test", "exit 2"]
    assert accessibility_violations(page) == []


MODEL_DENIAL = {"type": "egress_denied", "timestamp": "2026-01-29T10:00:00.000Z", "host": "model", "port": 80}


@pytest.mark.parametrize(
    ("task_id", "message", "reason", "is_shown"),
    [
        ("spent", f"Failed to authenticate. API Error: 403 {BUDGET_SPENT_MESSAGE}", BUDGET_SPENT_MESSAGE, False),
        ("refused-model", "API Error: 403 The model x has no price.", "The model x has no price.", False),
        ("refusal", "I will not\ndo this.", BUDGET_SPENT_MESSAGE, False),
        (
            "overloaded",
            f"{OVERLOADED_MESSAGE} If it persists, check your inference gateway (127.0.0.1:8123).",
            BUDGET_SPENT_MESSAGE,
            False,
        ),
        ("overloaded", "API Error: the tests of the error messages fail.", BUDGET_SPENT_MESSAGE, True),
        ("spent", f"I fixed {'many files and ' * 20}then: {BUDGET_SPENT_MESSAGE}", BUDGET_SPENT_MESSAGE, True),
        ("other-failure", "The tests fail.", BUDGET_SPENT_MESSAGE, True),
    ],
)
def test_last_message_is_not_shown_if_it_repeats_a_refusal(open_task, task_id, message, reason, is_shown):
    page, stream = open_task(task_id)
    stream.send({**MODEL_DENIAL, "reason": reason}, agent_message(message), {**MODEL_DENIAL, "reason": reason})
    page.locator(".says").wait_for()
    stream.send({"type": "end", "state": "failed", "exit_code": 1, "error": {"message": FAILURES[task_id]}})
    wait_until(
        lambda: page.locator(".aside").count() == (0 if task_id == "spent" else 1), 30, "no aside with the failure"
    )
    page.wait_for_timeout(300)
    assert page.locator("#outcome").is_visible() == is_shown


def test_model_gateway_refusals_are_not_shown_as_refused_connections(open_task):
    page, stream = open_task("chat#network")
    denied = {**MODEL_DENIAL, "host": "example.com", "port": 443, "reason": "vm.allowed_hosts does not list it."}
    stream.send(
        {**MODEL_DENIAL, "reason": BUDGET_SPENT_MESSAGE}, {**MODEL_DENIAL, "reason": BUDGET_SPENT_MESSAGE}, denied
    )
    counters = dict.fromkeys(("cost_usd", "input_tokens", "output_tokens", "turns", "tool_calls"), 0)
    stream.send({"type": "progress", "progress": {**counters, "egress_denied": 3}})
    wait_until(lambda: page.locator("#tally-network").inner_text() == "1 refused", 30, "the refused connection")
    assert page.locator(".refused tbody tr").all_inner_texts()[0].startswith("example.com:443")
    assert page.locator(".refused tbody tr").count() == 1


def test_page_of_a_running_task_opens_at_the_end_and_follows_it(open_running_task):
    page, stream = open_running_task("chat")
    stream.send(*MESSAGES)
    wait_for_value(page, "scrollY > 1000")
    at_end = "scrollY + innerHeight >= document.documentElement.scrollHeight - 5"
    wait_for_value(page, at_end)
    stream.send(tool_call_started("t", command="make test", summary="make test"))
    page.locator(".tool-brief", has_text="make test").wait_for()
    wait_for_value(page, at_end)
    assert page.locator("#activity-now .activity-text").text_content() == "Bash make test"
    page.mouse.move(500, 500)
    page.mouse.wheel(0, -2000)
    page.get_by_role("button", name="Jump to the latest").wait_for()
    stream.send(agent_message("One more."))
    page.locator(".says", has_text="One more.").wait_for(state="attached")
    page.wait_for_timeout(300)
    assert not page.evaluate(at_end)


def test_main_actions_stay_in_view_when_only_the_title_is_out_of_view(open_running_task):
    page, stream = open_running_task("chat")
    stream.send(*MESSAGES)
    wait_for_value(page, "scrollY > 1000")
    page.evaluate("window.scrollTo(0, 0)")
    page.locator("#title-bar").wait_for(state="hidden")
    page.evaluate("window.scrollTo(0, document.querySelector('#head .page-head').getBoundingClientRect().bottom)")
    page.locator("#title-bar").wait_for()
    assert page.locator(".figures").bounding_box()["y"] > 0


IMPORT_STARTED = tool_call_started(
    "t", command="make import", summary="make import", input={"description": "Import the data"}
)
MOVED_TO_BACKGROUND = tool_result("t", "The command was moved to the background.", in_background=True)


def test_background_command_is_shown_as_running_until_it_ends(open_running_task):
    page, stream = open_running_task("chat")

    def activity():
        return " ".join(page.locator(".activity").inner_text().split())

    stream.send(IMPORT_STARTED, MOVED_TO_BACKGROUND, agent_message("The import runs. I wait."))
    page.get_by_text("The import runs. I wait.").first.wait_for()
    assert page.locator(".tool-took").inner_text() == "running in the background"
    assert activity().startswith("Claude Code is working")
    stream.send(agent_result("The import runs. I wait."))
    page.get_by_text("End of a round of work · 3 turns").wait_for()
    wait_until(lambda: "Import the data" in activity(), 30, "the name of the command")
    assert activity().startswith("Waiting for a background command: Import the data")
    assert page.locator(".result").count() == 0
    assert accessibility_violations(page) == []
    late = [agent_result("I waited."), agent_result("It is done.")]
    stream.send(tool_call("t", duration_ms=480_000), agent_message("It is done."), *late)
    wait_until(lambda: page.get_by_text("End of a round of work").count() == 2, 30, "the end of the second round")
    page.locator(".result").wait_for()
    assert page.locator(".tool-took").inner_text() == "✓ 8 min 0 s"
    assert page.locator(".result h3").all_inner_texts() == ["Result"]


def test_background_command_that_fails_or_outlives_the_agent_is_not_shown_as_a_success(open_running_task):
    page, stream = open_running_task("chat")
    other = [{**event, "tool_use_id": "u"} for event in (IMPORT_STARTED, MOVED_TO_BACKGROUND)]
    stream.send(
        IMPORT_STARTED, MOVED_TO_BACKGROUND, *other, tool_call("t", is_error=True), agent_result("I leave it running.")
    )
    page.get_by_text("I leave it running.").wait_for()
    assert page.locator(".tool-took").all_inner_texts() == ["failed · 5 ms", "running in the background"]
    change = {"previous_state": "running", "new_state": "completing", "state_message": "Collecting artifacts"}
    stream.send({"type": "state_change", **change})
    page.locator(".result").wait_for()
    assert page.locator(".tool-took").all_inner_texts() == ["failed · 5 ms", "stopped with the agent"]
    assert page.locator(".result h3").all_inner_texts() == ["Result"]


def test_unfinished_command_of_an_ended_agent_is_shown_as_stopped(open_running_task):
    page, stream = open_running_task("chat")
    stream.send(tool_call_started("s", summary="sleep 1"), tool_call_started("t", summary="sleep 2"))
    page.locator(".tool-took").nth(1).wait_for()
    assert page.locator(".tool-took").all_inner_texts() == ["…", "…"]
    change = {"previous_state": "running", "new_state": "completing", "state_message": "Collecting artifacts"}
    stream.send({"type": "state_change", **change}, tool_result("t", "late", is_error=True, exit_code=137))
    page.get_by_text("exit 137").wait_for()
    assert page.locator(".tool-took").all_inner_texts() == ["stopped with the agent", "exit 137"]


def test_process_that_ran_out_of_memory_is_shown_at_the_top(open_running_task):
    page, stream = open_running_task("chat")
    message = "A process was killed because vm.memory (2G) was used up; raise it."
    stream.send({"type": "error", "error": "out_of_memory", "message": message})
    page.locator("#memory-note").get_by_text(message).wait_for()
    assert page.locator("#talk").get_by_text(message).inner_text() == message
    page.evaluate("htmx.trigger('#head', 'refresh')")
    page.wait_for_timeout(300)
    page.locator("#memory-note").get_by_text(message).wait_for()


def test_expanded_details_survive_a_header_update(open_running_task, base_url):
    page, stream = open_running_task("chat")
    stream.send(agent_message("Here."))
    page.locator(".says").wait_for()
    page.get_by_text("Details", exact=True).click()
    page.locator(".facts", has_text="https://").wait_for()
    page.unroute(f"{base_url}/tasks/chat")
    stream.send({"type": "end", "state": "completed", "exit_code": 0, "error": None})
    page.locator("#head [data-over]").wait_for(state="attached")
    assert page.locator(".facts", has_text="https://").is_visible()


def test_page_of_a_running_task_shows_the_outcome_when_it_ends(open_running_task, base_url):
    page, stream = open_running_task("chat")
    assert page.title() == "▶ A task · Sandbox"
    stream.send(*MESSAGES)
    wait_for_value(page, "scrollY > 1000")
    page.unroute(f"{base_url}/tasks/chat")
    stream.send({"type": "end", "state": "completed", "exit_code": 0, "error": None})
    page.locator("#head [data-over]").wait_for(state="attached")
    wait_for_value(page, "scrollY === 0")
    wait_until(lambda: page.title() == "✓ A task · Sandbox", 30, "the state in the title")


def test_control_characters_are_rendered_with_few_elements(open_task):
    page, stream = open_task("chat")
    one_kind, mixed = "\x01" * 50_000, "\x01a\x1b[31mb" * 5_000
    stream.send(tool_call_started("t"), tool_result("t", f"{one_kind}end\r\n{mixed}", is_error=True))
    rendered = page.locator(".tool pre")
    rendered.wait_for()
    assert rendered.inner_text() == f"{'␁' * 50_000}end\n{'␁ab' * 5_000}"
    assert rendered.locator(".ctl").first.inner_text() == "␁" * 50_000
    assert rendered.locator("*").count() <= 2000


def test_subagent_texts_are_nested_and_folded(open_task):
    page, stream = open_task("chat")
    call = tool_call_started("t", "Agent", summary="look around", input={"prompt": "Look around."})
    inner_call = tool_call_started("u", command="ls", summary="ls", parent="t")
    texts = [agent_message(f"a {kind}", kind=kind, parent="t") for kind in ("prompt", "thinking", "text")]
    stream.send(agent_message("Agent 1.0 started", kind="notice"), call, *texts, inner_call)
    page.get_by_text("a text").wait_for()
    steps = page.locator("#talk > li > .steps")
    assert steps.locator("summary").first.inner_text() == "4 steps of the subagent"
    assert steps.locator(".talk > li").count() == 4
    assert page.locator(".thinks summary").all_inner_texts() == ["Prompt", "Thinking"]
    assert page.locator(".tool-brief").all_inner_texts() == ["look around", "ls"]
    stream.send(tool_call_started("v", parent="unknown", summary="orphan"), tool_result("t", "Looked."))
    page.get_by_text("orphan").wait_for()
    wait_for_value(page, "!document.querySelector('.steps').open")  # folded, because the subagent has ended
    assert page.locator("#talk > .nested").count() == 1
    stream.send(agent_message("late", parent="t"))
    steps.get_by_text("5 steps of the subagent").click()
    steps.get_by_text("late").wait_for()
    assert "Agent 1.0 started" in page.locator(".aside").inner_text()


def test_edits_are_rendered_as_diffs(open_task):
    page, stream = open_task("chat")
    unchanged = "".join(f"line {number}\n" for number in range(20))
    edits = [{"path": "/workspace/src/a.py", "old": f"{unchanged}hello\nend\n", "new": f"{unchanged}<b>bye</b>\nend\n"}]
    written = [{"path": "new.py", "old": None, "new": "".join(f"x = {number}\n" for number in range(100))}]
    stream.send(
        tool_call_started("t", "Edit", summary="/workspace/src/a.py", edits=edits, input={"all": "true"}),
        tool_result("t", "The file has been updated."),
        tool_call_started("u", "Write", summary="new.py", edits=written, omitted_characters=7),
        tool_call_started("v", "Edit", summary="b.py", edits=[{"path": "b.py", "old": "a", "new": "b"}]),
        tool_result("v", "No match.", is_error=True),
    )
    tools = page.locator(".tool")
    page.get_by_text("No match.").wait_for()
    diff = tools.first.locator(".line-diff > div")
    assert diff.all_inner_texts() == [
        "…\n17 unchanged lines",
        *(f" \nline {number}" for number in (17, 18, 19)),
        "−\nhello",
        "+\n<b>bye</b>",
        " \nend",
    ]
    assert tools.locator(".tool-brief").all_inner_texts() == ["src/a.py", "new.py", "b.py"]
    assert tools.first.locator("summary").first.inner_text().split() == ["Edit", "src/a.py", "+1", "−1", "✓"]
    assert tools.first.locator(".field-name, pre").all_inner_texts() == ["all", "true"]
    tools.first.get_by_text("Output", exact=True).click()
    tools.first.get_by_text("The file has been updated.").wait_for()
    assert tools.nth(1).locator(".add").count() == 40
    tools.nth(1).get_by_role("button", name="Show all 100 lines").click()
    assert tools.nth(1).locator(".add").count() == 100
    assert "… and 7 more characters" in tools.nth(1).inner_text()
    tools.nth(2).scroll_into_view_if_needed()  # the browser does not render entries outside the window
    tools.nth(2).get_by_text("No match.").wait_for()
    assert tools.nth(2).locator(".field-name, pre").all_inner_texts() == ["Output", "No match."]


def test_commands_are_rendered_with_exit_code_and_duration_and_folded_output(open_task):
    page, stream = open_task("chat")
    lines = "\n".join(f"out {number}" for number in range(100))
    end = {"type": "tool_call", "tool": "Bash", "duration_ms": 2400, "is_error": False}
    stream.send(
        tool_call_started("t", summary="make", command="make -C /workspace/src"),
        {**tool_result("t", lines, is_error=True), "exit_code": 3},
        {**end, "tool_use_id": "t", "is_error": True},
        tool_call_started("u", summary="ls", command="ls"),
        tool_result("u", "a.py"),
        {**end, "tool_use_id": "u"},
        tool_call_started("v", summary="sleep", command="sleep 9"),
    )
    page.get_by_text("sleep", exact=True).wait_for()
    assert page.locator(".tool-took").all_inner_texts() == ["exit 3 · 2.4 s", "✓ 2.4 s", "…"]
    failed = page.locator(".tool").first
    first, last = ("\n".join(f"out {number}" for number in numbers) for numbers in (range(10), range(90, 100)))
    assert failed.locator("pre").all_inner_texts() == ["make -C /workspace/src", first, last]
    failed.get_by_role("button", name="Show 80 more lines").click()
    assert failed.locator("pre").all_inner_texts() == ["make -C /workspace/src", lines]
    assert page.evaluate("document.activeElement.tagName") == "PRE"


COMPUTE_DIFFS = """async (pairs) => {
    const { diffLines } = await import("/assets/line_diff.js");
    return pairs.map(([before, after]) => {
        const { rows, additions, deletions } = diffLines(before, after);
        const side = (sign) => rows.filter((row) => row[0] !== sign).map((row) => row[1]);
        return [side("+"), side("-"), additions, deletions];
    });
}"""


def test_diff_contains_the_whole_old_and_new_text(open_task):
    page, _ = open_task("chat")
    words = "abcab"
    texts = ["", "a\n", "\n\n", *("\n".join(words[at:] + words[:at]) for at in range(5))]
    pairs = [[before, after] for before in [None, *texts] for after in texts]
    for (before, after), (old, new, additions, deletions) in zip(
        pairs, page.evaluate(COMPUTE_DIFFS, pairs), strict=True
    ):
        assert old == (before or "").removesuffix("\n").split("\n") if before else old == []
        assert new == (after.removesuffix("\n").split("\n") if after else [])
        assert len(new) - len(old) == additions - deletions
    large = "\n".join(map(str, range(5000)))
    ((_, _, additions, deletions),) = page.evaluate(COMPUTE_DIFFS, [[large, large.replace("1", "x")]])
    assert additions == deletions > 2000


def test_converted_conversation_is_rendered(open_task):
    page, stream = open_task("chat")
    converted = [agent_message("Said before."), tool_call_started("t", summary="ls")]
    stream.send(
        {**output("{}"), "parsed": True, "conversation": converted},
        {"type": "conversation", "conversation": [tool_result("t", "Exit code 2", is_error=True)]},
    )
    page.get_by_text("Said before.").wait_for()
    assert page.locator(".tool pre").text_content() == "Exit code 2"


def agent_line(**fields):
    return output(json.dumps({**fields, "uuid": "u-1", "session_id": "s-1"}) + "\n")


def agent_blocks(*blocks, kind="assistant"):
    return agent_line(uuid="u-1", type=kind, message={"id": "m", "content": list(blocks)})


BASH = {"type": "tool_use", "id": "t", "name": "Bash", "input": {"description": "Run the tests", "command": "npm test"}}
AGENT_LINES = [
    (
        agent_line(type="system", subtype="init", model="m-1", claude_code_version="2.1"),
        "started: with m-1",
    ),
    (agent_blocks({"type": "text", "text": "Importing\nnow <b>."}), "assistant: Importing now <b>."),
    (agent_blocks({"type": "thinking", "thinking": "Hm."}, BASH), "thinking: Hm. · Bash: npm test"),
    (agent_blocks(BASH), "Bash: npm test"),
    (agent_line(type="tool_progress", tool_name="Bash", elapsed_time_seconds=90.4), "Bash: still running, 90 s"),
    (agent_blocks({"type": "tool_result", "content": "1 passed"}, kind="user"), "tool result: 1 passed"),
    (
        agent_blocks(
            {"type": "tool_result", "is_error": True, "content": [{"type": "text", "text": "no"}]}, kind="user"
        ),
        "tool error: no",
    ),
    (agent_line(type="user", message={"content": "Look around."}), "user: Look around."),
    (
        agent_line(type="system", subtype="api_retry", attempt=1, max_retries=10, error_status=529),
        "model request failed: 529, retry 1 of 10",
    ),
    (
        agent_line(type="system", subtype="task_updated", patch={"is_backgrounded": True}),
        "long call: moved to the background",
    ),
    (
        agent_line(type="system", subtype="background_tasks_changed", tasks=[{"description": "work"}]),
        "in the background: work",
    ),
    (agent_line(type="result", subtype="success", is_error=False, result="Done."), "result: Done."),
    (agent_line(type="result", subtype="error_max_turns", is_error=True), "result, error: error_max_turns"),
]
OTHER_LINES = [
    ({"type": "result", "result": "Of a program."}, '{type: "result", result: "Of a program."}'),
    ({"type": "toString", "session_id": "s"}, '{type: "toString", session_id: "s"}'),
    ({"type": "system", "subtype": "other", "session_id": "s"}, '{type: "system", subtype: "other", session_id: "s"}'),
    ({"type": "assistant", "message": 3, "session_id": "s"}, '{type: "assistant", message: 3, session_id: "s"}'),
    ({"type": "user", "message": {"content": [1]}, "session_id": "s"}, '{type: "user", message: {…}, session_id: "s"}'),
]


def test_agent_lines_are_summarized_in_the_output(open_task):
    page, stream = open_task("chat#output")
    others = [output(f"{json.dumps(value)}\n") for value, _ in OTHER_LINES]
    stream.send(*(line for line, _ in AGENT_LINES), *others)
    page.get_by_text("error_max_turns").wait_for()
    expected = [text for _, text in [*AGENT_LINES, *OTHER_LINES]]
    wait_until(lambda: page.locator(".line").count() == len(expected), 30, "all lines")
    assert page.locator(".line-text").all_inner_texts() == expected
    assert page.locator(".line-text b").count() == 0
    assert accessibility_violations(page) == []
    row = page.locator(".line").nth(1)
    row.get_by_role("button", name="JSON").click()
    keys = [line.split('"')[1] for line in row.locator(".json").inner_text().splitlines() if line.startswith('  "')]
    assert keys == ["type", "message", "uuid", "session_id"]
    page.get_by_role("button", name="Raw").click()
    assert page.locator(".line-text").all_inner_texts()[0] == AGENT_LINES[0][0]["data"].strip()


def test_tool_result_in_the_output_keeps_its_lines(open_task):
    page, stream = open_task("chat#output")
    lines = ['"""Adds up a basket."""', "", "def total(items):", "\treturn <b>sum(items)</b>"]
    numbered = "".join(f"{number:6}\u2192{line}\n" for number, line in enumerate(lines, 1))
    blocks = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
    results = [f"\n{numbered}\n", "one line\n", blocks, "", {"no": "list"}]
    stream.send(*(agent_blocks({"type": "tool_result", "content": content}, kind="user") for content in results))
    rows = page.locator(".line")
    wait_until(lambda: rows.count() == len(results), 30, "all lines")
    assert [text.rstrip() for text in page.locator(".line-text").all_inner_texts()] == [
        'tool result: 1\u2192"""Adds up a basket.""" +3 lines',
        "tool result: one line",
        "tool result: first +1 line",
        "tool result:",
        "tool result:",
    ]
    rows.first.get_by_role("button", name="+3 lines").click()
    shown = rows.first.locator("pre")
    assert shown.inner_text() == numbered.rstrip("\n")
    assert shown.locator("b").count() == 0
    assert rows.first.bounding_box()["height"] > 70
    assert accessibility_violations(page) == []
    rows.first.get_by_role("button", name="Tool result").click()
    assert rows.first.bounding_box()["height"] < 30
    rows.nth(1).get_by_role("button", name="JSON").click()
    assert '"tool_result"' in rows.nth(1).inner_text()
    page.get_by_role("searchbox").fill("return")
    assert page.locator("mark").inner_text() == "return"


def test_json_in_output_is_folded_and_log_levels_are_marked(open_task):
    page, stream = open_task("chat#output")
    nested = '{"level": "error", "msg": "no <b>disk</b>", "at": {"host": {"name": "needle"}}, "list": [1, 2]}'
    texts = [nested, "12:00 ERROR refused", "WARN: old option", "level=debug loop", "no error: fine", "{not json}"]
    stream.send(*(output(f"{text}\n") for text in texts), output("npm warn deprecated\n", stream="stderr"))
    page.get_by_text("npm warn deprecated").wait_for()
    rows = page.locator(".line")
    levels = rows.evaluate_all("rows => rows.map((row) => /level-(\\w+)/.exec(row.className)?.[1] ?? '')")
    assert levels == ["error", "error", "warn", "debug", "", "", "warn"]
    first = rows.first.locator(".line-text")
    assert first.inner_text() == '{level: "error", msg: "no <b>disk</b>", at: {…}, list: [… 2]}'
    assert rows.nth(6).locator(".line-stream").inner_text() == "stderr"
    fold = rows.first.get_by_role("button", name="JSON")
    fold.click()
    assert '"name": "needle"' in first.inner_text()
    assert (fold.get_attribute("aria-expanded"), first.locator("b").count()) == ("true", 0)
    assert rows.first.bounding_box()["height"] > 100
    fold.click()
    assert "needle" not in first.inner_text()
    page.get_by_role("searchbox").fill("needle")  # a match is shown even if it is in folded text
    assert page.locator("mark").inner_text() == "needle"
    page.get_by_role("searchbox").fill("")
    page.get_by_role("button", name="Raw").click()
    assert page.locator(".line-text").all_inner_texts() == [*texts, "npm warn deprecated"]
    assert page.locator(".line-stream, [class*=level-]").count() == 0


def test_long_lines_are_wrapped_and_the_search_finds_their_position(open_task):
    page, stream = open_task("chat#output")
    lines = "".join(f"{number} {'word ' * (number % 7 * 60)}end\n" for number in range(3000))
    stream.send(output(lines))
    last = page.locator(".line", has_text="2999 word")
    last.wait_for()
    box = page.locator("#lines")
    assert box.evaluate("box => box.scrollWidth <= box.clientWidth")
    assert last.bounding_box()["height"] > 40
    page.get_by_role("searchbox").fill("1234 ")
    page.get_by_text("1 lines").wait_for()
    page.get_by_role("button", name="Next match").click()
    found, frame = page.locator(".found-now").bounding_box(), box.bounding_box()
    assert frame["y"] <= found["y"] < frame["y"] + frame["height"]
    gaps = page.locator(".line").evaluate_all(
        "rows => rows.slice(1).map((row, at) => row.offsetTop - rows[at].offsetTop - rows[at].offsetHeight)"
    )
    assert set(gaps) == {0}
    page.get_by_role("searchbox").press("Escape")
    page.locator("#lines").focus()
    page.keyboard.press("w")
    wait_for_value(page, "document.querySelector('.line')?.getBoundingClientRect().height === 20")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    page.reload()
    page.locator(".line").first.wait_for()
    assert page.get_by_role("button", name="Wrap").get_attribute("aria-pressed") == "false"


def test_keys_select_views_and_actions(open_task):
    page, stream = open_task("patched")
    stream.send(*MESSAGES)
    page.get_by_text("entry 399.").wait_for(state="attached")
    page.keyboard.press("e")
    wait_for_value(page, "scrollY > 1000")
    page.keyboard.press("2")
    page.get_by_role("tab", name="Output", selected=True).wait_for()
    page.keyboard.press("r")
    page.get_by_role("tab", name="Changes", selected=True).wait_for()
    page.keyboard.press("/")
    page.get_by_role("searchbox").press_sequentially("r1")
    page.get_by_role("tab", name="Output", selected=True).wait_for()
    assert page.get_by_role("searchbox").input_value() == "r1"


def test_incomplete_terminal_line_is_rendered(open_task):
    page, stream = open_task("session#output")
    stream.send(output("one\r\ntwo\r\n$ ", continued=True))
    rendered = page.locator(".line-text")
    page.get_by_text("$", exact=True).wait_for()
    assert rendered.all_inner_texts() == ["one", "two", "$ "]
    stream.send(output("ls\r\n", continued=False), output("app.py\r\n$ ", continued=True))
    page.get_by_text("app.py").wait_for()
    assert rendered.all_inner_texts() == ["one", "two", "$ ls", "app.py", "$ "]
    page.get_by_role("button", name="stderr").click()
    assert rendered.count() == 0
    page.get_by_role("button", name="stdout").click()
    stream.send({"type": "end", "state": "completed"})
    page.locator("#live:empty").wait_for(state="attached")
    assert rendered.all_inner_texts() == ["one", "two", "$ ls", "app.py", "$ "]


def test_output_of_a_terminal_is_text_without_its_control_sequences(open_task):
    page, stream = open_task("session#output")
    screen = "\x1b7\x1b[?1049h\x1b]0;A title\x07\x1b[2J\x1b[H\x1b[1mAgent\x1b[m\x1b[12Gv2\x1b[3;1H> \x1b[2C\x1b[K\x1b"
    stream.send(
        output(screen, continued=True), output("[5;1HDone\x1b[32m ✓\x1b[m\x1b]8;;https://a.exam", continued=True)
    )
    stream.send(output("ple\x1b\\link\x1b]8;;\x1b\\\r\n\r\n$ ", continued=True))
    page.get_by_text("$", exact=True).wait_for()
    assert page.locator(".line-text").all_inner_texts() == ["Agent      v2", "", ">", "", "Done ✓link", "", "$ "]
    assert page.get_by_role("button", name="Raw").count() == 0


def test_redrawn_lines_of_a_terminal_are_shown_once(open_task):
    page, stream = open_task("session#output")
    stream.send(output("npm ci\r\n", continued=True))
    for percent in range(101):
        stream.send(output(f"\rfetching {percent}%\x1b[K", continued=True))
    stream.send(output("\r\n⠋ first step\r\n  second step", continued=True))
    for spinner in "⠙⠹⠸✓":
        frame = f"\x1b[2K\x1b[1A\x1b[2K\x1b[G\x1b[32m{spinner}\x1b[m first step\r\n  second step"
        stream.send(output(frame, continued=True))
    stream.send(output("\b\b\b\btask\r\nabc\x1b[3D\x1b[Pxy\x1b[@z漢字\x1b[8Ge\u0301\r\n", continued=True))
    rendered = page.locator(".line-text")
    page.get_by_text("xyz").wait_for()
    assert rendered.all_inner_texts() == ["npm ci", "fetching 100%", "✓ first step", "  second task", "xyz漢字e\u0301"]
    assert page.locator(".line-text .a2").inner_text() == "✓"
    assert page.locator("#tally-output").inner_text() == "5"
    page.get_by_role("searchbox").fill("second")
    page.locator("#find-count", has_text="1 line").wait_for()
    page.get_by_role("button", name="Events").click()
    assert rendered.count() == 0


def test_page_of_a_terminal_starts_with_its_output_and_explains_the_conversation(open_task):
    page, stream = open_task("session")
    denied = {"type": "egress_denied", "host": "a.example", "port": 443, "reason": "vm.network_mode is isolated."}
    stream.send(output("hello\r\n", continued=False), denied)
    page.get_by_text("a.example:443 refused").wait_for()
    page.get_by_text("The agent had a terminal. Its output is in the Output tab.").wait_for()
    assert page.get_by_text("Turns", exact=True).count() == 0
    page.get_by_role("tab", name="Output").click()
    page.get_by_text("hello", exact=True).wait_for()
    assert page.locator(".line-text").all_inner_texts() == ["hello"]
    assert page.get_by_role("button", name="stdout").get_attribute("aria-pressed") == "true"
    assert accessibility_violations(page) == []
    page.get_by_role("button", name="All", exact=True).click()
    page.get_by_text("egress_denied").wait_for()


def screen(*rows):
    """Return what a full-screen program writes to show these rows and to hide all others."""
    return "\x1b[H" + "\r\n".join(f"{row}\x1b[K" for row in rows) + "\x1b[J\x1b[24;1H\x1b[22;3H"


def test_text_that_a_full_screen_program_scrolls_off_is_kept(open_task):
    page, stream = open_task("session#output")
    stream.send(output("$ agent\r\n\x1b[?1049h\x1b[2J", continued=True))
    said = [f"step {number} of the work" for number in range(40)]
    for first in range(0, 31, 2):
        frame = screen(*said[first : first + 10], "", f"{spinner_at(first // 2)} working", "> ")
        stream.send(output(frame, continued=True))
    rendered = page.locator(".line-text")
    page.get_by_text(said[39]).wait_for()
    expected = ["$ agent", *said, "", f"{spinner_at(15)} working", ">"]
    assert rendered.all_inner_texts() == expected
    back = screen(*said[26:36], "", f"{spinner_at(16)} working", ">")  # the user scrolls back
    stream.send(output(back, continued=True), output(screen(*said[30:40], "", "✓ done", ">"), continued=True))
    page.get_by_text("✓ done").wait_for()
    expected[-2] = "✓ done"
    assert rendered.all_inner_texts() == expected
    stream.send(output("\x1b[?1049lended\r\n", continued=True), {"type": "end", "state": "completed"})
    page.get_by_text("ended", exact=True).wait_for()
    assert rendered.all_inner_texts() == [*expected, "ended"]


def spinner_at(number):
    return "◐◓◑◒"[number % 4]


def test_incomplete_line_is_not_joined_with_the_next(open_task):
    page, stream = open_task("chat")
    torn = '{"type": "assistant", "mess'
    for kind in ("attempt", "gap"):
        gap = {"type": kind, "reason": "torn", "first_seq": 1, "last_seq": 2}
        stream.send(output(torn, continued=True), gap)
        stream.send(
            output(f"torn by {kind}", stream="stderr", continued=True), gap, agent_message(f"Said after {kind}.")
        )
        page.get_by_text(f"Said after {kind}.", exact=True).wait_for()
    page.get_by_role("tab", name="Output").click()
    page.get_by_role("button", name="stderr").click()
    rendered = page.locator(".line-text")
    page.get_by_text("torn by gap", exact=True).wait_for()
    assert rendered.all_inner_texts() == ["torn by attempt", "torn by gap"]
    page.get_by_role("button", name="stdout").click()
    assert rendered.all_inner_texts() == [torn, torn]


def output_lines(first, end):
    """Yield output events with up to LINES_PER_EVENT lines each."""
    for start in range(first, end, LINES_PER_EVENT):
        numbers = range(start, min(start + LINES_PER_EVENT, end))
        yield output("".join(f"line {number}\n" for number in numbers))


READ_SELECTED_TEXT_SCRIPT = "getSelection().toString()"


def test_scroll_position_and_selection_survive_new_and_dropped_lines(open_task):
    page, stream = open_task("chat#output")
    stream.send(*output_lines(0, 1000))
    page.get_by_text("line 999", exact=True).wait_for()
    page.locator("#lines").evaluate("(box) => { box.scrollTop = 200 * 20; }")
    page.get_by_text("line 205", exact=True).select_text()
    selected = page.evaluate(READ_SELECTED_TEXT_SCRIPT)
    assert selected.strip() == "line 205"
    stream.send(*output_lines(1000, 1010))
    page.locator("#tally-output").get_by_text("1,010").wait_for()
    assert page.evaluate(READ_SELECTED_TEXT_SCRIPT) == selected

    stream.send(*output_lines(1010, 200_000))
    page.locator("#tally-output").get_by_text("200,000").wait_for()
    page.locator("#lines").evaluate("(box) => { box.scrollTop = 100_000 * 20; }")
    row = page.get_by_text("line 100005", exact=True)
    row.wait_for()
    before = row.bounding_box()["y"]
    stream.send(*output_lines(200_000, 210_001))
    page.get_by_text("This page no longer has the first 10,001 lines").wait_for()
    row.wait_for()
    assert abs(row.bounding_box()["y"] - before) < 40
    page.get_by_role("button", name="Events", exact=True).click()
    assert page.locator(".line").count() == 0


def test_page_of_a_removed_task_sends_no_more_requests(open_task, base_url, browser):
    page, stream = open_task("chat")
    stream.send(agent_message("Here."))
    page.get_by_text("Here.").wait_for()
    page.route(f"{base_url}/tasks/chat", lambda route: route.fulfill(status=404, body="gone"))
    stream.is_missing = True
    page.get_by_text("This task was deleted.").wait_for()
    assert page.locator("#live").inner_text() == ""
    request_count = len(stream.requests)
    page.evaluate("dispatchEvent(new Event('online')); fetch('/assets/icon.svg').then((answer) => answer.text())")
    assert len(stream.requests) == request_count
    assert page.locator("#head[data-refresh]").count() == 0
    browser.ignore_errors("404")


def test_page_of_a_deleted_task_offers_no_actions_and_shows_no_outdated_text(open_task, base_url, browser):
    page, _ = open_task("patched#changes")
    page.locator(".file").first.wait_for()
    assert page.locator("#review").count() == 1
    page.get_by_text("The agent sent no messages.").wait_for(state="attached")
    page.route(f"{base_url}/tasks/patched", lambda route: route.fulfill(status=404, body="gone"))
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.get_by_text("This task was deleted.").wait_for()
    main = page.locator("main")
    actions = main.locator("[data-action], [data-copy-command], [data-mirror], a[href^='/submit'], a[download]")
    assert [action for action in actions.all() if action.is_visible()] == []
    assert page.locator("#head .pill").inner_text() == "deleted"
    page.keyboard.press("q")
    assert page.get_by_role("dialog").count() == 0
    assert page.locator(".file").first.is_visible(), "what the page has loaded stays"
    page.get_by_role("tab", name="Conversation").click()
    assert page.get_by_text("The agent sent no messages.").count() == 0
    page.get_by_text("The conversation was deleted with the task.").wait_for()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("The artifacts were deleted with the task.").wait_for()
    assert accessibility_violations(page) == []
    page.get_by_role("link", name="All tasks").click()
    page.wait_for_url(f"{base_url}/")
    browser.ignore_errors("404")


def test_final_message_takes_one_line_above_the_changes(open_task):
    page, stream = open_task("patched")
    page.set_viewport_size({"width": 1024, "height": 768})
    stream.send(agent_result("# Done\n\n" + "It works now. " * 20 + "\n\n- one\n- two"))
    outcome = page.locator("#outcome")
    outcome.wait_for()
    assert outcome.bounding_box()["height"] > 60
    page.get_by_role("tab", name="Changes").click()
    assert outcome.bounding_box()["height"] < 40
    page.get_by_role("button", name="Show all").click()
    assert outcome.get_by_text("two").is_visible()
    assert outcome.bounding_box()["height"] > 100
    page.get_by_role("button", name="Show less").click()
    assert outcome.bounding_box()["height"] < 40
    assert accessibility_violations(page) == []
    page.get_by_role("tab", name="Conversation").click()
    assert outcome.bounding_box()["height"] > 60


LONG_CONVERSATION = """async ([use, answer]) => {
    const { Conversation } = await import("/assets/conversation.js");
    const conversation = new Conversation();
    for (let at = 0; at < 60; at++) {
        conversation.handle({ ...use, tool_use_id: at, tool: `tool ${at}` });
        conversation.handle({ ...answer, tool_use_id: at, output: "much ".repeat(200_000) });
    }
    do conversation.show(true); while (conversation.hasMore);
}"""


def test_end_of_a_long_conversation_is_retained(open_task):
    page, _ = open_task("chat")
    page.evaluate(LONG_CONVERSATION, [tool_call_started("t"), tool_result("t")])
    notice = page.get_by_text("earlier entries are only in the transcript").inner_text()
    assert 8 <= int(notice.split()[0]) <= 14
    assert page.locator(".tool-name").last.text_content() == "tool 59"


def test_ten_thousand_entries_do_not_block_the_page(open_running_task, open_task):
    for open_page in (open_task, open_running_task):
        page, stream = open_page("chat", RECORD_BLOCKED_TIME_SCRIPT)
        for first in range(0, 10_000, 500):
            stream.send(*(entry for number in range(first, first + 500, 2) for entry in call_and_message(number)))
        page.locator(".says", has_text="Part 9998 is done.").wait_for(state="attached")
        assert page.get_by_role("button", name="Show earlier").is_visible()
        assert page.evaluate("Math.max(0, ...window.longTasks)") < BLOCKED_MILLISECONDS_MAX


def call_and_message(number):
    edit = {"edits": [{"path": "a.py", "old": f"x = {number}\ny = 1\n", "new": f"x = {number + 1}\ny = 1\n"}]}
    yield tool_call_started(f"t{number}", "Edit", summary="a.py", **edit)
    yield tool_result(f"t{number}", "done\n" * 30)
    yield agent_message(f"Part **{number}** is done.\n\n- one\n- two\n")


RESULTS_AFTER_CALLS = """async ([use, answer, count, output]) => {
    const { Conversation } = await import("/assets/conversation.js");
    const conversation = new Conversation();
    for (let at = 0; at < count; at++) conversation.handle({ ...use, tool_use_id: at, tool: `tool ${at}` });
    while (conversation.hasMore) conversation.show(true);
    for (let at = 0; at < count; at++) conversation.handle({ ...answer, tool_use_id: at, output });
    conversation.show(true);
    const shown = document.querySelectorAll("#talk .erred").length;
    while (conversation.hasMore) conversation.show(true);
    return [shown, document.querySelectorAll("#talk .erred").length];
}"""


def test_burst_of_failed_results_is_rendered_in_time_slices(open_task):
    page, _ = open_task("chat")
    failed = tool_result("t", is_error=True)
    text = "\x01a\x1b[31mb" * 8000
    first, total = page.evaluate(RESULTS_AFTER_CALLS, [tool_call_started("t"), failed, 300, text])
    assert 0 < first < 300
    assert total == 300


def test_late_results_of_many_calls_are_dropped_at_the_limit(open_task):
    page, _ = open_task("chat")
    page.evaluate(RESULTS_AFTER_CALLS, [tool_call_started("t"), tool_result("t"), 60, "much " * 200_000])
    notice = page.evaluate("document.querySelector('.earlier').innerText")
    assert 8 <= int(notice.split(" earlier entries are only in the transcript")[0].split()[-1]) <= 14


def test_repeated_result_replaces_the_previous_one(open_task):
    page, _ = open_task("chat")
    page.evaluate(
        RESULTS_AFTER_CALLS.replace("tool_use_id: at, output", "tool_use_id: 0, output"),
        [tool_call_started("t"), tool_result("t"), 60, "much " * 200_000],
    )
    assert page.locator("#talk > li").count() == 60


FOLLOW_WITH_PAUSES = """async () => {
    const { follow } = await import("/assets/event_stream.js");
    const lines = [];
    const over = (following) => new Promise((done) => {
        following.made = follow("/tasks/large/story", 0, (events) => {
            lines.push(...events.filter((event) => event.type === "output").map((event) => event.data));
            following.made.hold(true);
            setTimeout(() => following.made.hold(false), 0);
        }, (state) => state === "over" && done());
    });
    await over({});
    return lines;
}"""


def test_slow_page_pauses_the_stream_without_losing_events(open_task, browser):
    page, _ = open_task("chat")
    assert page.evaluate(FOLLOW_WITH_PAUSES) == [f"line {number} of large\n" for number in range(2000)]
    resume_positions = [int(one.url.partition("after=")[2]) for one in browser.requests_to("large/story")]
    assert len({*resume_positions}) > 2


DISABLE_TIMERS = "window.setInterval = () => 0;"
REFRESH_LIST = """() => new Promise((done) => {
    document.addEventListener("htmx:afterRequest", () => setTimeout(done, 0), { once: true });
    window.htmx.trigger("#tasks", "refresh");
})"""


def test_list_refresh_preserves_focus_and_input_and_clicks(base_url, browser):
    page = browser.open(base_url, init_script=DISABLE_TIMERS)
    routes = []

    def fulfill(route):
        routes.append(route)
        response = route.fetch()
        body = response.text().replace('"Filter by state">', f'"Filter by state"><i id="refreshes">{len(routes)}</i>')
        route.fulfill(response=response, body=body)

    page.route(f"{base_url}/", fulfill)
    refreshes = page.locator("#refreshes")
    for focused in ("#sort", "#label-labelled-1"):
        page.locator(focused).focus()
        page.evaluate(REFRESH_LIST)
        assert page.locator(f"{focused}:focus").count() == 1
        assert refreshes.inner_text() == str(len(routes))
    page.locator("#task-chat").hover()
    page.mouse.down()
    before = refreshes.inner_text()
    page.evaluate(REFRESH_LIST)
    assert refreshes.inner_text() == before
    page.mouse.up()
    page.wait_for_url("**/tasks/chat")
    page.goto(base_url)
    page.locator("#filter").click()
    label = page.get_by_label("Label", exact=True)
    label.fill("team=")
    page.locator("#filter").click()  # an open menu postpones the refresh
    page.evaluate(REFRESH_LIST)
    assert refreshes.inner_text() == str(len(routes))
    assert label.input_value() == "team="
    # A failed refresh shows a banner until the next success.
    page.unroute(f"{base_url}/")
    page.route(f"{base_url}/", lambda route: route.fulfill(status=503, body="busy"))
    page.evaluate(REFRESH_LIST)
    page.get_by_text("The server responded with 503; this page may be outdated.").wait_for()
    assert page.locator("#task-chat").is_visible()
    page.unroute(f"{base_url}/")
    page.evaluate(REFRESH_LIST)
    page.locator("#banner").wait_for(state="hidden")
    browser.ignore_errors("503")
