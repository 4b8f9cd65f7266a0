"""The waiting room: first in, first out, as room allows."""

from collections import deque
from dataclasses import dataclass

from sandbox.model.manifest import Vm


@dataclass(frozen=True, slots=True)
class Capacity:
    """CPUs, memory and disk, in all or of one task."""

    cpus: int
    memory_bytes: int
    disk_bytes: int

    @classmethod
    def asked_by(cls, vm: Vm) -> "Capacity":
        """What a manifest asks for."""
        return cls(vm.cpus, vm.memory_bytes, vm.disk_bytes)

    def fits_in(self, room: "Capacity") -> bool:
        """Whether there is room enough in every respect."""
        return not self.lacking_in(room)

    def lacking_in(self, room: "Capacity") -> str:
        """What is missing in `room`, for people; empty when nothing is."""
        lacking = []
        if self.cpus > room.cpus:
            lacking.append(f"{self.cpus} CPUs ({max(room.cpus, 0)} free)")
        for name, need, free in (
            ("memory", self.memory_bytes, room.memory_bytes),
            ("disk", self.disk_bytes, room.disk_bytes),
        ):
            if need > free:
                lacking.append(f"{_gib(need)} of {name} ({_gib(max(free, 0))} free)")
        return " and ".join(lacking)


class WaitingRoom:
    """Which tasks wait, in order, and what is promised to those that were let in. Pure; ids in, ids out."""

    def __init__(self, total: Capacity) -> None:
        self.total = total
        self._waiting: deque[tuple[str, Capacity]] = deque()
        self._claims: dict[str, Capacity] = {}

    @property
    def free(self) -> Capacity:
        """What is not promised."""
        claims = self._claims.values()
        return Capacity(
            self.total.cpus - sum(claim.cpus for claim in claims),
            self.total.memory_bytes - sum(claim.memory_bytes for claim in claims),
            self.total.disk_bytes - sum(claim.disk_bytes for claim in claims),
        )

    def enter(self, task_id: str, need: Capacity) -> None:
        """Wait at the end of the line."""
        self._waiting.append((task_id, need))

    def claim(self, task_id: str, need: Capacity) -> None:
        """Promise room to a task that is under way already."""
        self._claims[task_id] = need

    def leave(self, task_id: str) -> None:
        """Give up the place in the line or the room; unknown ids are fine."""
        self._claims.pop(task_id, None)
        self._waiting = deque(entry for entry in self._waiting if entry[0] != task_id)

    def admit(self) -> str | None:
        """Let the first in line in, if there is room; gives its id."""
        if not self._waiting or not self._waiting[0][1].fits_in(self.free):
            return None
        task_id, need = self._waiting.popleft()
        self._claims[task_id] = need
        return task_id

    def complaints(self) -> dict[str, str]:
        """For each task that waits, what it waits for."""
        free = self.free
        complaints = {}
        for place, (task_id, need) in enumerate(self._waiting):
            if place == 0:
                complaints[task_id] = f"Waiting for {need.lacking_in(free)}"
            else:
                complaints[task_id] = f"Waiting behind {place} other task{'s' if place > 1 else ''}"
        return complaints


def _gib(byte_count: int) -> str:
    return f"{byte_count / 1024**3:.3g} GiB"
