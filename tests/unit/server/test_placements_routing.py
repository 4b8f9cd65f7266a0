"""An attempt's host determines its placement. Without a placement, the runner's state is unknown, never free."""

from types import SimpleNamespace

import pytest

from sandbox.interfaces.cluster_engine import JobPhase, JobStatus
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.placement import AttemptLocation, HostUnreachableError
from sandbox.interfaces.runner import (
    CancelAttempt,
    FinishAttempt,
    OpenTerminal,
    RunDebugSession,
    RunnerNotStartedError,
    RunnerUnreachableError,
)
from sandbox.server.placements import Placements

ORDER = FinishAttempt("task-1", "a" * 12)


class NamedPlacement:
    """A placement whose methods return its name."""

    def __init__(self, name):
        self.name, self.files = name, f"files of {name}"

    async def launch(self, order, writer):
        return self.name

    def find_runner(self, location):
        return self.name

    def preserved_disk(self, location):
        return self.name


@pytest.fixture
def placements():
    names = {"": "local", "far": "remote"}
    by_name = {key: NamedPlacement(name) for key, name in names.items()}
    return Placements(by_name, names, "far")


def location(host):
    return AttemptLocation(ORDER.task_id, ORDER.attempt_id, host)


@pytest.mark.parametrize(
    ("host", "name"),
    [("here", "local"), ("an-old-name.example.org", "local"), ("", "local"), ("far:one", "remote"), ("far:", "remote")],
)
async def test_host_selects_the_placement(placements, host, name):
    assert placements.find_runner(location(host)) == name
    assert placements.preserved_disk(location(host)) == name
    assert placements.files(location(host)) == f"files of {name}"
    assert placements.host_of(location(host)) == name
    assert await placements.launch(ORDER, host, None) == name


@pytest.mark.parametrize("host", ["gone:one", "Far:one"])
async def test_lock_state_on_a_host_without_a_placement_is_unknown(placements, host):
    runner, disk = placements.find_runner(location(host)), placements.preserved_disk(location(host))
    assert runner.lock_state() is LockState.UNKNOWN
    assert await runner.may_be_responsive()
    assert not await runner.kill()
    async with disk.try_lock() as lock_state:
        assert lock_state is LockState.UNKNOWN
    for action in (
        runner.cancel(CancelAttempt()),
        runner.open_terminal(OpenTerminal(24, 80)),
        disk.open_terminal(OpenTerminal(24, 80)),
    ):
        with pytest.raises(RunnerUnreachableError, match="cannot be reached"):
            await action
    for action in (disk.remove(), disk.start_debug_session(RunDebugSession("task-1", ORDER.attempt_id))):
        with pytest.raises(HostUnreachableError, match="the host one cannot be reached with this server's settings"):
            await action
    for find in (placements.files, placements.host_of):
        with pytest.raises(HostUnreachableError, match="the host one cannot be reached with this server's settings"):
            find(location(host))
    with pytest.raises(RunnerNotStartedError, match="cannot be reached"):
        await placements.launch(ORDER, host, None)


@pytest.mark.parametrize(
    ("follow_up", "takes_disk", "name"), [(None, True, "remote"), ("retry", False, "remote"), ("resume", True, "local")]
)
def test_next_attempt_runs_on_the_host_that_has_its_disk(placements, follow_up, takes_disk, name):
    attempt = SimpleNamespace(
        id=ORDER.attempt_id, host="here", follow_up=follow_up, hands_over_disk=lambda _: takes_disk
    )
    assert placements.host_for_next_attempt(SimpleNamespace(id="task-1", attempt=attempt)) == name


def test_first_attempt_runs_on_the_selected_placement(placements):
    assert placements.host_for_next_attempt(SimpleNamespace(id="task-1", attempt=None)) == "remote"
    assert placements.selected_host == "remote"
    assert [placement.name for placement in placements] == ["local", "remote"]


async def test_allocator_of_a_placement_reserves_hosts_and_finds_images():
    calls = []

    class Allocator:
        def find_image(self, location, profile):
            calls.append((location.host, profile))

        async def release_host(self, task_id):
            calls.append(task_id)

        def find_loss(self, location):
            return "lost"

    local, far = NamedPlacement("local"), NamedPlacement("remote")
    local.allocator, far.allocator = None, Allocator()
    host = SimpleNamespace(find_image=lambda profile: f"image of {profile}")
    placements = Placements({"": local, "far": far}, {"": host, "far": host}, "far")
    assert placements.find_image(location("here"), "p") == "image of p"
    assert placements.find_image(location("far:one"), "p") is None
    await placements.release_host("task-1")
    assert calls == [("far:one", "p"), "task-1"]
    assert [placements.find_loss(location(name)) for name in ("here", "far:one", "gone:one")] == [None, "lost", None]
    with pytest.raises(HostUnreachableError):
        placements.find_image(location("gone:one"), "p")


def test_job_of_a_task_is_found_on_the_placement_that_has_it():
    statuses = {"task-1": JobStatus(JobPhase.WAITING, reason="Resources", job_id="12")}
    local, far = NamedPlacement("local"), NamedPlacement("remote")
    local.allocator, far.allocator = None, SimpleNamespace(job_status=statuses.get)
    placements = Placements({"": local, "far": far}, {}, "far")
    assert placements.job_status("task-1") == statuses["task-1"]
    assert placements.job_status("task-2") is None
