"""The list of hosts, with the tasks that run there."""

from datetime import UTC, datetime
from types import SimpleNamespace

import msgspec
import pytest

from sandbox import __version__
from sandbox.interfaces.placement import HostDrainError, HostIdentity, HostNotFoundError, HostState, HostStatus
from sandbox.interfaces.server_services import UnavailableError
from sandbox.model.resources import Resources
from sandbox.server.administration import Hosts
from sandbox.server.placements import Placements

CAPACITY = Resources(4, 2**33, 2**40)


class FakeAllocator:
    """Lists hosts, and drains them. error: what draining raises."""

    maximal_host_sizes = (CAPACITY,)

    def __init__(self, names):
        self.statuses, self.error = {name: HostStatus(name, HostState.READY) for name in names}, None

    def host_statuses(self):
        return list(self.statuses.values())

    async def drain_host(self, name):
        self._set(name, datetime(2026, 1, 29, tzinfo=UTC))

    async def undo_host_drain(self, name):
        self._set(name, None)

    def _set(self, name, since):
        if self.error is not None:
            raise self.error
        self.statuses[name] = msgspec.structs.replace(self.statuses[name], draining_since=since)


def make_hosts(tasks, cluster=None, *, name="here", blocked_reason=None):
    """Return the list of hosts. cluster: the host names of the cluster that runs new tasks; None without a cluster."""
    own = SimpleNamespace(identity=HostIdentity(name, "b"), capacity=CAPACITY, blocked_reason=blocked_reason)
    by_name, any_host = {"": SimpleNamespace(allocator=None)}, SimpleNamespace(identity=HostIdentity("cluster:", ""))
    if cluster is not None:
        by_name["cluster"] = SimpleNamespace(allocator=FakeAllocator(cluster))
    placements = Placements(by_name, {"": own, "cluster": any_host}, "" if cluster is None else "cluster")
    return Hosts({task.id: SimpleNamespace(task=task) for task in tasks}, placements)


def task(task_id, host, *, is_final=False, is_between_attempts=False):
    attempt = None if host is None else SimpleNamespace(id="a" * 12, host=host)
    state = SimpleNamespace(is_final=is_final)
    return SimpleNamespace(id=task_id, attempt=attempt, state=state, is_between_attempts=is_between_attempts)


def listed(hosts):
    return {host.status.name: (host.status.state, list(host.task_ids)) for host in hosts.list_hosts()}


def test_server_machine_lists_the_tasks_that_run_there():
    """Tasks that wait or have ended are not listed. The server's machine keeps its tasks after it is renamed."""
    hosts = make_hosts(
        [
            task("task-2", "here"),
            task("task-1", "an-old-name"),
            task("waiting", None),
            task("ended", "here", is_final=True),
            task("between", "here", is_between_attempts=True),
        ]
    )
    [host] = hosts.list_hosts()
    assert host.task_ids == ["task-1", "task-2"]
    assert host.status == HostStatus("here", HostState.READY, "", 4, 2**33, __version__)
    assert not hosts.has_cluster


def test_server_machine_shows_why_it_cannot_start_tasks():
    [host] = make_hosts([], blocked_reason="No runtime works.").list_hosts()
    assert (host.status.state, host.status.reason) == (HostState.NOT_READY, "No runtime works.")


def test_hosts_of_a_cluster_are_sorted_and_have_their_tasks():
    hosts = make_hosts([task("task-1", "cluster:b"), task("task-2", "cluster:b")], ["b", "a"])
    assert listed(hosts) == {"a": ("ready", []), "b": ("ready", ["task-1", "task-2"])}
    assert list(listed(hosts)) == ["a", "b"]
    assert hosts.has_cluster


@pytest.mark.parametrize(("name", "expected"), [("here", {"a", "here"}), ("a", {"a"})])
def test_server_machine_is_listed_with_a_cluster_while_tasks_run_there(name, expected):
    """If the engine calls the machine by the same name, it is listed once."""
    assert set(listed(make_hosts([], ["a"], name=name))) == {"a"}
    found = listed(make_hosts([task("task-1", "here"), task("task-2", "cluster:a")], ["a"], name=name))
    assert set(found) == expected
    assert found[name][1] == (["task-1"] if name == "here" else ["task-1", "task-2"])


def test_host_of_an_unknown_placement_is_unreachable():
    """The cluster was removed from the settings while a task ran there."""
    assert listed(make_hosts([task("task-1", "cluster:a")])) == {
        "a": ("unreachable", ["task-1"]),
        "here": ("ready", []),
    }


async def test_host_is_drained_and_undrained():
    hosts = make_hosts([task("task-1", "cluster:b")], ["b", "a"])
    drained = await hosts.drain_host("b")
    assert (drained.status.name, drained.task_ids) == ("b", ["task-1"])
    assert drained.status.draining_since is not None
    assert drained in hosts.list_hosts()
    assert (await hosts.undo_host_drain("b")).status.draining_since is None


@pytest.mark.parametrize("error", [HostDrainError("It is busy."), OSError("It is busy."), TimeoutError("It is busy.")])
async def test_failed_drain_change_is_reported_as_unavailable(error):
    hosts = make_hosts([], ["a"])
    hosts._placements._by_name["cluster"].allocator.error = error
    for change in (hosts.drain_host, hosts.undo_host_drain):
        with pytest.raises(UnavailableError, match="The drain was not changed"):
            await change("a")


async def test_machine_without_a_cluster_is_drained_as_a_whole():
    hosts = make_hosts([])
    for change in (hosts.drain_host, hosts.undo_host_drain):
        with pytest.raises(HostNotFoundError, match="Drain it with: sandbox admin drain"):
            await change("here")
