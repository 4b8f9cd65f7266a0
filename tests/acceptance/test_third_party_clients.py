"""Existing HTTP and WebSocket clients submit tasks and receive complete event streams."""

import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import pytest

from doubles.deployment import FINAL_STATES, bash_turn, reply_turn, wait_until
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
from sandbox.demo.scripted_model import Fault, Turn

COUNT_COMMAND = "for i in $(seq 1 {n}); do echo line-$i >> count.txt; sleep 0.1; done"
STATES = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Unset the proxy variables, which these clients would use."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def check_live_events(deployment, task_id, events, started_clients):
    """Yield the events. At the first output, check that the task is active, and add an item to `started_clients`."""
    last_seq, has_output = 0, False
    for event in events:
        if event["type"] == "output" and not has_output:
            has_output = True
            assert deployment.status(task_id)["state"] not in FINAL_STATES
            started_clients.append(task_id)
        assert event["seq"] > last_seq, "duplicate event"
        last_seq = event["seq"]
        yield event


def read_until_output(events):
    received = [next(events)]
    while received[-1]["type"] != "output":
        received.append(next(events))
    return received


def check_complete_events(deployment, task_id, events, *, missing_types=()):
    """Compare received events with the task's events. missing_types: types that this kind of stream omits."""
    seqs = [event["seq"] for event in events]
    assert seqs == sorted(set(seqs))
    assert [event["type"] for event in events].index("end") == len(events) - 1
    assert [event["new_state"] for event in events if event["type"] == "state_change"] == STATES, (
        deployment.diagnostics(task_id)
    )
    output = "".join(event["data"] for event in events if event["type"] == "output")
    assert output.encode() == deployment.artifact("transcript.ndjson", task_id)
    logged = [event for event in deployment.wire_events(task_id) if event["type"] not in missing_types]
    logged_seqs = {event["seq"] for event in logged}
    assert [event for event in events if event["seq"] in logged_seqs] == logged


def test_existing_clients_submit_and_receive_complete_streams(deploy, browser):
    deployment = deploy(bash_turn(COUNT_COMMAND.format(n=10)), reply_turn())
    http, ws = deployment.server.ready_message["http"], deployment.server.ready_message["ws"]
    page, socket_page = EventSource(http, browser), BrowserWebSocket(http, browser)
    programs = [Requests(http), Httpx(http), Curl(http)]
    task_id = follow_all(deployment, programs, page, socket_page, [ws, http.replace("http:", "ws:")])
    assert page.statuses(task_id) == [200, 204]
    for client in (*programs, page):
        assert "+line-10\n" in client.download(f"/tasks/{task_id}/artifacts/{task_id}.patch")


def follow_all(deployment, programs, page, socket_page, base_urls):
    """Follow a task with all clients, including WebSockets on both ports; then submit a task with each HTTP client."""
    first, *others = programs
    with ThreadPoolExecutor(max_workers=10) as pool:
        with deployment.paused_model():  # until all clients have started
            submission = first.submit()
            task_id, started_clients = submission["task_id"], []
            addresses = [f"{base_url}/api/v1/tasks/stream?task_id={task_id}&after=0" for base_url in base_urls]
            stream_results = [
                pool.submit(
                    lambda client=client: list(
                        check_live_events(deployment, task_id, client.follow(task_id), started_clients)
                    )
                )
                for client in programs
            ]
            socket_results = [
                pool.submit(
                    lambda client=client, address=address: list(
                        check_live_events(deployment, task_id, client.events(client.open(address)), started_clients)
                    )
                )
                for client in (Websockets(None), *wscats())
                for address in addresses
            ]
            sockets = [socket_page.open(address) for address in addresses]
            page_events = check_live_events(deployment, task_id, page.follow(task_id), started_clients)
            socket_events = check_live_events(deployment, task_id, socket_page.events(sockets[0]), started_clients)
            first_events = [read_until_output(page_events), read_until_output(socket_events)]
            wait_until(
                lambda: len(started_clients) == len([*first_events, *stream_results, *socket_results]),
                60,
                "output for all clients",
            )
        remaining_events = zip(*zip_longest(page_events, socket_events), strict=True)
        page_events, socket_events = (
            received + list(filter(None, rest)) for received, rest in zip(first_events, remaining_events, strict=True)
        )
        from_sse = [page_events, *(result.result(60) for result in stream_results)]
        from_websockets = [
            socket_events,
            list(socket_page.events(sockets[1])),
            *(one.result(60) for one in socket_results),
        ]
    check_all_complete(deployment, task_id, from_sse, from_websockets)
    submissions = [submission, *(client.submit(UNKNOWN_BRANCH_MANIFEST) for client in (*others, page))]
    assert [one["state"] for one in submissions] == ["pending"] * 4
    return task_id


def check_all_complete(deployment, task_id, from_sse, from_websockets):
    for received in from_sse:
        check_complete_events(deployment, task_id, received)
        assert {"output", "tool_call", "usage"} <= {event["type"] for event in received}
    for received in from_websockets:
        check_complete_events(deployment, task_id, received, missing_types=("usage",))
        assert {"output", "tool_call", "progress"} <= {event["type"] for event in received}


@pytest.mark.skipif(not WSCAT.exists(), reason="wscat is not installed; run script/setup --dev")
def test_wscat_is_available():
    assert wscats()


def wscats():
    return [Wscat(None)] if WSCAT.exists() else []


def test_event_source_resumes_after_server_restarts(deploy, browser):
    counting = Turn(bash_turn(COUNT_COMMAND.format(n=30)).content, faults=(Fault(status=500),))
    deployment = deploy(counting, bash_turn("wc -l < count.txt"), reply_turn())
    client = EventSource(deployment.server.ready_message["http"], browser)
    with deployment.paused_model():
        task_id = client.submit()["task_id"]
        events = client.follow(task_id)
        received = read_until_output(events)
        deployment.restart_server(signal.SIGKILL)
        wait_until(lambda: client.statuses(task_id) == [200, 200], description="the page to reconnect")
        deployment.restart_server(signal.SIGTERM)
        wait_until(lambda: client.statuses(task_id) == [200] * 3, description="the page to reconnect once more")
    received += check_live_events(deployment, task_id, events, [])
    check_complete_events(deployment, task_id, received)
    assert "error" in {event["type"] for event in received}
    assert deployment.tool_results()[1].strip() == "30"
    assert client.statuses(task_id) == [200, 200, 200, 204]
