"""The client against real sockets: streams that break, servers that go and come back, downloads."""

import asyncio
import hashlib

import httpx
import pytest

from doubles.recorded_api import Answer, RecordedApi, of_error, of_frames, of_json
from doubles.recorded_task import TASK, frames, status
from sandbox.client import (
    ChecksumError,
    InvalidManifestError,
    InvalidParameterError,
    NotFoundError,
    RateLimitError,
    ServerError,
    TooLargeError,
    UnreachableError,
)
from sandbox.client.connection import resolve_connection
from sandbox.client.terminal import open_terminal

LOGS = f"/tasks/{TASK}/logs"


def test_every_request_brings_the_token(api, client):
    client.status(TASK)
    assert api.asked[0].headers["authorization"] == "Bearer secret-token"


@pytest.mark.parametrize("token", ["geheim-ü", "s3cr3t\r", "s3cr3t\n", " s3cr3t", "s3 cr3t"])
def test_a_token_that_no_request_can_bring_is_refused_at_once_and_not_told(api, client_class, token, monkeypatch):
    with pytest.raises(InvalidParameterError, match="token") as caught:
        client_class(api.url, token)
    assert token.strip() not in caught.value.message
    monkeypatch.setenv("SANDBOX_TOKEN", token)
    with pytest.raises(InvalidParameterError, match="SANDBOX_TOKEN"):
        client_class(api.url)
    assert api.asked == []


@pytest.mark.parametrize("key", ["schlüssel", "key\r", "key ", "a\nb: c"])
def test_a_key_that_no_request_can_bring_is_refused_at_once(api, client, key):
    with pytest.raises(InvalidParameterError, match="Idempotency-Key"):
        client.submit(b"x", idempotency_key=key)
    assert api.asked == []


def test_what_cannot_be_sent_is_no_broken_connection(api, client):
    api.on("POST", "/tasks", of_json({"task_id": TASK}, 202))
    with (
        pytest.raises(InvalidParameterError, match="cannot be sent"),
        resolve_connection(api.url, None, 1).translate_errors(),
    ):
        raise httpx.LocalProtocolError("Illegal header value")
    assert api.asked == []


def test_a_manifest_arrives_as_the_bytes_that_it_is(api, client):
    api.on("POST", "/tasks", of_json({"task_id": TASK, "state": "pending"}, 202))
    assert client.submit(b"version: '1' # gr\xc3\xbcn\n")["task_id"] == TASK
    asked = api.to("POST", "/tasks")[0]
    assert (asked.body, asked.headers["content-type"]) == (b"version: '1' # gr\xc3\xbcn\n", "application/yaml")


LOST = Answer(202, [b"{"], {"Content-Length": "100"})


def test_a_submission_with_a_key_outlasts_a_connection_that_breaks_and_a_server_that_starts_again(api, client):
    starting = of_error(503, "service_unavailable", "Starting.")
    api.on("POST", "/tasks", LOST, starting, of_json({"task_id": TASK}, 202))
    assert client.submit(b"x", idempotency_key="k")["task_id"] == TASK
    assert [asked.headers["idempotency-key"] for asked in api.to("POST", "/tasks")] == ["k"] * 3


def test_a_submission_has_a_key_of_its_own_so_that_a_lost_answer_makes_no_second_task(api, client):
    api.on("POST", "/tasks", LOST, of_json({"task_id": TASK}, 202), of_json({"task_id": "other"}, 202))
    assert [client.submit("x")["task_id"] for _ in range(2)] == [TASK, "other"]
    keys = [asked.headers["idempotency-key"] for asked in api.to("POST", "/tasks")]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("given", "content_type", "body"),
    [
        ("version: '1' # grün\n", "application/yaml", "version: '1' # grün\n".encode()),
        (b"version: '1'\n", "application/yaml", b"version: '1'\n"),
        ({"version": "1", "kind": "Task"}, "application/json", b'{"version": "1", "kind": "Task"}'),
    ],
)
def test_a_manifest_may_be_text_bytes_or_data(api, client, given, content_type, body):
    api.on("POST", "/tasks", of_json({"task_id": TASK}, 202))
    client.submit(given)
    asked = api.to("POST", "/tasks")[0]
    assert (asked.headers["content-type"], asked.body) == (content_type, body)


@pytest.mark.parametrize(("name", "content_type"), [("a.yaml", "application/yaml"), ("a.json", "application/json")])
def test_a_manifest_may_be_a_file(api, client, tmp_path, name, content_type):
    api.on("POST", "/tasks", of_json({"task_id": TASK}, 202))
    (tmp_path / name).write_bytes(b"{}")
    client.submit(tmp_path / name)
    asked = api.to("POST", "/tasks")[0]
    assert (asked.headers["content-type"], asked.body) == (content_type, b"{}")


def test_a_refusal_of_a_submission_is_final(api, client):
    api.on("POST", "/tasks", of_error(503, "service_unavailable", "It drains."))
    with pytest.raises(ServerError):
        client.submit(b"x", idempotency_key="k")
    assert len(api.to("POST", "/tasks")) == 1


def test_a_list_is_asked_for_with_what_was_given_and_nothing_else(api, client):
    api.on("GET", "/tasks", of_json({"tasks": [], "total_count": 0}))
    client.tasks(states=["running", "failed"], labels={"team": "a&b=c"}, limit=5, sort="name", order="asc")
    client.tasks()
    expected = {
        "state": ["running,failed"],
        "label.team": ["a&b=c"],
        "limit": ["5"],
        "sort": ["name"],
        "order": ["asc"],
    }
    assert [asked.query for asked in api.to("GET", "/tasks")] == [expected, {}]


def test_names_cannot_leave_their_place_in_the_address(api, client):
    with pytest.raises(NotFoundError):
        client.status("../../health")
    assert api.asked == []
    with pytest.raises(NotFoundError):
        client.status("health?x=1#y")
    with pytest.raises(NotFoundError):
        client.read("..", "../../health")
    assert [asked.path for asked in api.asked] == [
        "/tasks/health%3Fx%3D1%23y",
        "/tasks/%2E%2E/artifacts/..%2F..%2Fhealth",
    ]


ASKING = [
    lambda client, text: client.status(text),
    lambda client, text: client.wait(text),
    lambda client, text: client.read(TASK, text),
    lambda client, text: client.tasks(labels={"team": text}),
    lambda client, text: client.cancel(TASK, reason=text),
    lambda client, text: next(client.events(text)),
    lambda client, text: next(client.logs(TASK, since=text)),
]


@pytest.mark.parametrize(("text", "reason"), [("a\udcff", "UTF-8"), ("a" * 70_000, "too long")], ids=["bytes", "long"])
@pytest.mark.parametrize("ask", ASKING)
def test_what_no_address_can_hold_is_refused_at_once(api, client, ask, text, reason):
    with pytest.raises(InvalidParameterError, match=reason):
        ask(client, text)
    assert api.asked == []


def test_a_manifest_that_is_no_text_is_left_for_the_server_to_refuse(api, client):
    api.on("POST", "/tasks", of_error(400, "invalid_manifest", "Not UTF-8."))
    with pytest.raises(InvalidManifestError):
        client.submit("name: a\udcff")


def test_a_followed_story_arrives_whole(api, client):
    api.on("GET", LOGS, of_frames(frames()))
    assert list(client.events(TASK)) == frames()
    assert api.to("GET", LOGS)[0].query == {"stream": ["all"], "follow": ["true"]}


def test_a_broken_stream_is_resumed_where_it_broke_without_loss_or_doubling(api, client):
    told = frames()
    half_an_event = Answer(200, [*of_frames(told[3:9]).chunks, b'data: {"type": "output", "seq": 10'])
    api.on(
        "GET", LOGS,
        of_frames(told[:3]), half_an_event, of_error(503, "service_unavailable", "Starting."), of_frames(told[9:]),
    )  # fmt: skip
    assert list(client.events(TASK, tail=1000, since="2026-01-01T00:00:00Z")) == told
    asked = api.to("GET", LOGS)
    assert [one.headers.get("last-event-id") for one in asked] == [None, "3", "9", "9"]
    assert [one.query.get("after") for one in asked] == [None, ["3"], ["9"], ["9"]]
    assert [one.query.get("tail") for one in asked] == [["1000"], None, None, None]


def test_a_stream_that_breaks_again_and_again_is_given_up(api, client):
    api.on("GET", LOGS, Answer(200, []))
    with pytest.raises(UnreachableError, match="closed the stream"):
        list(client.events(TASK))
    assert len(api.to("GET", LOGS)) == 6


def test_a_quiet_story_outlasts_all_the_connections_that_a_proxy_closes(api, client):
    quiet = [Answer(200, [b": keep-alive\n\n"])] * 20
    api.on("GET", LOGS, *quiet, of_frames(frames()))
    assert list(client.events(TASK)) == frames()


def test_a_story_that_has_been_told_to_its_end_is_over(api, client):
    api.on("GET", LOGS, Answer(204))
    assert list(client.events(TASK, after=99)) == []


def test_a_task_that_does_not_exist_is_not_waited_for(api, client):
    with pytest.raises(NotFoundError):
        next(client.events("other"))
    with pytest.raises(NotFoundError):
        client.wait("other")


def test_waiting_outlasts_a_server_that_is_restarted(api, client):
    answers = [
        of_json(status("running")),
        of_error(503, "service_unavailable", "Stopping."),
        of_json(status("completed")),
    ]
    api.on("GET", f"/tasks/{TASK}/wait", *answers)
    assert client.wait(TASK)["state"] == "completed"


def test_waiting_ends_when_its_time_is_over(api, client):
    api.on("GET", f"/tasks/{TASK}/wait", of_json(status("running")))
    assert client.wait(TASK, timeout_seconds=0.3)["state"] == "running"
    assert float(api.to("GET", f"/tasks/{TASK}/wait")[0].query["timeout"][0]) <= 0.3


def test_a_download_is_verified(api, client, tmp_path):
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    api.on("GET", f"/tasks/{TASK}/artifacts/docs%2Fa.md", Answer(200, [b"by", b"tes"], {"X-Checksum-SHA256": sha256}))
    assert client.download(TASK, "docs/a.md", tmp_path / "a.md") == 5
    assert (tmp_path / "a.md").read_bytes() == b"bytes"


def test_a_download_that_was_changed_on_the_way_is_refused(api, client, tmp_path):
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    api.on("GET", f"/tasks/{TASK}/artifacts/a.md", Answer(200, [b"evil!"], {"X-Checksum-SHA256": sha256}))
    with pytest.raises(ChecksumError):
        client.download(TASK, "a.md", tmp_path / "a.md")
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_is_refused(api, client, tmp_path):
    sha256 = hashlib.sha256(b"by").hexdigest()
    answer = Answer(200, [b"by"], {"X-Checksum-SHA256": sha256, "Content-Length": "5"})
    api.on("GET", f"/tasks/{TASK}/artifacts/a.md", answer)
    with pytest.raises(UnreachableError, match="broke"):
        client.download(TASK, "a.md", tmp_path / "a.md")
    assert list(tmp_path.iterdir()) == []


def test_another_program_on_the_port_is_told_apart_from_a_sandbox_server(api, client):
    api.on("GET", "/tasks", Answer(200, [b"<html>hello</html>"]))
    with pytest.raises(ServerError, match="not Sandbox's"):
        client.tasks()


def test_nobody_on_the_port_says_how_to_start_a_server(client_class):
    with RecordedApi().running() as api:
        url = api.url
    with client_class(url) as client, pytest.raises(UnreachableError) as caught:
        client.status(TASK)
    assert caught.value.message == f"Cannot reach {url}. Is the server running? Start it with: sandbox serve"


def test_without_arguments_the_environment_says_where_the_server_is(api, client_class, monkeypatch):
    monkeypatch.setenv("SANDBOX_SERVER", api.url)
    monkeypatch.setenv("SANDBOX_TOKEN", "of-the-environment")
    api.on("GET", "/tasks", of_json({"tasks": [], "next_cursor": None}))
    with client_class() as client:
        client.tasks()
    with client_class(api.url, "given") as client:
        client.tasks()
    assert [asked.headers["authorization"] for asked in api.asked] == ["Bearer of-the-environment", "Bearer given"]


def test_a_scheme_may_be_written_large(api, client_class):
    api.on("GET", "/tasks", of_json({"tasks": [], "next_cursor": None}))
    with client_class(api.url.replace("http", "HTTP")) as client:
        assert client.tasks()["tasks"] == []


def test_a_terminal_is_asked_for_with_a_scheme_that_is_written_large(api):
    async def ask():
        async with open_terminal(api.url.replace("http", "HTTP"), None, "other"):
            pass

    with pytest.raises(UnreachableError):  # what answers there opens no terminals
        asyncio.run(ask())
    assert api.asked[0].path == "/tasks/other/terminal"


def test_all_tasks_come_page_after_page(api, client):
    pages = [{"tasks": [{"id": "a"}, {"id": "b"}], "next_cursor": "x"}, {"tasks": [{"id": "c"}], "next_cursor": None}]
    api.on("GET", "/tasks", *map(of_json, pages))
    assert [task["id"] for task in client.all_tasks(states=["running"])] == ["a", "b", "c"]
    assert [asked.query.get("cursor") for asked in api.to("GET", "/tasks")] == [None, ["x"]]


def test_the_lines_of_a_log_are_whole_however_the_network_cut_them(api, client):
    api.on("GET", LOGS, Answer(200, [b"[t] [STDOUT] o", b"ne\n[t] [STDERR] two\n", b"[t] [STDOUT] three"]))
    assert list(client.logs(TASK)) == [b"[t] [STDOUT] one\n", b"[t] [STDERR] two\n", b"[t] [STDOUT] three\n"]


def test_a_small_artifact_is_read_and_verified(api, client):
    path = f"/tasks/{TASK}/artifacts/a.md"
    good = {"X-Checksum-SHA256": hashlib.sha256(b"bytes").hexdigest()}
    api.on(
        "GET", path, Answer(200, [b"by", b"tes"], good), Answer(200, [b"evil!"], good), Answer(200, [b"bytes"], good)
    )
    assert client.read(TASK, "a.md") == b"bytes"
    with pytest.raises(ChecksumError):
        client.read(TASK, "a.md")
    with pytest.raises(TooLargeError, match="more than 4 bytes"):
        client.read(TASK, "a.md", bytes_max=4)


def test_a_pause_that_the_server_asks_for_is_told(api, client):
    refusal = of_error(429, "rate_limit_exceeded", "Too many.")
    api.on("GET", "/tasks", Answer(429, refusal.chunks, {**refusal.headers, "Retry-After": "7"}))
    with pytest.raises(RateLimitError) as caught:
        client.tasks()
    assert caught.value.retry_after_seconds == 7
