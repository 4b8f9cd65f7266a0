"""What a sandbox ran out of, told once each as it happens and as the reason when the agent did not survive it."""

import asyncio
from collections.abc import Callable

from sandbox.interfaces.agent import Outcome
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import Disks, DiskUse
from sandbox.interfaces.kernel_watch import until_excess
from sandbox.interfaces.layout import AttemptLayout
from sandbox.interfaces.runtime import Sandbox, Stats
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import Event, Trouble
from sandbox.model.limits import (
    DISK_CHECK_SECONDS,
    DISK_CHECK_SECONDS_MAX,
    DISK_CHECKS_MISSED_MAX,
    SANDBOX_PROCESSES_MAX,
)
from sandbox.model.manifest.schema import Vm

_UNEXPLAINED = frozenset({FailureCode.AGENT_FAILED, FailureCode.AGENT_NO_RESULT})
_NAMES = {FailureCode.DISK_FULL: "ENOSPC", FailureCode.PROCESS_LIMIT: "EAGAIN"}
"""By which an agent that explains its end names what it ran out of."""
_IDLE_FACTOR = 10


class Shortages:
    """Looks at disk, memory and processes of one sandbox. disk: its latest figures, None before the first."""

    def __init__(self, vm: Vm, disks: Disks, files: AttemptLayout, record: Callable[[Event], object]) -> None:
        self.disk: DiskUse | None = None
        self._vm = vm
        self._disks = disks
        self._files = files
        self._record = record
        self._told: dict[FailureCode, str] = {}

    def see(self, stats: Stats) -> None:
        """Take the counters of a moment."""
        if stats.memory_kills:
            self._tell(FailureCode.OUT_OF_MEMORY, f"A process was ended at vm.memory {self._vm.memory}; raise it.")
        if stats.forks_refused:
            self._tell(
                FailureCode.PROCESS_LIMIT,
                f"No more processes could be started: a sandbox has {SANDBOX_PROCESSES_MAX} at once.",
            )

    async def watch_disk(self, clock: Clock) -> Failure:
        """Look again and again; returns why nothing but an end of the agent keeps its disk within bounds."""
        misses = 0
        while True:
            began = clock.monotonic()
            problem = await self.look_at_disk()
            pause = min(_IDLE_FACTOR * (clock.monotonic() - began), DISK_CHECK_SECONDS_MAX)
            misses = misses + 1 if problem else 0
            if not self._disks.tells_when_full:
                if misses == DISK_CHECKS_MISSED_MAX:
                    return Failure(FailureCode.SANDBOX_LOST, f"{problem}; nothing bounded it any more.")
                if not misses and self.disk is not None and self.disk.is_full:
                    return Failure(FailureCode.DISK_FULL, self.disk_full_message)
            await asyncio.sleep(DISK_CHECK_SECONDS if misses else max(DISK_CHECK_SECONDS, pause))

    async def watch_kernel_use(self, sandbox: Sandbox) -> Failure:
        """Poll until the sandbox is past a bound that the kernel does not enforce; return why it must end."""
        return Failure(FailureCode.OUT_OF_MEMORY, await until_excess(sandbox.kernel_use, sandbox.file_use))

    async def look_at_disk(self) -> str:
        """Take the figures of the disk now; those that cannot be had stay as they were, and why is given."""
        try:
            self.disk = await self._disks.use(self._files)
        except OSError as error:
            self._tell(FailureCode.INTERNAL, f"{error}.")
            return str(error)
        if self.disk.is_full:
            self._tell(FailureCode.DISK_FULL, self.disk_full_message)
        return ""

    @property
    def disk_full_message(self) -> str:
        """For people."""
        return f"The sandbox's disk is full: vm.disk is {self._vm.disk}; raise it."

    def explain(self, outcome: Outcome) -> Failure | None:
        """A failure that the agent does not explain itself, by what it ran out of; of the disk as it is now.

        An agent that explains it may have met a shortage long before.
        """
        failure, result = outcome.failure, outcome.result
        if failure is None or failure.code not in _UNEXPLAINED:
            return failure
        is_explained = result is not None and result.get("is_error") is not False
        for code, name in _NAMES.items():
            if self._lacks(code) and (not is_explained or name in failure.message):
                return Failure(code, f"{self._told[code]} What Claude Code said at last: {failure.message}")
        return failure

    def _lacks(self, code: FailureCode) -> bool:
        has_room_again = code is FailureCode.DISK_FULL and self.disk is not None and not self.disk.is_full
        return code in self._told and not has_room_again

    def _tell(self, code: FailureCode, message: str) -> None:
        if code not in self._told:
            self._told[code] = message
            self._record(Trouble(code, message))
