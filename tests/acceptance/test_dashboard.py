"""The dashboard in a real browser without internet access."""

import io
import signal
import tarfile
from contextlib import suppress

import pytest
from playwright.sync_api import TimeoutError as PageTimeoutError

from doubles.browser import accessibility_violations
from doubles.deployment import ORGANIZATION, bash_turn, git, python_turn, reply_turn, wait_until

MANIFEST = f"""version: "1"
kind: Task
metadata:
  name: "Greet everybody"
  id: greet
repository:
  url: "{ORGANIZATION}repo.git"
  branch: "main"
claude:
  prompt: "Make the greeting polite."
lifecycle:
  artifact_patterns: ["*.md"]
"""
EDIT_COMMAND = "printf 'print(\"good day\")\\n' > src/app.py; "
REPORT_COMMAND = "printf '# Report\\n\\nAll **good**.\\n' > report.md; cat /nowhere"
PAUSE_COMMAND = "sleep 2; printf '\\033[32mPASS\\033[0m\\n'"


@pytest.fixture
def dashboard_url(browser):
    """Returns a dashboard's URL. After the test, the fixture fails on console errors or requests to other hosts."""
    base_urls = []

    def dashboard_url(deployment):
        base_urls.append(deployment.server.ready_message["http"])
        return base_urls[-1]

    yield dashboard_url
    browser.assert_no_errors(*base_urls)


def state_of(page):
    return page.locator("#head .pill").first.inner_text()


def assert_applies(patch, repository, directory):
    git("clone", "-q", str(repository), str(directory / "clone"), cwd=directory)
    (directory / "greet.patch").write_bytes(patch)
    git("apply", str(directory / "greet.patch"), cwd=directory / "clone")
    assert (directory / "clone" / "src" / "app.py").read_text() == 'print("good day")\n'


def test_user_submits_and_follows_a_task_and_downloads_its_results(deploy, browser, dashboard_url, tmp_path):
    deployment = deploy(
        bash_turn(EDIT_COMMAND + REPORT_COMMAND),
        bash_turn(PAUSE_COMMAND),
        reply_turn("Done: the greeting is **polite** now."),
    )
    listing, page = browser.open(dashboard_url(deployment)), browser.open(dashboard_url(deployment))
    page.get_by_role("link", name="Submit your first task").click()
    page.wait_for_url("**/submit")  # also waits for the page's scripts, which handle the tabs
    page.get_by_role("tab", name="YAML").click()
    editor = page.get_by_label("Manifest, YAML")
    editor.fill(MANIFEST.replace("branch", "brunch"))
    errors = page.get_by_role("list", name="Errors").get_by_role("button")
    page.get_by_text("1 error", exact=True).wait_for()
    details = deployment.http.post("/api/v1/tasks", content=MANIFEST.replace("branch", "brunch")).json()["details"]
    assert [detail["message"] in errors.nth(at).inner_text() for at, detail in enumerate(details)] == [True]
    editor.fill(MANIFEST)
    page.get_by_text("Ready to submit.").wait_for()
    assert errors.count() == 0
    browser.ignore_errors("status of 400")
    page.get_by_role("button", name="Submit task").click()
    page.wait_for_url("**/tasks/greet")

    page.locator(".says", has_text="Done: the greeting is polite now.").wait_for()
    wait_until(lambda: state_of(page) == "completed", 30, "the header to show the final state")
    check_outcome(page)
    assert page.locator(".timeline .step").all_inner_texts()[-1] == "completed"
    assert page.locator(".says strong").inner_text() == "polite"
    tools = page.locator(".tool")
    assert tools.count() == 2
    tools.nth(1).locator("summary").click()
    # Content that has never been on screen has no inner text.
    assert tools.nth(1).locator("pre").last.text_content().strip() == "PASS"
    assert tools.nth(1).locator(".a2").text_content() == "PASS"

    page.get_by_role("link", name="Review changes").click()
    page.get_by_text("2 files changed").wait_for()
    assert page.locator(".file-path").all_inner_texts() == ["report.md", "src/app.py"]
    assert page.locator(".del .tx").inner_text() == "print('hello')"
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_role("button", name="report.md", exact=True).click()
    assert page.locator(".preview strong").inner_text() == "good"

    with page.expect_download() as downloading:
        page.get_by_text("More", exact=True).click()
        page.get_by_role("link", name="Download results").click()
    with tarfile.open(fileobj=io.BytesIO(downloading.value.path().read_bytes())) as archive:
        patch = archive.extractfile("greet/greet.patch").read()
    assert patch == deployment.artifact("greet.patch", "greet")
    assert_applies(patch, deployment.repositories / "repo.git", tmp_path)

    listing.locator("#task-greet").wait_for()  # the list was empty when it was opened
    refreshes = []
    listing.on(
        "requestfinished", lambda one: refreshes.append(one) if one.url == f"{dashboard_url(deployment)}/" else None
    )
    wait_until(lambda: listing.wait_for_timeout(100) or len(refreshes) >= 2, 30, "the list to be refreshed")
    assert listing.locator("#task-greet").is_visible()


def check_outcome(page):
    """Check that an ended task's page begins with the agent's final message, the patch size and the next steps."""
    page.get_by_role("region", name="Final message").get_by_text("the greeting is polite now.").wait_for()
    page.locator(".figures dd", has_text="+4 −1 in 2 files").wait_for()
    assert page.locator("#fact-cost").inner_text().startswith("$")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy apply command").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f"sandbox task apply greet --server {page.evaluate('location.origin')}"
    page.get_by_text(f"Copied: {copied}").wait_for()
    page.get_by_text("More", exact=True).click()
    page.get_by_role("button", name="Copy command for a branch").click()
    branch = copied.replace(" --server", " --branch sandbox/greet --server")
    assert page.evaluate("navigator.clipboard.readText()") == branch
    page.get_by_text("More", exact=True).click()
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Download patch").click()
    assert downloading.value.suggested_filename == "greet.patch"


def test_page_recovers_from_a_restart_and_a_failed_refresh_and_being_hidden(deploy, browser, dashboard_url):
    deployment = deploy(bash_turn("sleep 3"), reply_turn("Still here."))
    deployment.submit("long", claude={"prompt": "Wait."})
    wait_until(lambda: deployment.status("long")["progress"]["current_tool"] == "Bash", description="the tool call")
    with deployment.paused_model():
        page = browser.open(f"{dashboard_url(deployment)}/tasks/long")
        page.get_by_text("Live", exact=True).wait_for()
        page.locator(".tool").wait_for()
        check_stream_closes_while_hidden(page, deployment)

        refused = []
        page.route("**/tasks/long", lambda route: (refused.append(route), route.fulfill(status=429)))
        deployment.restart_server(signal.SIGKILL)
    page.get_by_text("Still here.").first.wait_for()
    page.locator("#live:empty").wait_for(state="attached")
    assert page.locator(".tool").count() == 1
    check_page_header_is_requested_until_it_arrives(page, refused)

    page.get_by_role("tab", name="Output").click()
    page.get_by_role("button", name="Events", exact=True).click()
    changes = page.locator(".line-text").filter(has_text="state_change")
    assert changes.count() == len(deployment.states("long")), "each state must be listed once"
    browser.ignore_errors("ERR_CONNECTION", "ERR_INCOMPLETE_CHUNKED", "htmx:", "429")


def check_stream_closes_while_hidden(page, deployment):
    followers = 'sandbox_streams_open{kind="logs"} '
    for is_hidden, count in (("true", "0.0"), ("false", "1.0")):
        page.evaluate(f"""Object.defineProperty(document, "hidden", {{ value: {is_hidden}, configurable: true }});
            document.dispatchEvent(new Event("visibilitychange"))""")
        wait_until(
            lambda metric=followers + count: metric in deployment.http.get("/metrics").text, 10, "the page's connection"
        )
    assert page.locator(".tool").count() == 1


def check_page_header_is_requested_until_it_arrives(page, refused):
    """Check that the page retries the failed header request, and updates the header once the menu is closed."""
    page.get_by_text("More", exact=True).click()
    refused.clear()
    wait_until(lambda: page.wait_for_timeout(100) or refused, 30, "a request for the header")
    page.unroute("**/tasks/long")
    with page.expect_response("**/tasks/long"):
        assert page.get_by_role("button", name="Cancel").is_visible()
    page.keyboard.press("Escape")
    wait_until(
        lambda: page.wait_for_timeout(100) or state_of(page) == "completed", 30, "the header to show the final state"
    )
    page.get_by_role("button", name="Cancel").wait_for(state="detached")
    assert page.locator("#head[data-refresh]").count() == 0


def test_continuation_is_submitted_and_its_chain_is_shown(deploy, browser, dashboard_url):
    deployment = deploy(
        bash_turn("echo one > one.txt"),
        reply_turn("One is there."),
        bash_turn("echo two > two.txt"),
        reply_turn("Two is there."),
    )
    deployment.submit("first", claude={"prompt": "Make one."})
    deployment.wait("first")
    page = browser.open(f"{dashboard_url(deployment)}/tasks/first")
    page.get_by_role("button", name="Ask for a change").click()
    dialog = page.get_by_role("dialog", name="Ask for a change")
    dialog.get_by_label("What should change?").fill("Make two <b>as well</b>.")
    assert accessibility_violations(page) == []
    page.reload()
    page.keyboard.press("q")
    assert dialog.get_by_label("What should change?").input_value() == "Make two <b>as well</b>."
    page.route("**/continue", lambda route: route.fulfill(status=503, json={"message": "Try again later."}))
    dialog.get_by_role("button", name="Submit task").click()
    dialog.get_by_text("Try again later.").wait_for()
    page.unroute("**/continue")
    dialog.get_by_role("button", name="Submit task").click()
    page.get_by_role("link", name="first", exact=True).wait_for()
    page.get_by_role("region", name="Final message").get_by_text("Two is there.").wait_for()
    assert page.locator("#prompt").inner_text() == "Make two <b>as well</b>."
    page.locator(".figures dd", has_text="+1 in 1 file").wait_for()
    page.get_by_text("More", exact=True).click()
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Patch of the chain").click()
    patch = downloading.value.path().read_text()
    assert [name in patch for name in ("one.txt", "two.txt")] == [True, True]
    assert page.locator("#copy-apply").get_attribute("title") == f"sandbox task apply {page.url.split('/')[-1]} --chain"
    child = page.locator("#task-data").get_attribute("data-task")
    page.get_by_role("link", name="first", exact=True).click()
    page.wait_for_url("**/tasks/first")
    page.get_by_role("link", name=child[:8]).click()
    page.wait_for_url(f"**/tasks/{child}")
    page.goto(f"{dashboard_url(deployment)}/?parent=first")
    page.get_by_role("link", name="continues first remove filter").wait_for()
    assert page.locator(".row-link").count() == 1
    browser.ignore_errors("503")


def test_preserved_sandbox_is_released_from_the_task_page(deploy, browser, dashboard_url):
    deployment = deploy(python_turn("import time; time.sleep(60)"), reply_turn())
    deployment.submit("kept", lifecycle={"timeout": "1s", "failure_action": "preserve"})
    page = browser.open(f"{dashboard_url(deployment)}/tasks/kept")
    page.locator("#head .pill.failed").wait_for()
    page.get_by_role("button", name="Copy shell command").wait_for()
    page.locator("#copy").click()
    page.get_by_role("button", name="Release sandbox").click()
    page.get_by_role("button", name="Release", exact=True).click()
    page.locator("#release").wait_for(state="detached")
    assert deployment.http.delete("/api/v1/tasks/kept/vm").status_code == 404
    assert state_of(page) == "failed, released"
    page.goto(dashboard_url(deployment))
    page.locator(".pill", has_text="failed, released").wait_for()


def test_task_is_cancelled_from_its_page(deploy, browser, dashboard_url):
    deployment = deploy(python_turn("import time; time.sleep(60)"), reply_turn())
    deployment.submit("slow")
    page = browser.open(f"{dashboard_url(deployment)}/tasks/slow")
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
    # Claude Code may end immediately, or only when forced.
    stop_button, ended = page.get_by_role("button", name="Stop now"), page.locator("#head .pill.ended")
    stop_button.or_(ended).wait_for()
    if stop_button.is_visible():
        force_cancel(page, stop_button)
    ended.wait_for()
    page.get_by_text("not needed <b>any</b> more").wait_for()
    page.goto(f"{dashboard_url(deployment)}/?state=cancelled")
    assert page.locator(".row-link").all_inner_texts() == ["A task"]
    browser.ignore_errors("status of 409")  # the task may have ended while the dialog was open


def force_cancel(page, stop_button):
    """Force the cancellation, unless the task ends first."""
    with suppress(PageTimeoutError):
        stop_button.click(timeout=5000)
        page.get_by_role("dialog").get_by_role("button", name="Stop now").click()
