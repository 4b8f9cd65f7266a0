"""The client against real sockets: broken streams, server restarts, downloads."""

import asyncio
import gzip
import hashlib
import json
import socket

import httpx2
import pytest

from doubles.fake_api import ApiResponse, FakeApi, error_response, json_response, sse_response
from doubles.sample_task import TASK_ID, task_events, task_status
from sandbox.client import (
    ArtifactTooLargeError,
    ChecksumError,
    ForbiddenError,
    InvalidManifestError,
    InvalidParameterError,
    NotFoundError,
    RateLimitError,
    ServerError,
    TaskNotFoundError,
    UnexpectedResponseError,
    UnreachableError,
)
from sandbox.client.connection_settings import resolve_connection
from sandbox.client.terminal import open_terminal

LOGS_PATH = f"/tasks/{TASK_ID}/logs"


def test_every_request_contains_the_token(api, client):
    client.status(TASK_ID)
    assert api.requests[0].headers["authorization"] == "Bearer secret-token"


@pytest.mark.parametrize("token", ["geheim-ü", "s3cr3t\r", "s3cr3t\n", " s3cr3t", "s3 cr3t"])
def test_invalid_token_is_rejected_without_leaking_it(api, client_class, token, monkeypatch):
    with pytest.raises(InvalidParameterError, match="token") as raised:
        client_class(api.url, token)
    assert token.strip() not in raised.value.message
    monkeypatch.setenv("SANDBOX_TOKEN", token)
    with pytest.raises(InvalidParameterError, match="SANDBOX_TOKEN"):
        client_class(api.url)
    assert api.requests == []


@pytest.mark.parametrize("key", ["schlüssel", "key\r", "key ", "a\nb: c"])
def test_invalid_idempotency_key_is_rejected_before_sending(api, client, key):
    with pytest.raises(InvalidParameterError, match="Idempotency-Key"):
        client.submit(b"x", idempotency_key=key)
    assert api.requests == []


def test_local_protocol_error_raises_invalid_parameter(api, client):
    api.on("POST", "/tasks", json_response({"task_id": TASK_ID}, 202))
    with (
        pytest.raises(InvalidParameterError, match="cannot be sent"),
        resolve_connection(api.url, None, 1).translate_errors(),
    ):
        raise httpx2.LocalProtocolError("Illegal header value")
    assert api.requests == []


def test_manifest_bytes_are_sent_unchanged(api, client):
    api.on("POST", "/tasks", json_response({"task_id": TASK_ID, "state": "pending"}, 202))
    assert client.submit(b"version: '1' # gr\xc3\xbcn\n")["task_id"] == TASK_ID
    request = api.requests_to("POST", "/tasks")[0]
    assert (request.body, request.headers["content-type"]) == (b"version: '1' # gr\xc3\xbcn\n", "application/yaml")


LOST_RESPONSE = ApiResponse(202, [b"{"], {"Content-Length": "100"})


def test_submission_with_a_key_is_retried_after_a_lost_response_or_a_restart(api, client):
    starting = error_response(503, "service_unavailable", "Starting.")
    api.on("POST", "/tasks", LOST_RESPONSE, starting, json_response({"task_id": TASK_ID}, 202))
    assert client.submit(b"x", idempotency_key="k")["task_id"] == TASK_ID
    assert [request.headers["idempotency-key"] for request in api.requests_to("POST", "/tasks")] == ["k"] * 3


def test_submit_generates_one_idempotency_key_per_submission(api, client):
    api.on(
        "POST",
        "/tasks",
        LOST_RESPONSE,
        json_response({"task_id": TASK_ID}, 202),
        json_response({"task_id": "other"}, 202),
    )
    assert [client.submit("x")["task_id"] for _ in range(2)] == [TASK_ID, "other"]
    keys = [request.headers["idempotency-key"] for request in api.requests_to("POST", "/tasks")]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("manifest", "content_type", "body"),
    [
        ("version: '1' # grün\n", "application/yaml", "version: '1' # grün\n".encode()),
        (b"version: '1'\n", "application/yaml", b"version: '1'\n"),
        ({"version": "1", "kind": "Task"}, "application/json", b'{"version": "1", "kind": "Task"}'),
    ],
)
def test_submit_accepts_text_bytes_and_mappings(api, client, manifest, content_type, body):
    api.on("POST", "/tasks", json_response({"task_id": TASK_ID}, 202))
    client.submit(manifest)
    request = api.requests_to("POST", "/tasks")[0]
    assert (request.headers["content-type"], request.body) == (content_type, body)


@pytest.mark.parametrize(("name", "content_type"), [("a.yaml", "application/yaml"), ("a.json", "application/json")])
def test_submit_accepts_a_file(api, client, tmp_path, name, content_type):
    api.on("POST", "/tasks", json_response({"task_id": TASK_ID}, 202))
    (tmp_path / name).write_bytes(b"{}")
    client.submit(tmp_path / name)
    request = api.requests_to("POST", "/tasks")[0]
    assert (request.headers["content-type"], request.body) == (content_type, b"{}")


def test_rejected_submission_is_not_retried(api, client):
    api.on("POST", "/tasks", error_response(503, "service_unavailable", "The server is draining."))
    with pytest.raises(ServerError):
        client.submit(b"x", idempotency_key="k")
    assert len(api.requests_to("POST", "/tasks")) == 1


def test_task_list_sends_only_the_passed_parameters(api, client):
    api.on("GET", "/tasks", json_response({"tasks": [], "total_count": 0}))
    client.tasks(states=["running", "failed"], labels={"team": "a&b=c"}, limit=5, sort="name", order="asc")
    client.tasks()
    expected = {
        "state": ["running,failed"],
        "label.team": ["a&b=c"],
        "limit": ["5"],
        "sort": ["name"],
        "order": ["asc"],
    }
    assert [request.query for request in api.requests_to("GET", "/tasks")] == [expected, {}]


def test_names_cannot_leave_the_path_of_the_url(api, client):
    with pytest.raises(NotFoundError):
        client.status("../../health")
    assert api.requests == []
    with pytest.raises(NotFoundError):
        client.status("health?x=1#y")
    with pytest.raises(NotFoundError):
        client.read("..", "../../health")
    assert [request.path for request in api.requests] == [
        "/tasks/health%3Fx%3D1%23y",
        "/tasks/%2E%2E/artifacts/..%2F..%2Fhealth",
    ]


CALLS = [
    lambda client, text: client.status(text),
    lambda client, text: client.wait(text),
    lambda client, text: client.read(TASK_ID, text),
    lambda client, text: client.tasks(labels={"team": text}),
    lambda client, text: client.cancel(TASK_ID, reason=text),
    lambda client, text: next(client.events(text)),
    lambda client, text: next(client.logs(TASK_ID, since=text)),
]


@pytest.mark.parametrize(("text", "reason"), [("a\udcff", "UTF-8"), ("a" * 70_000, "too long")], ids=["bytes", "long"])
@pytest.mark.parametrize("call", CALLS)
def test_text_that_is_invalid_in_a_url_is_rejected_before_sending(api, client, call, text, reason):
    with pytest.raises(InvalidParameterError, match=reason):
        call(client, text)
    assert api.requests == []


def test_manifest_with_invalid_unicode_is_rejected_by_the_server(api, client):
    api.on("POST", "/tasks", error_response(400, "invalid_manifest", "Not UTF-8."))
    with pytest.raises(InvalidManifestError):
        client.submit("name: a\udcff")


def test_followed_events_arrive_completely(api, client):
    api.on("GET", LOGS_PATH, sse_response(task_events()))
    assert list(client.events(TASK_ID)) == task_events()
    assert api.requests_to("GET", LOGS_PATH)[0].query == {"stream": ["all"], "follow": ["true"]}


def test_broken_stream_resumes_without_loss_or_duplicates(api, client):
    events = task_events()
    truncated_response = ApiResponse(200, [*sse_response(events[3:9]).chunks, b'data: {"type": "output", "seq": 10'])
    api.on(
        "GET",
        LOGS_PATH,
        sse_response(events[:3]),
        truncated_response,
        error_response(503, "service_unavailable", "Starting."),
        sse_response(events[9:]),
    )
    assert list(client.events(TASK_ID, tail=1000, since="2026-01-01T00:00:00Z")) == events
    requests = api.requests_to("GET", LOGS_PATH)
    assert [request.headers.get("last-event-id") for request in requests] == [None, "3", "9", "9"]
    assert [request.query.get("after") for request in requests] == [None, ["3"], ["9"], ["9"]]
    assert [request.query.get("tail") for request in requests] == [["1000"], None, None, None]


def state_messages(*messages):
    """Return a response that streams the states of all tasks. Each message has an id and a state, or only an id."""
    chunks = []
    for identity, state in messages:
        fields = {"type": "state_change", "task_id": TASK_ID, "seq": 1, "timestamp": "2026-01-29T10:10:15.123Z"}
        fields |= {"previous_state": None, "new_state": state, "state_message": ""}
        lines = ([f"id: {identity}"] if identity else []) + ([f"data: {json.dumps(fields)}"] if state else [])
        chunks.append("\n".join([*lines, "", ""]).encode())
    return ApiResponse(200, [b"".join(chunks)], {"Content-Type": "text/event-stream"})


FORBIDDEN_RESPONSE = error_response(403, "forbidden", "The token was removed.")


def states_until_error(client, **options):
    states = []

    def follow():
        for position, event in client.follow_states(**options):
            states.append((position, event["new_state"]))

    with pytest.raises(ForbiddenError):
        follow()
    return states


def test_states_of_all_tasks_are_followed_over_several_connections(api, client):
    api.on(
        "GET",
        "/events",
        state_messages(("a-1", None), (None, "completed"), ("a-2", "pending"), (None, "failed")),
        error_response(503, "service_unavailable", "Starting."),
        state_messages(("a-2", None)),
        state_messages(("b-0", None), ("b-1", "failed")),
        FORBIDDEN_RESPONSE,
    )
    assert states_until_error(client) == [
        ("a-1", "completed"),
        ("a-2", "pending"),
        ("a-2", "failed"),
        ("b-1", "failed"),
    ]
    sent = [request.headers.get("last-event-id") for request in api.requests_to("GET", "/events")]
    assert sent == [None, "a-2", "a-2", "a-2", "b-1"]


def test_states_are_followed_from_a_position(api, client):
    api.on("GET", "/events", state_messages(("a-7", None)), state_messages(("a-8", "running")), FORBIDDEN_RESPONSE)
    assert states_until_error(client, after="a-7") == [("a-8", "running")]
    sent = [request.headers.get("last-event-id") for request in api.requests_to("GET", "/events")]
    assert sent == ["a-7", "a-7", "a-8"]


def test_error_of_the_first_connection_is_not_retried(api, client):
    api.on("GET", "/events", error_response(503, "service_unavailable", "Starting."))
    with pytest.raises(ServerError):
        next(client.follow_states())
    assert len(api.requests_to("GET", "/events")) == 1


def test_repeatedly_broken_stream_raises_unreachable(api, client):
    api.on("GET", LOGS_PATH, ApiResponse(200, []))
    with pytest.raises(UnreachableError, match="closed the stream"):
        list(client.events(TASK_ID))
    assert len(api.requests_to("GET", LOGS_PATH)) == 6


def test_idle_stream_survives_connections_closed_by_a_proxy(api, client):
    keep_alives = [ApiResponse(200, [b": keep-alive\n\n"])] * 20
    api.on("GET", LOGS_PATH, *keep_alives, sse_response(task_events()))
    assert list(client.events(TASK_ID)) == task_events()


def test_status_204_ends_the_event_stream(api, client):
    api.on("GET", LOGS_PATH, ApiResponse(204))
    assert list(client.events(TASK_ID, after=99)) == []


def test_unknown_task_raises_not_found(api, client):
    with pytest.raises(NotFoundError):
        next(client.events("other"))
    with pytest.raises(NotFoundError):
        client.wait("other")


def test_wait_survives_a_server_restart(api, client):
    responses = [
        json_response(task_status("running")),
        error_response(503, "service_unavailable", "Stopping."),
        json_response(task_status("completed")),
    ]
    api.on("GET", f"/tasks/{TASK_ID}/wait", *responses)
    assert client.wait(TASK_ID)["state"] == "completed"


def test_wait_returns_after_its_timeout(api, client):
    api.on("GET", f"/tasks/{TASK_ID}/wait", json_response(task_status("running")))
    assert client.wait(TASK_ID, timeout_seconds=0.3)["state"] == "running"
    assert float(api.requests_to("GET", f"/tasks/{TASK_ID}/wait")[0].query["timeout"][0]) <= 0.3


def test_download_is_verified(api, client, tmp_path):
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    api.on(
        "GET",
        f"/tasks/{TASK_ID}/artifacts/docs%2Fa.md",
        ApiResponse(200, [b"by", b"tes"], {"X-Checksum-SHA256": sha256}),
    )
    assert client.download(TASK_ID, "docs/a.md", tmp_path / "a.md") == 5
    assert (tmp_path / "a.md").read_bytes() == b"bytes"


def test_modified_download_raises_checksum_error(api, client, tmp_path):
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    api.on("GET", f"/tasks/{TASK_ID}/artifacts/a.md", ApiResponse(200, [b"evil!"], {"X-Checksum-SHA256": sha256}))
    with pytest.raises(ChecksumError):
        client.download(TASK_ID, "a.md", tmp_path / "a.md")
    assert list(tmp_path.iterdir()) == []


def test_truncated_download_raises_unreachable(api, client, tmp_path):
    sha256 = hashlib.sha256(b"by").hexdigest()
    response = ApiResponse(200, [b"by"], {"X-Checksum-SHA256": sha256, "Content-Length": "5"})
    api.on("GET", f"/tasks/{TASK_ID}/artifacts/a.md", response)
    with pytest.raises(UnreachableError, match="was lost"):
        client.download(TASK_ID, "a.md", tmp_path / "a.md")
    assert list(tmp_path.iterdir()) == []


def test_foreign_http_server_is_detected(api, client):
    api.on("GET", "/tasks", ApiResponse(200, [b"<html>hello</html>"]))
    with pytest.raises(ServerError, match="unexpected response"):
        client.tasks()


def test_unreachable_server_error_suggests_the_serve_command(client_class):
    with FakeApi().running() as api:
        url = api.url
    with client_class(url) as client, pytest.raises(UnreachableError) as raised:
        client.status(TASK_ID)
    assert raised.value.message == f"Cannot reach {url}. Is the server running? Start it with: sandbox serve"


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (socket.gaierror(-2, "Name or service not known"), ": the name sandbox.invalid cannot be resolved"),
        (ConnectionRefusedError(111, "Connection refused"), ": the connection was refused"),
        (ExceptionGroup("x", [ConnectionRefusedError(111, "Connection refused")]), ": the connection was refused"),
        (OSError(113, "No route to host"), ""),
    ],
)
def test_unreachable_remote_server_error_suggests_checking_the_address(cause, reason):
    server = "https://sandbox.invalid:8122"
    with pytest.raises(UnreachableError) as raised, resolve_connection(server, None, 1).translate_errors():
        raise httpx2.ConnectError("no connection") from cause
    assert raised.value.message == f"Cannot reach {server}{reason}. Check --server or the context."


def test_connection_defaults_come_from_the_environment(api, client_class, monkeypatch):
    monkeypatch.setenv("SANDBOX_SERVER", api.url)
    monkeypatch.setenv("SANDBOX_TOKEN", "from-environment")
    api.on("GET", "/tasks", json_response({"tasks": [], "next_cursor": None}))
    with client_class() as client:
        client.tasks()
    with client_class(api.url, "explicit") as client:
        client.tasks()
    assert [request.headers["authorization"] for request in api.requests] == [
        "Bearer from-environment",
        "Bearer explicit",
    ]


def test_uppercase_url_scheme_is_accepted(api, client_class):
    api.on("GET", "/tasks", json_response({"tasks": [], "next_cursor": None}))
    with client_class(api.url.replace("http", "HTTP")) as client:
        assert client.tasks()["tasks"] == []


async def test_terminal_accepts_an_uppercase_url_scheme(api):
    async def open_and_close():
        async with open_terminal(api.url.replace("http", "HTTP"), None, "other"):
            pass

    with pytest.raises(TaskNotFoundError):  # the fake API does not have the terminal
        await open_and_close()
    assert api.requests[0].path == "/tasks/other/terminal"


@pytest.mark.parametrize("location", ["/elsewhere", "ws://127.0.0.2:9/elsewhere"])
async def test_terminal_follows_no_redirect(location):
    paths = []

    async def redirect(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        paths.append(head.split()[1].decode())
        writer.write(b"HTTP/1.1 307 Elsewhere\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % location.encode())
        await writer.drain()
        writer.close()

    async def open_redirected():
        async with await asyncio.start_server(redirect, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with open_terminal(f"http://127.0.0.1:{port}", "token", "other"):
                pass

    with pytest.raises(UnexpectedResponseError, match="HTTP 307"):
        await open_redirected()
    assert paths == ["/api/v1/tasks/other/terminal"]


def test_status_has_a_lower_size_limit_than_a_list(api, client):
    """Parsed JSON needs up to 35 times as much memory as its text."""
    page = {"tasks": [], "next_cursor": None, "id": "other", "state": "completed"}
    body = [b" " * 1024**2] * 17 + [json.dumps(page).encode()]
    api.on("GET", "/tasks", ApiResponse(200, body))
    api.on("GET", "/tasks/other", ApiResponse(200, body), ApiResponse(200, body[3:]))
    assert client.tasks()["tasks"] == []
    with pytest.raises(UnexpectedResponseError, match="unexpected response"):
        client.status("other")
    assert client.status("other")["id"] == "other"


def test_oversized_response_is_rejected(api, client, monkeypatch):
    monkeypatch.setattr("sandbox.client.requests.LIST_BYTES_MAX", 1000)
    page = {"tasks": [], "next_cursor": None}
    blanks = b" " * 10_000
    api.on("GET", "/tasks", json_response(page), ApiResponse(200, [blanks] * 100 + [json.dumps(page).encode()]))
    assert client.tasks()["tasks"] == []
    with pytest.raises(UnexpectedResponseError, match="unexpected response"):
        client.tasks()


def test_response_compressed_twice_is_rejected(api, client):
    page = json.dumps({"tasks": [], "next_cursor": None}).encode()
    once, twice = gzip.compress(page), gzip.compress(gzip.compress(page))
    api.on(
        "GET",
        "/tasks",
        ApiResponse(200, [once], {"Content-Encoding": "gzip"}),
        ApiResponse(200, [twice], {"Content-Encoding": "gzip, gzip"}),
        ApiResponse(500, [twice], {"Content-Encoding": "gzip, gzip"}),
    )
    assert client.tasks()["tasks"] == []
    for _ in range(2):
        with pytest.raises(UnexpectedResponseError, match="unexpected response"):
            client.tasks()


def test_all_tasks_method_follows_the_page_cursor(api, client):
    pages = [{"tasks": [{"id": "a"}, {"id": "b"}], "next_cursor": "x"}, {"tasks": [{"id": "c"}], "next_cursor": None}]
    api.on("GET", "/tasks", *map(json_response, pages))
    assert [task["id"] for task in client.all_tasks(states=["running"])] == ["a", "b", "c"]
    assert [request.query.get("cursor") for request in api.requests_to("GET", "/tasks")] == [None, ["x"]]


def test_log_lines_are_reassembled_across_chunks(api, client):
    api.on("GET", LOGS_PATH, ApiResponse(200, [b"[t] [STDOUT] o", b"ne\n[t] [STDERR] two\n", b"[t] [STDOUT] three"]))
    assert list(client.logs(TASK_ID)) == [b"[t] [STDOUT] one\n", b"[t] [STDERR] two\n", b"[t] [STDOUT] three\n"]


def test_read_verifies_the_artifact(api, client):
    path = f"/tasks/{TASK_ID}/artifacts/a.md"
    headers = {"X-Checksum-SHA256": hashlib.sha256(b"bytes").hexdigest()}
    api.on(
        "GET",
        path,
        ApiResponse(200, [b"by", b"tes"], headers),
        ApiResponse(200, [b"evil!"], headers),
        ApiResponse(200, [b"bytes"], headers),
    )
    assert client.read(TASK_ID, "a.md") == b"bytes"
    with pytest.raises(ChecksumError):
        client.read(TASK_ID, "a.md")
    with pytest.raises(ArtifactTooLargeError, match="more than 4 bytes"):
        client.read(TASK_ID, "a.md", bytes_max=4)


def test_rate_limit_error_has_retry_after_seconds(api, client):
    refusal = error_response(429, "rate_limit_exceeded", "Too many.")
    api.on("GET", "/tasks", ApiResponse(429, refusal.chunks, {**refusal.headers, "Retry-After": "7"}))
    with pytest.raises(RateLimitError) as raised:
        client.tasks()
    assert raised.value.retry_after_seconds == 7


def test_deprecated_method_returns_the_drain_status_and_warns(api, client):
    body = {"draining": True, "since": "2026-01-29T00:00:00.000Z", "running": 1, "waiting": 2}
    api.on("GET", "/admin/drain", json_response(body), json_response(body))
    assert client.drain_status() == body
    with pytest.warns(DeprecationWarning, match=r"Client\.draining is deprecated; use drain_status\."):
        assert client.draining() == body
