"""On a server with tokens somebody signs in with one, once."""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest

from doubles.browser import shut_out
from doubles.live_server import ORGANISATION, World, until
from sandbox.auth.token_file import TokenFile
from sandbox.interfaces.auth import Role

MINIMAL = {
    "version": "1",
    "kind": "Task",
    "repository": {"url": f"{ORGANISATION}repo.git", "branch": "main"},
    "claude": {"prompt": "Do it."},
}
FORGED = """<!doctype html><title>forged</title>
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
    picture.onload = () => done("shown");
    picture.onerror = () => done("refused");
    picture.src = "%(place)s/assets/icon.svg";
  }),
  events: () => new Promise((done) => {
    const source = new EventSource("%(place)s/api/v1/tasks/stream?task_id=task-1", {withCredentials: true});
    source.onopen = () => done("open");
    source.onerror = () => { source.close(); done("refused"); };
  }),
};
window.came_of_it = (async () => {
  document.getElementById("form").submit();
  const found = {};
  for (const [name, attempt] of Object.entries(tries)) found[name] = await attempt().catch(() => "refused");
  return found;
})();
</script>"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with two tokens, `bearer` an operator's and `viewer` a viewer's; none of its tasks can complete."""
    world = World(tmp_path_factory.mktemp("guarded"))
    try:
        world.data_dir.mkdir(mode=0o700)
        tokens = TokenFile(world.data_dir)
        world.bearer, world.viewer = (tokens.create(role, "bob")[0] for role in (Role.OPERATOR, Role.VIEWER))
        configuration = world.home / ".config" / "sandbox" / "sandbox.toml"
        configuration.parent.mkdir(parents=True)
        configuration.write_text('[git]\nallowed_hosts = ["github.com"]\n')
        world.model_url = "http://127.0.0.1:9"
        (world.home / ".gitconfig").write_text(f'[url "{world.model_url}/"]\n\tinsteadOf = {ORGANISATION}\n')
        world.start_server()
        yield world
    finally:
        world.close()


def sign_in(world, browser, token):
    page = browser.open(f"{world.server.said['http']}/sign-in")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="Sign out").wait_for()
    return page


@contextmanager
def other_site(html):
    """A page of somebody else's on this machine: a browser takes it for the same site, cookies and all."""

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


def task_ids(world):
    return [task["id"] for task in world.http.get("/api/v1/tasks").json()["tasks"]]


def test_a_token_is_shown_once_and_signing_out_ends_it(guarded, browser):
    place = guarded.server.said["http"]
    page = browser.open(f"{place}/?state=completed")
    assert page.url == f"{place}/sign-in?to=%2F%3Fstate%3Dcompleted"
    assert shut_out(page) == []
    page.get_by_label("Token").fill("sbx_wrong")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("This token is not known here.").wait_for()
    assert shut_out(page) == []
    browser.forgive("status of 401")
    page.get_by_label("Token").fill(guarded.viewer)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(f"{place}/?state=completed")
    page.get_by_text("No task fits these filters").wait_for()
    assert page.get_by_role("link", name="New task").count() == 0
    assert guarded.viewer not in page.content() + str(page.context.cookies())
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("Token").wait_for()
    page.goto(place)
    assert page.url.startswith(f"{place}/sign-in")
    assert browser.complaints == []


def test_a_page_whose_session_has_ended_leads_back_to_signing_in(guarded, browser):
    page = sign_in(guarded, browser, guarded.viewer)
    (session,) = [cookie["value"] for cookie in page.context.cookies() if cookie["name"] == "sandbox_session"]
    guarded.http.delete("/api/v1/session", headers={"Cookie": f"sandbox_session={session}"}).raise_for_status()
    page.wait_for_url("**/sign-in?to=%2F")
    page.get_by_label("Token").wait_for()


def test_what_was_typed_into_the_form_outlives_a_session(guarded, browser):
    page = sign_in(guarded, browser, guarded.bearer)
    page.goto(f"{guarded.server.said['http']}/submit")
    editor = page.get_by_label("Manifest, YAML")
    page.get_by_text("The server would take this manifest.").wait_for()
    page.context.clear_cookies()
    typed = json.dumps({**MINIMAL, "metadata": {"name": "Typed for long", "id": "typed"}})
    editor.fill(typed)
    page.wait_for_url("**/sign-in?to=*")
    page.get_by_label("Token").fill(guarded.bearer)
    page.get_by_role("button", name="Sign in").click()
    until(lambda: editor.input_value() == typed, what="the page to give back what was typed")
    page.get_by_role("button", name="Submit task").click()
    page.wait_for_url("**/tasks/typed")
    page.goto(f"{guarded.server.said['http']}/submit")
    assert editor.input_value() != typed


def test_a_page_of_another_site_does_nothing_in_the_name_of_who_is_signed_in(guarded, browser):
    guarded.submit("task-1")
    before = task_ids(guarded)
    page = sign_in(guarded, browser, guarded.bearer)
    manifest = json.dumps({**MINIMAL, "metadata": {"name": "Forged", "id": "task-2"}})
    given = {"place": guarded.server.said["http"], "socket": guarded.server.said["ws"], "manifest": manifest}
    page.goto("about:blank")  # what the page before asked for is nobody's forgery
    answers = []
    page.on("response", lambda answer: answers.append((answer.request.method, answer.url, answer.status)))
    with other_site(FORGED % given) as address:
        page.goto(address)
        came_of_it = page.evaluate("window.came_of_it")
    assert set(came_of_it) == {"read", "cancel", "submit", "stream", "embed", "events"}
    assert {*came_of_it.values()} <= {"refused", "opaque"}
    # Forbidden is said to those who have the cookie; without it they would be unknown.
    asked = {(method, status) for method, url, status in answers if url.startswith(given["place"])}
    assert ("POST", 403) in asked
    assert {status for method, status in asked if method != "OPTIONS"} == {403}
    assert task_ids(guarded) == before
    # The same, asked by a page of the server's own.
    with other_site(f'<a href="{given["place"]}/tasks/task-1">the task</a>') as address:
        page.goto(address)
        page.get_by_role("link", name="the task").click()
        page.get_by_role("tab", name="Conversation").wait_for()
    sent = "(body) => fetch('/api/v1/tasks', {method: 'POST', headers: {'Content-Type': 'application/json'}, body})"
    assert page.evaluate(f"async (body) => (await ({sent})(body)).status", manifest) == 202
    assert "task-2" in task_ids(guarded)
