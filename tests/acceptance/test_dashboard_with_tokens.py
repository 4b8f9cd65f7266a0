"""Signing in to the dashboard of a server with tokens, and cross-site requests."""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest

from doubles.browser import accessibility_violations
from doubles.deployment import ORGANIZATION, Deployment, wait_until
from sandbox.access_tokens.token_file import TokenFile
from sandbox.interfaces.auth import Role

MINIMAL = {
    "version": "1",
    "kind": "Task",
    "repository": {"url": f"{ORGANIZATION}repo.git", "branch": "main"},
    "claude": {"prompt": "Do it."},
}
FORGED_REQUESTS_PAGE = """<!doctype html><title>forged</title>
<form id=form method=post enctype=text/plain action="%(place)s/api/v1/tasks" target=frame>
<input name='%(manifest)s'>
</form><iframe name=frame></iframe>
<script>
const tries = {
  read: async () => (await fetch("%(place)s/api/v1/tasks", {credentials: "include"})).status,
  cancel: async () => (await fetch("%(place)s/api/v1/tasks/task-1", {method: "DELETE", credentials: "include"})).status,
  submit: async () => (await fetch("%(place)s/api/v1/tasks", {method: "POST", mode: "no-cors", credentials: "include",
    headers: {"Content-Type": "text/plain"}, body: '%(manifest)s'})).status || "opaque",
  stream: () => new Promise((done) => {
    const line = new WebSocket("%(socket)s/api/v1/tasks/stream?task_id=task-1");
    line.onopen = () => done("open");
    line.onerror = () => done("refused");
  }),
  embed: () => new Promise((done) => {
    const picture = new Image();
    picture.onload = () => done("loaded");
    picture.onerror = () => done("refused");
    picture.src = "%(place)s/assets/icon.svg";
  }),
  events: () => new Promise((done) => {
    const source = new EventSource("%(place)s/api/v1/tasks/stream?task_id=task-1", {withCredentials: true});
    source.onopen = () => done("open");
    source.onerror = () => { source.close(); done("refused"); };
  }),
};
window.outcomes = (async () => {
  document.getElementById("form").submit();
  const found = {};
  for (const [name, attempt] of Object.entries(tries)) found[name] = await attempt().catch(() => "refused");
  return found;
})();
</script>"""


@pytest.fixture(scope="module")
def token_deployment(tmp_path_factory):
    """A server with an operator's token (`bearer`) and a viewer's token (`viewer`). New tasks cannot complete."""
    deployment = Deployment(tmp_path_factory.mktemp("guarded"))
    try:
        deployment.data_dir.mkdir(mode=0o700)
        tokens = TokenFile(deployment.data_dir)
        deployment.bearer, deployment.viewer = (tokens.create(role, "bob")[0] for role in (Role.OPERATOR, Role.VIEWER))
        configuration = deployment.home / ".config" / "sandbox" / "sandbox.toml"
        configuration.parent.mkdir(parents=True)
        configuration.write_text('[git]\nallowed_hosts = ["github.com"]\n')
        deployment.model_url = "http://127.0.0.1:9"
        (deployment.home / ".gitconfig").write_text(f'[url "{deployment.model_url}/"]\n\tinsteadOf = {ORGANIZATION}\n')
        deployment.start_server()
        yield deployment
    finally:
        deployment.close()


def sign_in(deployment, browser, token):
    page = browser.open(f"{deployment.server.ready_message['http']}/sign-in")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="Sign out").wait_for()
    return page


def test_header_of_an_operator_fits_on_a_phone(token_deployment, browser):
    page = sign_in(token_deployment, browser, token_deployment.bearer)
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.get_by_role("link", name="New task").bounding_box()["width"] >= 24
    assert accessibility_violations(page) == []
    page.set_viewport_size({"width": 360, "height": 800})
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")


@contextmanager
def other_site(html):
    """Serve a page from another origin of the same site: browsers include cookies in its requests to the dashboard."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def task_ids(deployment):
    return [task["id"] for task in deployment.http.get("/api/v1/tasks").json()["tasks"]]


def test_api_reference_offers_authorization(token_deployment, browser):
    page = sign_in(token_deployment, browser, token_deployment.viewer)
    page.goto(f"{token_deployment.server.ready_message['http']}/docs")
    page.get_by_role("button", name="Authorize").wait_for()
    assert page.locator(".authorization__btn").count() > 20
    quick_start = page.locator(".info .description").inner_text()
    assert quick_start.count('-H "Authorization: Bearer $TOKEN"') == 3
    assert "\nTOKEN=…" in quick_start


def test_sign_in_hides_the_token_and_sign_out_ends_the_session(token_deployment, browser):
    base_url = token_deployment.server.ready_message["http"]
    page = browser.open(f"{base_url}/?state=completed")
    assert page.url == f"{base_url}/sign-in?to=%2F%3Fstate%3Dcompleted"
    assert accessibility_violations(page) == []
    page.get_by_label("Token").fill("sbx_wrong")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("Invalid token.").wait_for()
    assert accessibility_violations(page) == []
    browser.ignore_errors("status of 401")
    page.get_by_label("Token").fill(token_deployment.viewer)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(f"{base_url}/?state=completed")
    page.get_by_text("No tasks match these filters").wait_for()
    assert page.get_by_role("link", name="New task").count() == 0
    assert token_deployment.viewer not in page.content() + str(page.context.cookies())
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("Token").wait_for()
    page.goto(base_url)
    assert page.url.startswith(f"{base_url}/sign-in")
    assert browser.console_errors == []


def test_expired_session_redirects_to_sign_in(token_deployment, browser):
    page = sign_in(token_deployment, browser, token_deployment.viewer)
    (session,) = [cookie["value"] for cookie in page.context.cookies() if cookie["name"] == "sandbox_session"]
    token_deployment.http.delete("/api/v1/session", headers={"Cookie": f"sandbox_session={session}"}).raise_for_status()
    page.wait_for_url("**/sign-in?to=%2F")
    page.get_by_label("Token").wait_for()


def test_form_draft_survives_an_expired_session(token_deployment, browser):
    page = sign_in(token_deployment, browser, token_deployment.bearer)
    page.goto(f"{token_deployment.server.ready_message['http']}/submit#yaml")
    editor = page.get_by_label("Manifest, YAML")
    page.get_by_text("Describe the task").wait_for()
    page.context.clear_cookies()
    draft = json.dumps({**MINIMAL, "metadata": {"name": "Typed for long", "id": "typed"}})
    editor.fill(draft)
    page.wait_for_url("**/sign-in?to=*")
    page.get_by_label("Token").fill(token_deployment.bearer)
    page.get_by_role("button", name="Sign in").click()
    wait_until(lambda: editor.input_value() == draft, description="the draft to be restored")
    page.get_by_role("button", name="Submit task").click()
    page.wait_for_url("**/tasks/typed")
    page.goto(f"{token_deployment.server.ready_message['http']}/submit")
    assert editor.input_value() != draft
    page.get_by_label("Prompt", exact=True).fill("Not for the next user")
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("Token").fill(token_deployment.bearer)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="Sign out").wait_for()
    page.goto(f"{token_deployment.server.ready_message['http']}/submit")
    assert page.get_by_label("Prompt", exact=True).input_value() == ""


def test_cross_site_requests_with_a_session_are_rejected(token_deployment, browser):
    token_deployment.submit("task-1")
    before = task_ids(token_deployment)
    page = sign_in(token_deployment, browser, token_deployment.bearer)
    manifest = json.dumps({**MINIMAL, "metadata": {"name": "Forged", "id": "task-2"}})
    values = {
        "place": token_deployment.server.ready_message["http"],
        "socket": token_deployment.server.ready_message["ws"],
        "manifest": manifest,
    }
    page.goto("about:blank")  # forget the requests of the previous page
    responses = []
    page.on("response", lambda response: responses.append((response.request.method, response.url, response.status)))
    with other_site(FORGED_REQUESTS_PAGE % values) as address:
        page.goto(address)
        outcomes = page.evaluate("window.outcomes")
    assert set(outcomes) == {"read", "cancel", "submit", "stream", "embed", "events"}
    assert {*outcomes.values()} <= {"refused", "opaque"}
    # The status 403 shows that the cookie was sent; without the cookie, the status would be 401.
    statuses = {(method, status) for method, url, status in responses if url.startswith(values["place"])}
    assert ("POST", 403) in statuses
    assert {status for method, status in statuses if method != "OPTIONS"} == {403}
    assert task_ids(token_deployment) == before
    # The dashboard itself can send the same request.
    with other_site(f'<a href="{values["place"]}/tasks/task-1">the task</a>') as address:
        page.goto(address)
        page.get_by_role("link", name="the task").click()
        page.get_by_role("tab", name="Conversation").wait_for()
    sent = "(body) => fetch('/api/v1/tasks', {method: 'POST', headers: {'Content-Type': 'application/json'}, body})"
    assert page.evaluate(f"async (body) => (await ({sent})(body)).status", manifest) == 202
    assert "task-2" in task_ids(token_deployment)
