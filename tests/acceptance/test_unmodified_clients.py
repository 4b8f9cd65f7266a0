"""Programs that people have already hand in tasks, follow them to their end, and see everything once."""

import signal

import pytest

from doubles.live import TERMINAL, World, bash, make_repository, says, until
from doubles.unmodified_clients import BrowserWebSocket, Curl, EventSource, Httpx, Requests, Websockets, Wscat
from sandbox.demo.model_script import Fault, Turn

COUNT = "for i in $(seq 1 {n}); do echo line-$i >> count.txt; python3 -c 'import time; time.sleep(0.1)'; done"
WALK = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """These clients ask the environment whom to go through; the server of a test is next door."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine whose tasks take a second or two and change a file."""
    world = World(tmp_path_factory.mktemp("clients"))
    try:
        make_repository(world.repositories / "repo.git", {"README.md": "# A repository\n"})
        world.start_git()
        world.start_model(bash(COUNT.format(n=10)), says())
        world.start_server()
        yield world
    finally:
        world.close()


def read_alive(machine, task_id, frames):
    """All of the frames; the first output has to come before the task has ended."""
    told = []
    for frame in frames:
        if frame["type"] == "output" and not any(one["type"] == "output" for one in told):
            assert machine.status(task_id)["state"] not in TERMINAL
        assert not told or frame["seq"] > told[-1]["seq"], "told twice"
        told.append(frame)
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


@pytest.mark.parametrize("client_of", [Requests, Httpx, Curl])
def test_a_program_hands_in_a_task_follows_it_and_takes_the_patch(machine, client_of):
    use(client_of(machine.server.said["http"]), machine)


def test_a_page_hands_in_a_task_follows_it_and_takes_the_patch(machine, browser):
    client = EventSource(machine.server.said["http"], browser)
    task_id = use(client, machine)
    assert client.statuses(task_id) == [200, 204]


def use(client, machine):
    """Give the id of the task that the client has seen from its beginning to its end."""
    answer = client.submit()
    assert answer["state"] == "pending"
    task_id = answer["task_id"]
    frames = read_alive(machine, task_id, client.follow(task_id))
    assert_whole_story(machine, task_id, frames)
    assert {"output", "tool_call", "usage"} <= {frame["type"] for frame in frames}
    assert "+line-10\n" in client.download(f"/tasks/{task_id}/artifacts/{task_id}.patch")
    return task_id


def test_a_page_goes_on_where_it_was_whenever_the_server_comes_back(world, browser):
    counting = Turn(bash(COUNT.format(n=60)).content, faults=(Fault(status=500),))
    machine = world(counting, bash("wc -l < count.txt"), says())
    client = EventSource(machine.server.said["http"], browser)
    task_id = client.submit()["task_id"]
    frames = client.follow(task_id)
    told = [next(frames)]
    while told[-1]["type"] != "output":
        told.append(next(frames))
    machine.restart_server(signal.SIGKILL)
    until(lambda: client.statuses(task_id) == [200, 200], what="the page to come back")
    machine.restart_server(signal.SIGTERM)
    told += read_alive(machine, task_id, frames)
    assert_whole_story(machine, task_id, told)
    assert "error" in {frame["type"] for frame in told}
    assert machine.tool_results()[1].strip() == "60"
    assert client.statuses(task_id) == [200, 200, 200, 204]


@pytest.mark.parametrize("client_of", [Websockets, Wscat])
def test_a_program_follows_a_task_on_both_ports(machine, client_of):
    follow_on_both_ports(client_of(machine.server.said["http"]), machine)


def test_a_page_follows_a_task_on_both_ports(machine, browser):
    follow_on_both_ports(BrowserWebSocket(machine.server.said["http"], browser), machine)


def follow_on_both_ports(client, machine):
    said = machine.server.said
    task_id = Httpx(said["http"]).submit()["task_id"]
    places = [said["ws"], said["http"].replace("http:", "ws:")]
    first, second = (client.open(f"{place}/api/v1/tasks/stream?task_id={task_id}&after=0") for place in places)
    frames = read_alive(machine, task_id, client.frames(first))
    assert_whole_story(machine, task_id, frames, without=("usage",))
    assert {"output", "tool_call", "progress"} <= {frame["type"] for frame in frames}
    assert list(client.frames(second)) == frames
