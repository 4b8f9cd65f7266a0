"""The scheduler: starts the oldest task that fits. Smaller tasks may overtake a larger one, up to a limit."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sandbox.interfaces.server_services import Occupancy
from sandbox.model.display_text import format_gib
from sandbox.model.fixed_limits import MEMORY_AVAILABLE_BYTES_MIN, QUEUE_OVERTAKES_MAX
from sandbox.model.resources import Resources


@dataclass(slots=True)
class _QueuedTask:
    """A queued task, and how many times later tasks have overtaken it.

    can_ever_fit: whether the task fits within the total capacity, or on at least one host of a cluster.
    blocked_reason: why this server cannot start the task, regardless of free resources (human-readable).
    """

    requested: Resources
    can_ever_fit: bool
    blocked_reason: str | None = None
    overtaken_count: int = 0


class Scheduler:
    """The queue of waiting tasks, and the resource reservations of admitted tasks. Performs no I/O.

    A task that does not fit now may be overtaken QUEUE_OVERTAKES_MAX times; then all tasks behind it wait. A task that
    exceeds the host's total capacity (which may have shrunk), or that this server cannot start, does not block others.

    maximal_host_sizes: the sizes of the largest hosts of a cluster, whose engine queues tasks. A task that fits
        on one of them is admitted immediately. None if the tasks share the resources `total`.
    memory_available_bytes: memory that the host has available, regardless of reservations; None if unknown. Most tasks
        never use all the memory that they request, so MEMORY_AVAILABLE_BYTES_MIN suffices to start a task, or less if
        the task requests less.
    """

    def __init__(self, total: Resources, maximal_host_sizes: Sequence[Resources] | None = None) -> None:
        self.total = total
        self.has_engine = maximal_host_sizes is not None
        self._hosts = (total,) if maximal_host_sizes is None else tuple(maximal_host_sizes)
        self._queue: dict[str, _QueuedTask] = {}
        self._reservations: dict[str, Resources] = {}
        self._sequence = itertools.count()
        self._queue_numbers: dict[str, int] = {}

    @property
    def is_queue_empty(self) -> bool:
        """Whether no task is waiting."""
        return not self._queue

    @property
    def waiting_count(self) -> int:
        """Number of waiting tasks."""
        return len(self._queue)

    @property
    def free(self) -> Resources:
        """The resources that are not reserved."""
        reservations = self._reservations.values()
        return Resources(
            self.total.cpus - sum(reservation.cpus for reservation in reservations),
            self.total.memory_bytes - sum(reservation.memory_bytes for reservation in reservations),
            self.total.disk_bytes - sum(reservation.disk_bytes for reservation in reservations),
        )

    @property
    def occupancy(self) -> Occupancy:
        """Capacity, reservations and the number of waiting tasks."""
        total, free = self.total, self.free
        return Occupancy(
            cpus=total.cpus,
            cpus_reserved=total.cpus - free.cpus,
            memory_bytes=total.memory_bytes,
            memory_reserved_bytes=total.memory_bytes - free.memory_bytes,
            disk_bytes=total.disk_bytes,
            disk_reserved_bytes=total.disk_bytes - free.disk_bytes,
            waiting=len(self._queue),
        )

    def closest_host_capacity(self, requested: Resources) -> Resources:
        """Return a host whose total resources suffice; if there is none, the one that lacks the fewest resources."""
        return min(self._hosts, key=lambda host: len(requested.describe_shortfall(host)))

    def _can_ever_fit(self, requested: Resources) -> bool:
        return requested.fits_in(self.closest_host_capacity(requested))

    def enqueue(self, task_id: str, requested: Resources, blocked_reason: str | None = None) -> None:
        """Append a task to the queue. blocked_reason: why this server cannot start it."""
        self._queue_numbers[task_id] = next(self._sequence)
        self._queue[task_id] = _QueuedTask(requested, self._can_ever_fit(requested), blocked_reason)

    def reserve(self, task_id: str, requested: Resources) -> None:
        """Reserve resources for a task that is already running."""
        self._reservations[task_id] = requested

    def has_reservation(self, task_id: str) -> bool:
        """Return whether the task has a reservation."""
        return task_id in self._reservations

    def remove(self, task_id: str) -> None:
        """Remove a task's queue entry and reservation; unknown ids are ignored."""
        self._reservations.pop(task_id, None)
        self._queue.pop(task_id, None)
        self._queue_numbers.pop(task_id, None)

    def requeue(self, task_id: str) -> None:
        """Put a task that has a reservation back at its earlier position in the queue; ignore any other task."""
        reservation = self._reservations.pop(task_id, None)
        if reservation is not None:
            queue = {**self._queue, task_id: _QueuedTask(reservation, self._can_ever_fit(reservation))}
            self._queue = {
                each: queue[each] for each in sorted(queue, key=lambda each: self._queue_numbers.get(each, 0))
            }

    def admit_next(self, memory_available_bytes: int | None = None) -> str | None:
        """Admit the oldest task that fits and may overtake those before it; return its id."""
        free = self.total if self.has_engine else self.free  # slow with the many tasks of an engine
        overtaken: list[_QueuedTask] = []
        for task_id, waiting in self._queue.items():
            if not waiting.can_ever_fit or waiting.blocked_reason is not None:
                continue
            if self.has_engine or (
                waiting.requested.fits_in(free)
                and not describe_memory_shortfall(waiting.requested, memory_available_bytes)
            ):
                for each in overtaken:
                    each.overtaken_count += 1
                self._reservations[task_id] = self._queue.pop(task_id).requested
                return task_id
            if waiting.overtaken_count >= QUEUE_OVERTAKES_MAX:
                return None
            overtaken.append(waiting)
        return None

    def waiting_messages_while_blocked(self, reason: str) -> dict[str, str]:
        """Return the status messages of all waiting tasks while `reason` blocks every admission."""
        return dict.fromkeys(self._queue, f"Waiting: {reason}")

    def waiting_messages(self, memory_available_bytes: int | None = None) -> dict[str, str]:
        """Return what each waiting task is waiting for."""
        free, waiting_messages, position = self.free, {}, 0
        for task_id, waiting in self._queue.items():
            if waiting.blocked_reason is not None:
                waiting_messages[task_id] = f"Waiting: {waiting.blocked_reason}"
                continue
            if not waiting.can_ever_fit:
                shortfall = " and ".join(
                    waiting.requested.describe_shortfall(self.closest_host_capacity(waiting.requested), "in all")
                )
                waiting_messages[task_id] = (
                    f"Waiting for a larger machine: requests {shortfall}; cancel the task, or raise the capacity"
                )
                continue
            if position == 0:
                shortfall_now = [
                    *waiting.requested.describe_shortfall(free),
                    *describe_memory_shortfall(waiting.requested, memory_available_bytes),
                ]
                waiting_messages[task_id] = f"Waiting for {' and '.join(shortfall_now)}"
            else:
                waiting_messages[task_id] = f"Waiting behind {position} other task{'s' if position > 1 else ''}"
            position += 1
        return waiting_messages


def describe_memory_shortfall(requested: Resources, available_bytes: int | None) -> list[str]:
    """Return the free memory that starting the task requires (human-readable); empty if the host has enough."""
    required_bytes = min(requested.memory_bytes, MEMORY_AVAILABLE_BYTES_MIN)
    if available_bytes is None or required_bytes <= available_bytes:
        return []
    required, available = format_gib(required_bytes), format_gib(max(available_bytes, 0))
    return [f"{required} of free memory (the machine has {available})"]
