"""The waiting room: oldest first, as room allows; what is small may pass within a bound."""

import itertools
from dataclasses import dataclass

from sandbox.interfaces.tasks import Occupancy
from sandbox.model.limits import MEMORY_AVAILABLE_BYTES_MIN, PASSES_MAX
from sandbox.model.manifest.schema import Vm


@dataclass(frozen=True, slots=True)
class Capacity:
    """CPUs, memory and disk, in all or of one task."""

    cpus: int
    memory_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        return f"{self.cpus} CPUs, {_gib(self.memory_bytes)} of memory and {_gib(self.disk_bytes)} of disk"

    @classmethod
    def asked_by(cls, vm: Vm) -> "Capacity":
        """What a manifest asks for."""
        return cls(vm.cpus, vm.memory_bytes, vm.disk_bytes)

    def fits_in(self, room: "Capacity") -> bool:
        """Whether there is room enough in every respect."""
        return self.cpus <= room.cpus and self.memory_bytes <= room.memory_bytes and self.disk_bytes <= room.disk_bytes

    def lacking_in(self, room: "Capacity", word: str = "free") -> list[str]:
        """What is missing in `room`, for people; empty when nothing is."""
        lacking = []
        if self.cpus > room.cpus:
            lacking.append(f"{self.cpus} CPUs ({max(room.cpus, 0)} {word})")
        for name, need, there in (
            ("memory", self.memory_bytes, room.memory_bytes),
            ("disk", self.disk_bytes, room.disk_bytes),
        ):
            if need > there:
                lacking.append(f"{_gib(need)} of {name} ({_gib(max(there, 0))} {word})")
        return lacking


@dataclass(slots=True)
class _Waiting:
    """A task in the line, and how many times younger ones passed it. can_fit: there may be room for it one day."""

    need: Capacity
    can_fit: bool
    passes: int = 0


class WaitingRoom:
    """Which tasks wait, in order, and what is promised to those that were let in. Pure; ids in, ids out.

    A task that does not fit now may be passed by smaller ones PASSES_MAX times; then all behind it wait for it. One
    that the whole machine has no room for (it shrank meanwhile) keeps nobody waiting.

    memory_available_bytes: what the machine itself could give now, whatever is promised; None where it does not tell.
    Few tasks use at once all that they ask for, so MEMORY_AVAILABLE_BYTES_MIN is enough to begin, or less if a task
    asks for less.
    """

    def __init__(self, total: Capacity) -> None:
        self.total = total
        self._waiting: dict[str, _Waiting] = {}
        self._claims: dict[str, Capacity] = {}
        self._count = itertools.count()
        self._numbers: dict[str, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits."""
        return not self._waiting

    @property
    def waiting_count(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def free(self) -> Capacity:
        """What is not promised."""
        claims = self._claims.values()
        return Capacity(
            self.total.cpus - sum(claim.cpus for claim in claims),
            self.total.memory_bytes - sum(claim.memory_bytes for claim in claims),
            self.total.disk_bytes - sum(claim.disk_bytes for claim in claims),
        )

    @property
    def occupancy(self) -> Occupancy:
        """How full it is."""
        total, free = self.total, self.free
        return Occupancy(
            cpus=total.cpus,
            cpus_promised=total.cpus - free.cpus,
            memory_bytes=total.memory_bytes,
            memory_promised_bytes=total.memory_bytes - free.memory_bytes,
            disk_bytes=total.disk_bytes,
            disk_promised_bytes=total.disk_bytes - free.disk_bytes,
            waiting=len(self._waiting),
        )

    def enter(self, task_id: str, need: Capacity) -> None:
        """Wait at the end of the line."""
        self._numbers[task_id] = next(self._count)
        self._waiting[task_id] = _Waiting(need, need.fits_in(self.total))

    def claim(self, task_id: str, need: Capacity) -> None:
        """Promise room to a task that is under way already."""
        self._claims[task_id] = need

    def holds(self, task_id: str) -> bool:
        """Whether room is promised to the task."""
        return task_id in self._claims

    def leave(self, task_id: str) -> None:
        """Give up the place in the line or the room; unknown ids are fine."""
        self._claims.pop(task_id, None)
        self._waiting.pop(task_id, None)
        self._numbers.pop(task_id, None)

    def put_back(self, task_id: str) -> None:
        """Give up the room that was promised, for the place in the line that one had; who has none is left alone."""
        need = self._claims.pop(task_id, None)
        if need is not None:
            line = {**self._waiting, task_id: _Waiting(need, need.fits_in(self.total))}
            self._waiting = {each: line[each] for each in sorted(line, key=lambda each: self._numbers.get(each, 0))}

    def admit(self, memory_available_bytes: int | None = None) -> str | None:
        """Let the oldest in that there is room for and that may pass those before it; gives its id."""
        free = self.free
        passed: list[_Waiting] = []
        for task_id, waiting in self._waiting.items():
            if not waiting.can_fit:
                continue
            if waiting.need.fits_in(free) and not _lacks_memory(waiting.need, memory_available_bytes):
                for each in passed:
                    each.passes += 1
                self._claims[task_id] = self._waiting.pop(task_id).need
                return task_id
            if waiting.passes >= PASSES_MAX:
                return None
            passed.append(waiting)
        return None

    def held_back(self, obstacle: str) -> dict[str, str]:
        """What each task that waits is told while nobody is let in."""
        return dict.fromkeys(self._waiting, f"Waiting: {obstacle}")

    def complaints(self, memory_available_bytes: int | None = None) -> dict[str, str]:
        """For each task that waits, what it waits for."""
        free, complaints, place = self.free, {}, 0
        for task_id, waiting in self._waiting.items():
            if not waiting.can_fit:
                lacking = " and ".join(waiting.need.lacking_in(self.total, "in all"))
                complaints[task_id] = f"Waiting for a larger machine: asks for {lacking}; cancel it, or raise capacity"
                continue
            if place == 0:
                lacks = [*waiting.need.lacking_in(free), *_lacks_memory(waiting.need, memory_available_bytes)]
                complaints[task_id] = f"Waiting for {' and '.join(lacks)}"
            else:
                complaints[task_id] = f"Waiting behind {place} other task{'s' if place > 1 else ''}"
            place += 1
        return complaints


def _lacks_memory(need: Capacity, available_bytes: int | None) -> list[str]:
    """What the machine itself could not give now, for people; empty where it could."""
    wanted = min(need.memory_bytes, MEMORY_AVAILABLE_BYTES_MIN)
    if available_bytes is None or wanted <= available_bytes:
        return []
    return [f"{_gib(wanted)} of memory that nobody uses (the machine has {_gib(max(available_bytes, 0))})"]


def _gib(byte_count: int) -> str:
    gibibytes = byte_count / 1024**3
    return f"{gibibytes:.0f} GiB" if gibibytes >= 1000 else f"{gibibytes:.3g} GiB"
