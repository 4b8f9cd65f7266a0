"""Programs that people have already hand in tasks, follow them to their end, and see everything once."""

import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import pytest

from doubles.live_server import TERMINAL, bash, says, until
from doubles.unmodified_clients import (
    NOWHERE,
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
WALK = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """These clients ask the environment whom to go through; the server of a test is next door."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def alive(machine, task_id, frames, begun):
    """The frames; the first output, which is noted in `begun`, has to come before the task has ended."""
    last_seq, has_begun = 0, False
    for frame in frames:
        if frame["type"] == "output" and not has_begun:
            has_begun = True
            assert machine.status(task_id)["state"] not in TERMINAL
            begun.append(task_id)
        assert frame["seq"] > last_seq, "told twice"
        last_seq = frame["seq"]
        yield frame


def until_output(frames):
    told = [next(frames)]
    while told[-1]["type"] != "output":
        told.append(next(frames))
    return told


def assert_whole_story(machine, task_id, frames, *, without=()):
    """without: types that this way of following does not carry."""
    seqs = [frame["seq"] for frame in frames]
    assert seqs == sorted(set(seqs))
    assert [frame["type"] for frame in frames].index("end") == len(frames) - 1
    assert [frame["new_state"] for frame in frames if frame["type"] == "state_change"] == WALK, machine.tell(task_id)
    outputs = "".join(frame["data"] for frame in frames if frame["type"] == "output")
    assert outputs.encode() == machine.artifact("transcript.ndjson", task_id)
    logged = [frame for frame in machine.frames(task_id) if frame["type"] not in without]
    shown = {frame["seq"] for frame in logged}
    assert [frame for frame in frames if frame["seq"] in shown] == logged


def test_whoever_hands_in_a_task_and_follows_it_with_what_they_have_sees_it_whole(world, browser):
    machine = world(bash(COUNT.format(n=10)), says())
    http, ws = machine.server.said["http"], machine.server.said["ws"]
    page, socket_page = EventSource(http, browser), BrowserWebSocket(http, browser)
    programs = [Requests(http), Httpx(http), Curl(http)]
    task_id = follow_all(machine, programs, page, socket_page, [ws, http.replace("http:", "ws:")])
    assert page.statuses(task_id) == [200, 204]
    for client in (*programs, page):
        assert "+line-10\n" in client.download(f"/tasks/{task_id}/artifacts/{task_id}.patch")


def follow_all(machine, programs, page, socket_page, places):
    """Each hands in a task; all follow the first one, by sockets on both ports, and see the whole of it."""
    first, *others = programs
    with ThreadPoolExecutor(max_workers=10) as pool:
        with machine.model_held():  # until all have begun
            answer = first.submit()
            task_id, begun = answer["task_id"], []
            addresses = [f"{place}/api/v1/tasks/stream?task_id={task_id}&after=0" for place in places]
            events = [
                pool.submit(lambda one=one: list(alive(machine, task_id, one.follow(task_id), begun)))
                for one in programs
            ]
            by_socket = [
                pool.submit(lambda one=one, at=at: list(alive(machine, task_id, one.frames(one.open(at)), begun)))
                for one in (Websockets(None), *wscats())
                for at in addresses
            ]
            sockets = [socket_page.open(at) for at in addresses]
            shown = alive(machine, task_id, page.follow(task_id), begun)
            pushed = alive(machine, task_id, socket_page.frames(sockets[0]), begun)
            beginnings = [until_output(shown), until_output(pushed)]
            until(lambda: len(begun) == len([*beginnings, *events, *by_socket]), 60, "all to hear of the agent")
        rests = zip(*zip_longest(shown, pushed), strict=True)
        shown, pushed = (told + list(filter(None, rest)) for told, rest in zip(beginnings, rests, strict=True))
        streams = [shown, *(one.result(60) for one in events)]
        pushes = [pushed, list(socket_page.frames(sockets[1])), *(one.result(60) for one in by_socket)]
    assert_all_whole(machine, task_id, streams, pushes)
    answers = [answer, *(one.submit(NOWHERE) for one in (*others, page))]
    assert [one["state"] for one in answers] == ["pending"] * 4
    return task_id


def assert_all_whole(machine, task_id, streams, pushes):
    for told in streams:
        assert_whole_story(machine, task_id, told)
        assert {"output", "tool_call", "usage"} <= {frame["type"] for frame in told}
    for told in pushes:
        assert_whole_story(machine, task_id, told, without=("usage",))
        assert {"output", "tool_call", "progress"} <= {frame["type"] for frame in told}


@pytest.mark.skipif(not WSCAT.exists(), reason="wscat is not here; script/setup --dev fetches it")
def test_wscat_is_among_them():
    assert wscats()


def wscats():
    return [Wscat(None)] if WSCAT.exists() else []


def test_a_page_goes_on_where_it_was_whenever_the_server_comes_back(world, browser):
    counting = Turn(bash(COUNT.format(n=30)).content, faults=(Fault(status=500),))
    machine = world(counting, bash("wc -l < count.txt"), says())
    client = EventSource(machine.server.said["http"], browser)
    with machine.model_held():
        task_id = client.submit()["task_id"]
        frames = client.follow(task_id)
        told = until_output(frames)
        machine.restart_server(signal.SIGKILL)
        until(lambda: client.statuses(task_id) == [200, 200], what="the page to come back")
        machine.restart_server(signal.SIGTERM)
        until(lambda: client.statuses(task_id) == [200] * 3, what="the page to come back once more")
    told += alive(machine, task_id, frames, [])
    assert_whole_story(machine, task_id, told)
    assert "error" in {frame["type"] for frame in told}
    assert machine.tool_results()[1].strip() == "30"
    assert client.statuses(task_id) == [200, 200, 200, 204]
