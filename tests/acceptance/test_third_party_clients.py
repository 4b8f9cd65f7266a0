"""Existing HTTP and WebSocket clients submit tasks and receive complete event streams."""

import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import pytest

from doubles.live_server import TERMINAL, bash, reply, wait_until
from doubles.third_party_clients import (
    UNKNOWN_BRANCH_MANIFEST,
    WSCAT,
    BrowserWebSocket,
    Curl,
    EventSource,
    Httpx,
    Requests,
    Websockets,
    Wscat,
)
from sandbox.demo.model_script import Fault, Turn

COUNT = "for i in $(seq 1 {n}); do echo line-$i >> count.txt; sleep 0.1; done"
STATES = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Unset proxy variables, which these clients use."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def check_live_events(deployment, task_id, frames, started_clients):
    """Yield the frames; the first output must arrive before the task ends, and adds to `started_clients`."""
    last_seq, has_output = 0, False
    for frame in frames:
        if frame["type"] == "output" and not has_output:
            has_output = True
            assert deployment.status(task_id)["state"] not in TERMINAL
            started_clients.append(task_id)
        assert frame["seq"] > last_seq, "duplicate event"
        last_seq = frame["seq"]
        yield frame


def read_until_output(frames):
    received = [next(frames)]
    while received[-1]["type"] != "output":
        received.append(next(frames))
    return received


def check_complete_events(deployment, task_id, frames, *, missing_types=()):
    """missing_types: event types that this kind of stream does not have."""
    seqs = [frame["seq"] for frame in frames]
    assert seqs == sorted(set(seqs))
    assert [frame["type"] for frame in frames].index("end") == len(frames) - 1
    assert [frame["new_state"] for frame in frames if frame["type"] == "state_change"] == STATES, (
        deployment.diagnostics(task_id)
    )
    output = "".join(frame["data"] for frame in frames if frame["type"] == "output")
    assert output.encode() == deployment.artifact("transcript.ndjson", task_id)
    logged = [frame for frame in deployment.wire_events(task_id) if frame["type"] not in missing_types]
    logged_seqs = {frame["seq"] for frame in logged}
    assert [frame for frame in frames if frame["seq"] in logged_seqs] == logged


def test_existing_clients_submit_and_receive_complete_streams(deploy, browser):
    deployment = deploy(bash(COUNT.format(n=10)), reply())
    http, ws = deployment.server.ready_message["http"], deployment.server.ready_message["ws"]
    page, socket_page = EventSource(http, browser), BrowserWebSocket(http, browser)
    programs = [Requests(http), Httpx(http), Curl(http)]
    task_id = follow_all(deployment, programs, page, socket_page, [ws, http.replace("http:", "ws:")])
    assert page.statuses(task_id) == [200, 204]
    for client in (*programs, page):
        assert "+line-10\n" in client.download(f"/tasks/{task_id}/artifacts/{task_id}.patch")


def follow_all(deployment, programs, page, socket_page, base_urls):
    """All clients follow the first task, through WebSockets on both ports too, and then submit one each."""
    first, *others = programs
    with ThreadPoolExecutor(max_workers=10) as pool:
        with deployment.paused_model():  # until all clients have started
            submission = first.submit()
            task_id, started_clients = submission["task_id"], []
            addresses = [f"{base_url}/api/v1/tasks/stream?task_id={task_id}&after=0" for base_url in base_urls]
            events = [
                pool.submit(
                    lambda member=member: list(
                        check_live_events(deployment, task_id, member.follow(task_id), started_clients)
                    )
                )
                for member in programs
            ]
            by_socket = [
                pool.submit(
                    lambda member=member, address=address: list(
                        check_live_events(deployment, task_id, member.frames(member.open(address)), started_clients)
                    )
                )
                for member in (Websockets(None), *wscats())
                for address in addresses
            ]
            sockets = [socket_page.open(address) for address in addresses]
            page_events = check_live_events(deployment, task_id, page.follow(task_id), started_clients)
            socket_events = check_live_events(deployment, task_id, socket_page.frames(sockets[0]), started_clients)
            first_events = [read_until_output(page_events), read_until_output(socket_events)]
            wait_until(
                lambda: len(started_clients) == len([*first_events, *events, *by_socket]),
                60,
                "output for all clients",
            )
        remaining_events = zip(*zip_longest(page_events, socket_events), strict=True)
        page_events, socket_events = (
            received + list(filter(None, rest)) for received, rest in zip(first_events, remaining_events, strict=True)
        )
        streams = [page_events, *(member.result(60) for member in events)]
        pushes = [socket_events, list(socket_page.frames(sockets[1])), *(member.result(60) for member in by_socket)]
    check_all_complete(deployment, task_id, streams, pushes)
    submissions = [submission, *(member.submit(UNKNOWN_BRANCH_MANIFEST) for member in (*others, page))]
    assert [member["state"] for member in submissions] == ["pending"] * 4
    return task_id


def check_all_complete(deployment, task_id, streams, pushed_events):
    for received in streams:
        check_complete_events(deployment, task_id, received)
        assert {"output", "tool_call", "usage"} <= {frame["type"] for frame in received}
    for received in pushed_events:
        check_complete_events(deployment, task_id, received, missing_types=("usage",))
        assert {"output", "tool_call", "progress"} <= {frame["type"] for frame in received}


@pytest.mark.skipif(not WSCAT.exists(), reason="wscat is not installed; script/setup --dev fetches it")
def test_wscat_is_available():
    assert wscats()


def wscats():
    return [Wscat(None)] if WSCAT.exists() else []


def test_event_source_resumes_after_server_restarts(deploy, browser):
    counting = Turn(bash(COUNT.format(n=30)).content, faults=(Fault(status=500),))
    deployment = deploy(counting, bash("wc -l < count.txt"), reply())
    client = EventSource(deployment.server.ready_message["http"], browser)
    with deployment.paused_model():
        task_id = client.submit()["task_id"]
        frames = client.follow(task_id)
        received = read_until_output(frames)
        deployment.restart_server(signal.SIGKILL)
        wait_until(lambda: client.statuses(task_id) == [200, 200], description="the page to come back")
        deployment.restart_server(signal.SIGTERM)
        wait_until(lambda: client.statuses(task_id) == [200] * 3, description="the page to come back once more")
    received += check_live_events(deployment, task_id, frames, [])
    check_complete_events(deployment, task_id, received)
    assert "error" in {frame["type"] for frame in received}
    assert deployment.tool_results()[1].strip() == "30"
    assert client.statuses(task_id) == [200, 200, 200, 204]
