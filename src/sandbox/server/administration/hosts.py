"""Lists the hosts with their tasks, and drains the hosts of a cluster."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

from sandbox.interfaces.placement import HostAllocator, HostNotFoundError, HostState, HostStatus
from sandbox.interfaces.server_services import HostWithTasks, UnavailableError
from sandbox.model.errors import error_reason
from sandbox.server.placement_routing import Placements, attempt_location
from sandbox.server.tracked_task import TrackedTasks


class Hosts:
    """Implements `interfaces.server_services.Hosts`."""

    def __init__(self, tracked_tasks: TrackedTasks, placements: Placements) -> None:
        self._tracked_tasks = tracked_tasks
        self._placements = placements

    @property
    def has_cluster(self) -> bool:
        """See `interfaces.server_services.Hosts.has_cluster`."""
        return self._placements.allocator is not None

    def list_hosts(self) -> Sequence[HostWithTasks]:
        """See `interfaces.server_services.Hosts.list_hosts`."""
        statuses, task_ids = dict(self._placements.host_statuses()), self._running_task_ids()
        if ":" in self._placements.selected_host.identity.name:  # new tasks run on other hosts
            own_host, own_tasks = statuses.pop(""), task_ids.pop("", [])
            if own_tasks:
                # The cluster's engine may also list this machine, under the same name.
                key = next((key for key, status in statuses.items() if status.name == own_host.name), "")
                statuses.setdefault(key, own_host)
                task_ids[key] = [*task_ids.get(key, []), *own_tasks]
        for key in task_ids.keys() - statuses.keys():
            reason = "This server has no information about the host."
            statuses[key] = HostStatus(key.partition(":")[2], HostState.UNREACHABLE, reason)
        hosts = [HostWithTasks(status, sorted(task_ids.get(key, []))) for key, status in statuses.items()]
        return sorted(hosts, key=lambda host: host.status.name)

    async def drain_host(self, name: str) -> HostWithTasks:
        """See `interfaces.server_services.Hosts.drain_host`."""
        return await self._change_drain(name, self._require_allocator().drain_host)

    async def undo_host_drain(self, name: str) -> HostWithTasks:
        """See `interfaces.server_services.Hosts.undo_host_drain`."""
        return await self._change_drain(name, self._require_allocator().undo_host_drain)

    def _require_allocator(self) -> HostAllocator:
        allocator = self._placements.allocator
        if allocator is None:
            message = "There is no cluster: all tasks run on the server's machine, which `sandbox admin drain` drains."
            raise HostNotFoundError(message)
        return allocator

    async def _change_drain(self, name: str, change: Callable[[str], Awaitable[None]]) -> HostWithTasks:
        try:
            await change(name)
        except OSError as error:
            raise UnavailableError(f"The drain was not changed: {error_reason(error)}") from error
        hosts = {host.status.name: host for host in self.list_hosts()}
        unlisted = HostStatus(name, HostState.NOT_READY, "The engine has no host with this name.")
        return hosts.get(name) or HostWithTasks(unlisted, ())

    def _running_task_ids(self) -> dict[str, list[str]]:
        """Return the tasks with a running attempt, keyed by the host; the key of the server's own host is empty."""
        task_ids: defaultdict[str, list[str]] = defaultdict(list)
        for tracked in self._tracked_tasks.values():
            task = tracked.task
            if task.attempt is not None and not task.state.is_final and not task.is_between_attempts:
                location = attempt_location(task, task.attempt)
                task_ids[location.host if location.placement else ""].append(task.id)
        return dict(task_ids)
