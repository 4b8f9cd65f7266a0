"""Somebody works with the dashboard in a real browser, without the internet."""

import io
import signal
import tarfile
from contextlib import suppress

import pytest
from playwright.sync_api import TimeoutError as PageTimeoutError

from doubles.live_server import ORGANISATION, bash, git, python, says, until

MANIFEST = f"""version: "1"
kind: Task
metadata:
  name: "Greet everybody"
  id: greet
repository:
  url: "{ORGANISATION}repo.git"
  branch: "main"
claude:
  prompt: "Make the greeting polite."
lifecycle:
  artifact_patterns: ["*.md"]
"""
WORK = "printf 'print(\"good day\")\\n' > src/app.py; "
REPORT = "printf '# Report\\n\\nAll **good**.\\n' > report.md; cat /nowhere"
PAUSE = "sleep 2; printf '\\033[32mPASS\\033[0m\\n'"


@pytest.fixture
def place(browser):
    """Where a world's dashboard is; in the end nothing was asked of anybody else, and the browser had no complaint."""
    places = []

    def place(world):
        places.append(world.server.said["http"])
        return places[-1]

    yield place
    others = [request.url for request in browser.requests if not request.url.startswith(tuple(places))]
    assert (others, browser.complaints) == ([], [])


def state_of(page):
    return page.locator("#head .pill").first.inner_text()


def assert_applies(patch, repository, directory):
    git("clone", "-q", str(repository), str(directory / "clone"), cwd=directory)
    (directory / "greet.patch").write_bytes(patch)
    git("apply", str(directory / "greet.patch"), cwd=directory / "clone")
    assert (directory / "clone" / "src" / "app.py").read_text() == 'print("good day")\n'


def test_a_task_is_handed_in_watched_to_its_end_and_taken_home(world, browser, place, tmp_path):
    made = world(bash(WORK + REPORT), bash(PAUSE), says("Done: the greeting is **polite** now."))
    listing, page = browser.open(place(made)), browser.open(place(made))
    page.get_by_role("link", name="Hand in the first one").click()
    editor = page.get_by_label("Manifest, YAML")
    editor.fill(MANIFEST.replace("branch", "brunch"))
    mistakes = page.get_by_role("list", name="Mistakes").get_by_role("button")
    page.get_by_text("2 mistakes").wait_for()
    told = made.http.post("/api/v1/tasks", content=MANIFEST.replace("branch", "brunch")).json()["details"]
    assert [mistake["message"] in mistakes.nth(at).inner_text() for at, mistake in enumerate(told)] == [True, True]
    editor.fill(MANIFEST)
    page.get_by_text("The server would take this manifest.").wait_for()
    assert mistakes.count() == 0
    browser.forgive("status of 400")
    page.get_by_role("button", name="Submit task").click()
    page.wait_for_url("**/tasks/greet")

    page.get_by_text("Done: the greeting is polite now.").wait_for()
    until(lambda: state_of(page) == "completed", 30, "the head to tell the end")
    assert page.locator(".timeline .station").all_inner_texts()[-1] == "completed"
    assert page.locator(".says strong").inner_text() == "polite"
    tools = page.locator(".tool")
    assert tools.count() == 2
    tools.nth(1).locator("summary").click()
    assert tools.nth(1).locator("pre").last.inner_text().strip() == "PASS"
    assert tools.nth(1).locator(".a2").inner_text() == "PASS"

    page.get_by_role("tab", name="Changes").click()
    page.get_by_text("2 files changed").wait_for()
    assert page.locator(".file-path").all_inner_texts() == ["report.md", "src/app.py"]
    assert "− print('hello')" in page.locator(".del").inner_text()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_role("button", name="report.md", exact=True).click()
    assert page.locator(".preview strong").inner_text() == "good"

    with page.expect_download() as downloading:
        page.get_by_role("link", name="Proof bundle").click()
    with tarfile.open(fileobj=io.BytesIO(downloading.value.path().read_bytes())) as archive:
        patch = archive.extractfile("greet/greet.patch").read()
    assert patch == made.artifact("greet.patch", "greet")
    assert_applies(patch, made.repositories / "repo.git", tmp_path)

    listing.locator("#task-greet").wait_for()  # on a list that had none when it was opened
    answered = []
    listing.on("requestfinished", lambda one: answered.append(one) if one.url == f"{place(made)}/" else None)
    until(lambda: listing.wait_for_timeout(100) or len(answered) >= 2, 30, "the list to be asked for again")
    assert listing.locator("#task-greet").is_visible()


def test_a_page_goes_on_where_nobody_saw_it_the_server_died_or_its_head_did_not_come(world, browser, place):
    made = world(bash("sleep 3"), says("Still here."))
    made.submit("long", claude={"prompt": "Wait."})
    until(lambda: made.status("long")["progress"]["current_tool"] == "Bash", what="the tool call")
    with made.model_held():
        page = browser.open(f"{place(made)}/tasks/long")
        page.get_by_text("Live", exact=True).wait_for()
        page.locator(".tool").wait_for()
        lets_go_while_nobody_sees_it(page, made)

        refused = []
        page.route("**/tasks/long", lambda route: (refused.append(route), route.fulfill(status=429)))
        made.restart_server(signal.SIGKILL)
    page.get_by_text("Still here.").first.wait_for()
    page.locator("#live:empty").wait_for(state="attached")
    assert page.locator(".tool").count() == 1
    head_is_asked_for_until_it_comes(page, refused)

    page.get_by_role("tab", name="Output").click()
    page.get_by_role("button", name="Events", exact=True).click()
    changes = page.locator(".line-text").filter(has_text="state_change")
    assert changes.count() == len(made.states("long")), "every state once"
    browser.forgive("ERR_CONNECTION", "ERR_INCOMPLETE_CHUNKED", "htmx:", "429")


def lets_go_while_nobody_sees_it(page, made):
    followers = 'sandbox_streams_open{kind="logs"} '
    for is_hidden, count in (("true", "0.0"), ("false", "1.0")):
        page.evaluate(f"""Object.defineProperty(document, "hidden", {{ value: {is_hidden}, configurable: true }});
            document.dispatchEvent(new Event("visibilitychange"))""")
        until(lambda told=followers + count: told in made.http.get("/metrics").text, 10, "the page's connection")
    assert page.locator(".tool").count() == 1


def head_is_asked_for_until_it_comes(page, refused):
    """It was refused at the end of the task, and does not take the place of what somebody uses."""
    page.get_by_text("Copy", exact=True).click()
    refused.clear()
    until(lambda: page.wait_for_timeout(100) or refused, 30, "the head to be asked for")
    page.unroute("**/tasks/long")
    with page.expect_response("**/tasks/long"):
        assert page.get_by_role("button", name="Cancel").is_visible()
    page.keyboard.press("Escape")
    until(lambda: page.wait_for_timeout(100) or state_of(page) == "completed", 30, "the head to tell the end")
    page.get_by_role("button", name="Cancel").wait_for(state="detached")
    assert page.locator("#head[data-refresh]").count() == 0


def test_what_a_failed_task_left_is_released_from_its_page(world, browser, place):
    made = world(python("import time; time.sleep(60)"), says())
    made.submit("kept", lifecycle={"timeout": "1s", "failure_action": "preserve"})
    page = browser.open(f"{place(made)}/tasks/kept")
    page.locator("#head .pill.failed").wait_for()
    page.get_by_role("button", name="Release sandbox").click()
    page.get_by_role("button", name="Release", exact=True).click()
    page.get_by_role("button", name="Release sandbox").wait_for(state="detached")
    assert made.http.delete("/api/v1/tasks/kept/vm").status_code == 404
    assert state_of(page) == "failed, preserved"


def test_a_task_is_cancelled_from_its_page(world, browser, place):
    made = world(python("import time; time.sleep(60)"), says())
    made.submit("slow")
    page = browser.open(f"{place(made)}/tasks/slow")
    page.locator(".tool").wait_for()
    cancel = page.get_by_role("button", name="Cancel", exact=True)
    cancel.click()
    page.get_by_role("button", name="Back").click()
    page.get_by_role("dialog").wait_for(state="hidden")
    page.locator("#head .pill", has_text="running").wait_for()
    cancel.click()
    reason = page.get_by_label("Reason")
    reason.fill("not needed <b>any</b> more")
    reason.press("Enter")
    # Claude Code may be gone at once, or not before it is hurried.
    hurry, over = page.get_by_role("button", name="Stop at once"), page.locator("#head .pill.ended")
    hurry.or_(over).wait_for()
    if hurry.is_visible():
        stop_at_once(page, hurry)
    over.wait_for()
    browser.forgive("status of 409")  # it may have ended while somebody was asked whether they are sure
    page.get_by_text("not needed <b>any</b> more").wait_for()
    page.goto(f"{place(made)}/?state=cancelled")
    assert page.locator(".row-link").all_inner_texts() == ["A task"]


def stop_at_once(page, hurry):
    """Or come too late for that, where it ends just now."""
    with suppress(PageTimeoutError):
        hurry.click(timeout=5000)
        page.get_by_role("dialog").get_by_role("button", name="Stop at once").click()
