"""Routes of the dashboard, and its protection against requests from other sites."""

import asyncio
import contextlib
import re
from pathlib import Path

import pytest

import sandbox.dashboard
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING, manifest
from doubles.fake_token_store import FakeTokenStore
from doubles.manifests import claude
from sandbox.dashboard.pages import server as pages_of_server
from sandbox.dashboard.pages import submit_form as submit_page
from sandbox.dashboard.pages import task as pages_of_task
from sandbox.dashboard.pages import task_list as pages_of_task_list
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact, DiffStatistics
from sandbox.model.failure import Failure, FailureCode

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'"
PATHS = ["/", "/submit", "/server", "/hosts", "/errors", "/tasks/task-001"]


@pytest.mark.parametrize("path", [*PATHS, "/tasks/nobody", "/nothing", "/sign-in"])
def test_page_loads_only_assets_of_the_server(pages, path):
    pages.tasks.add()
    page = pages.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "style-src 'self';" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", page.text)
    loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) >= 4
    for address in loaded:
        assert address.startswith("/assets/")
        assert pages.get(address).status_code == 200


def test_task_texts_are_escaped(pages):
    pages.tasks.add("task-001", *TO_RUNNING, name=HOSTILE, labels={"team": HOSTILE})
    pages.tasks.record(
        "task-001", e.AgentExited(1, failure=Failure(FailureCode.AGENT_FAILED, HOSTILE)), e.TaskFinished()
    )
    for path in PATHS:
        text = pages.get(path).text
        assert "<script>alert" not in text
        assert "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in pages.get("/tasks/task-001").text


def test_root_path_returns_api_links_to_programs(pages):
    for accept in ("*/*", "application/json"):
        response = pages.get("/", accept=accept)
        assert response.json()["links"]["tasks"] == "/api/v1/tasks"
    assert pages.get("/docs").status_code == 200


def test_format_of_the_missing_task_error_depends_on_the_accept_header(pages):
    page = pages.get("/tasks/nobody")
    assert (page.status_code, "There is no task &#39;nobody&#39;" in page.text) == (404, True)
    assert pages.get("/tasks/nobody", accept="application/json").json()["error"] == "task_not_found"
    assert pages.get("/tasks/nobody/story", accept="text/event-stream").json()["error"] == "task_not_found"


def test_browsers_receive_a_page_for_an_unknown_path_outside_the_api(pages):
    page = pages.get("/nothing/here")
    assert (page.status_code, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "There is no page at this address." in page.text
    assert pages.get("/nothing/here", accept="application/json").json()["error"] == "not_found"
    assert pages.get("/api/v1/nothing").json()["error"] == "not_found"


def test_missing_token_redirects_to_sign_in(pages_with_tokens):
    pages = pages_with_tokens(FakeTokenStore(ann="operator"))
    pages.tasks.add()
    for path in PATHS:
        response = pages.get(f"{path}?x=1")
        assert (response.status_code, response.headers["location"].split("=")[0]) == (303, "/sign-in?to")
    assert pages.get("/sign-in").status_code == 200
    assert pages.get("/assets/dashboard.css").status_code == 200
    assert pages.get("/", accept="application/json").status_code == 401
    assert pages.get("/api/v1/tasks").status_code == 401
    assert pages.get("/tasks/task-001/story", accept="text/event-stream").status_code == 401
    assert pages.get("/", authorization="Bearer ann").status_code == 200


def test_viewers_see_no_operator_actions(pages_with_tokens):
    pages = pages_with_tokens(FakeTokenStore(ann="operator", bob="viewer"))
    pages.tasks.add()
    for name, is_offered in (("ann", True), ("bob", False)):
        text = pages.get("/tasks/task-001", authorization=f"Bearer {name}").text
        assert ('data-action="cancel"' in text, "Run again" in text) == (is_offered, is_offered)
    pages.tasks.record("task-001", *TO_RUNNING, *TO_COMPLETED)
    for name, is_offered in (("ann", True), ("bob", False)):
        text = pages.get("/tasks/task-001", authorization=f"Bearer {name}").text
        assert ('id="run-again"' in text) == is_offered


def test_api_reference_indicates_whether_the_server_has_tokens(pages, pages_with_tokens):
    guarded = pages_with_tokens(FakeTokenStore(bob="viewer"))
    assert '<div id="page" data-no-tokens></div>' in pages.get("/docs").text
    assert '<div id="page"></div>' in guarded.get("/docs", authorization="Bearer bob").text


def test_cached_asset_returns_304(pages):
    first = pages.get("/assets/htmx.min.js")
    assert first.headers["content-type"].startswith("text/javascript")
    second = pages.get("/assets/htmx.min.js", if_none_match=first.headers["etag"])
    assert (second.status_code, second.content) == (304, b"")


@pytest.mark.parametrize("name", ["..%2froutes.py", "routes.py", "%2e%2e/__init__.py", ""])
def test_package_files_outside_the_assets_are_not_served(pages, name):
    assert pages.get(f"/assets/{name}").status_code == 404


@pytest.mark.parametrize(
    ("name", "text"),
    [("htmx", "Zero-Clause BSD"), ("highlight", "BSD 3-Clause License"), ("yaml", "Permission to use, copy, modify")],
)
def test_license_of_bundled_package_is_served(pages, name, text):
    assert text in pages.get(f"/assets/{name}.LICENSE").text


def test_progress_steps_mark_the_current_state(pages):
    pages.tasks.add("task-001", *TO_RUNNING)
    text = pages.get("/tasks/task-001").text
    assert re.search(r'aria-current="step">\s*<span class="step">running', text)
    assert re.findall(r'class="step">([\w, ]+)<', text) == [
        *("pending", "staging", "provisioning", "ready", "running", "completing", "completed")
    ]
    pages.tasks.record("task-001", *TO_COMPLETED)
    assert "data-over" in pages.get("/tasks/task-001").text


def record_patch(pages, size_bytes, diff=None, **fields):
    patch = Artifact("task-001.patch", ".sandbox/task-001.patch", size_bytes, "text/x-diff", "sha256:0", **fields)
    pages.tasks.record("task-001", e.ArtifactCollected(patch, diff))


@pytest.mark.parametrize(
    ("diff", "shown"),
    [
        (DiffStatistics(12, 376, 3), ["+376", "−3", " in 12 files"]),
        (DiffStatistics(1, 0, 1), ["−1 in 1 file"]),
        (None, ["12 B"]),  # recorded by an earlier version; the page counts the lines
    ],
)
def test_size_of_the_patch_is_shown(pages, diff, shown):
    pages.tasks.add("task-001", *TO_RUNNING)
    record_patch(pages, 12, diff)
    pages.tasks.record("task-001", *TO_COMPLETED)
    text = re.sub(r"<[^>]*>", "", re.search(r"<dt>Changes</dt>(.*)</div>", pages.get("/tasks/task-001").text)[1])
    assert [part in text for part in shown] == [True] * len(shown), text
    assert "+0" not in text


@pytest.mark.parametrize(("size_bytes", "is_offered"), [(12, True), (0, False)])
def test_patch_is_offered_only_if_it_is_not_empty(pages, size_bytes, is_offered):
    pages.tasks.add("task-001", *TO_RUNNING)
    record_patch(pages, size_bytes)
    assert 'id="review"' not in pages.get("/tasks/task-001").text
    pages.tasks.record("task-001", *TO_COMPLETED)
    text = pages.get("/tasks/task-001").text
    assert [f'id="{name}"' in text for name in ("review", "download-patch", "copy-apply")] == [is_offered] * 3
    assert 'data-copy-command="task apply task-001"' in text or not is_offered


def test_running_agent_with_a_terminal_offers_the_attach_command(pages_with_tokens):
    pages = pages_with_tokens(FakeTokenStore(ann="operator", bob="viewer"))
    session = manifest("session").replace(agent=claude(prompt="Talk.", headless=False))
    asyncio.run(pages.tasks.submit(session))
    pages.tasks.add("task-001", *TO_RUNNING)

    def offers(task_id, command, name="ann"):
        text = pages.get(f"/tasks/{task_id}", authorization=f"Bearer {name}").text
        return f'data-copy-command="task {command} {task_id}"' in text

    assert not offers("session", "attach")
    pages.tasks.record("session", *TO_RUNNING)
    assert (offers("session", "attach"), offers("session", "shell")) == (True, True)
    assert (offers("session", "attach", "bob"), offers("session", "shell", "bob")) == (False, False)
    assert (offers("task-001", "attach"), offers("task-001", "shell")) == (False, True)
    pages.tasks.record("session", *TO_COMPLETED)
    assert (offers("session", "attach"), offers("session", "shell")) == (False, False)


def test_patch_with_a_secret_is_not_offered_to_viewers(pages_with_tokens):
    pages = pages_with_tokens(FakeTokenStore(ann="operator", bob="viewer"))
    pages.tasks.add("task-001", *TO_RUNNING)
    record_patch(pages, 12, contains_secret=True)
    pages.tasks.record("task-001", *TO_COMPLETED)
    for name, is_offered in (("ann", True), ("bob", False)):
        text = pages.get("/tasks/task-001", authorization=f"Bearer {name}").text
        assert ('id="download-patch"' in text) == is_offered


def test_failure_is_shown_once_with_its_code(pages):
    pages.tasks.add("task-001", *TO_RUNNING)
    message = "The task exceeded its timeout of 1s; raise lifecycle.timeout."
    failure = Failure(FailureCode.TIMEOUT, message)
    pages.tasks.record("task-001", e.AgentExited(137, failure=failure), e.TaskFinished())
    text = pages.get("/tasks/task-001").text
    assert re.findall(f"(.{{9}}){message}", text) == ['message="']  # an attribute, which is not shown
    assert "<strong>The task exceeded its timeout of 1s.</strong> Raise the timeout. <a" in text
    assert re.search(r'<a class="failure-code"[^>]*>timeout</a>', text)


def test_scripts_do_not_parse_html():
    assets = Path(sandbox.dashboard.__file__).parent / "assets"
    modules = [file for file in assets.glob("*.js") if not file.name.endswith((".min.js", ".bundle.js"))]
    assert len(modules) > 10
    parsing = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|srcdoc"
    assert {file.name: re.findall(parsing, file.read_text()) for file in modules} == {file.name: [] for file in modules}


def test_pages_are_rendered_outside_the_event_loop(pages, monkeypatch):
    """Rendering 1000 tasks or a long manifest takes almost a second, which would block the event loop."""
    called, on_event_loop = [], []

    def record_calls(module, name):
        original = getattr(module, name)

        def recorded(*arguments, **options):
            called.append(module.__name__)
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()
                on_event_loop.append(module.__name__)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, recorded)

    for module in (pages_of_task_list, pages_of_server):
        record_calls(module, "render_page")
    for module in (pages_of_task, submit_page):
        record_calls(module, "manifest_yaml")
    pages.tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    for path in ("/", "/server", "/tasks/task-001", "/submit?from=task-001", "/tasks/task-001/proof"):
        called.clear()
        assert pages.get(path).status_code == 200
        assert called, path
    assert on_event_loop == []


def test_api_reference_has_the_page_header_of_the_dashboard(pages):
    page = pages.get("/docs")
    assert re.search(r'<a href="/docs" aria-current="page">API</a>', page.text)
    assert 'href="/server"' in page.text
    assert re.findall(r"<script(?![^>]*src=)|<style| style=", page.text) == []
    policy = page.headers["content-security-policy"]
    assert "style-src 'self' 'unsafe-inline';" in policy
    assert "script-src 'self';" in policy
    for url in re.findall(r'(?:src|href)="(/(?:docs|assets)/[^"]+)"', page.text):
        assert pages.get(url).status_code == 200, url


@pytest.mark.parametrize("path", ["/", "/tasks/task-001", "/submit", "/guide", "/errors", "/docs"])
def test_preloaded_modules_are_imported_by_the_page(pages, path):
    pages.tasks.add()
    text = pages.get(path).text
    found = re.findall(r'rel="modulepreload" href="/assets/([^"]+)"', text)
    imported, pending = set(), set(re.findall(r'<script type="module" src="/assets/([^"]+)"', text))
    while pending:
        imported |= pending
        sources = [pages.get(f"/assets/{name}").text for name in pending]
        pending = {name for text in sources for name in re.findall(r'"/assets/([\w.-]+\.js)"', text)} - imported
    assert {"page.js", "shortcuts.js"} <= set(found) <= imported
    assert len(found) == len(set(found))
    assert ("markdown-it.min.js" in imported) == (path in {"/tasks/task-001", "/guide"})
