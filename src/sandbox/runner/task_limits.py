"""The limits of a running task: the time and budget that are left, and the exhausted resources of its sandbox.

Earlier attempts count towards the time and the budget. An agent's failure is attributed to an exhausted resource.
"""

import asyncio
from collections.abc import Callable

from sandbox.interfaces.agent import AgentOutcome
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import Disk, DiskUsage
from sandbox.interfaces.gateway import Budget
from sandbox.interfaces.runtime import Sandbox, Stats
from sandbox.model.events import ErrorReported, Event
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import (
    DISK_CHECK_FAILURES_MAX,
    DISK_CHECK_INTERVAL_SECONDS_MAX,
    DISK_CHECK_INTERVAL_SECONDS_MIN,
    SANDBOX_PROCESSES_MAX,
)
from sandbox.model.manifest.schema import Vm
from sandbox.model.task import Task


def remaining_seconds(task: Task, clock: Clock) -> float:
    """Return the seconds left of `lifecycle.timeout`, which runs from the first agent's start.

    The time is measured by the monotonic clock; by the wall clock if the first agent started in another boot, on
    another host or in an unknown boot.
    """
    timeout, agent_start_time, attempt = task.manifest.lifecycle.timeout_seconds, task.agent_start_time, task.attempt
    if agent_start_time is None or attempt is None or task.started_at is None:
        return timeout
    if agent_start_time.boot_id and agent_start_time.boot_id == attempt.boot_id:
        return timeout - (clock.monotonic() - agent_start_time.monotonic_seconds)
    return timeout - max(0.0, (clock.now() - task.started_at).total_seconds())


def budget_with_earlier_usage(task: Task) -> Budget:
    """Return the task's budget and the usage that the gateways of earlier attempts counted."""
    lifecycle, spent = task.manifest.lifecycle, task.spent
    tokens = spent.input_tokens + spent.output_tokens
    return Budget(lifecycle.budget_usd, lifecycle.budget_tokens, spent_usd=spent.usd, spent_tokens=tokens)


_UNEXPLAINED_CODES = frozenset({FailureCode.AGENT_FAILED, FailureCode.AGENT_NO_RESULT})
_ERRNO_NAMES = {FailureCode.DISK_FULL: "ENOSPC", FailureCode.PROCESS_LIMIT: "EAGAIN"}
"""Error names by which an agent's own message refers to the resource."""
_PAUSE_FACTOR = 10
"""The pause after a measurement, as a multiple of its duration."""


class ExhaustionDetector:
    """Watches the disk, memory and processes of one sandbox. disk_usage: the last measurement, or None."""

    def __init__(self, vm: Vm, disk: Disk, record: Callable[[Event], object]) -> None:
        self.disk_usage: DiskUsage | None = None
        self._vm = vm
        self._disk = disk
        self._record = record
        self._reported: dict[FailureCode, str] = {}

    def check_stats(self, stats: Stats) -> None:
        """Report the resources that are exhausted according to the current counters."""
        if stats.oom_kills:
            message = f"A process was killed because vm.memory ({self._vm.memory}) was used up; raise it."
            self._report(FailureCode.OUT_OF_MEMORY, message)
        if stats.fork_failures:
            self._report(
                FailureCode.PROCESS_LIMIT,
                f"No more processes could be started: the limit is {SANDBOX_PROCESSES_MAX}.",
            )

    async def watch_disk(self, clock: Clock) -> Failure:
        """Poll the disk. If its size is not enforced, return the failure once it is full or cannot be measured."""
        misses = 0
        while True:
            began = clock.monotonic()
            problem = await self.check_disk()
            pause = min(_PAUSE_FACTOR * (clock.monotonic() - began), DISK_CHECK_INTERVAL_SECONDS_MAX)
            misses = misses + 1 if problem else 0
            if not self._disk.enforces_size:
                if misses == DISK_CHECK_FAILURES_MAX:
                    return Failure(FailureCode.SANDBOX_LOST, f"{problem}; the size of the disk was no longer limited.")
                if not misses and self.disk_usage is not None and self.disk_usage.is_full:
                    return Failure(FailureCode.DISK_FULL, self.disk_full_message)
            await asyncio.sleep(
                DISK_CHECK_INTERVAL_SECONDS_MIN if misses else max(DISK_CHECK_INTERVAL_SECONDS_MIN, pause)
            )

    async def watch_kernel_usage(self, sandbox: Sandbox) -> Failure:
        """Wait until the sandbox exceeds a limit that the kernel does not enforce; return the failure."""
        return Failure(FailureCode.OUT_OF_MEMORY, await sandbox.wait_for_exceeded_limit())

    async def check_disk(self) -> str:
        """Measure the disk. Returns the reason for a failure, or an empty string. A failure leaves the last values."""
        try:
            self.disk_usage = await self._disk.measure_and_trim()
        except OSError as error:
            self._report(FailureCode.INTERNAL, f"{error}.")
            return str(error)
        if self.disk_usage.is_full:
            self._report(FailureCode.DISK_FULL, self.disk_full_message)
        return ""

    @property
    def disk_full_message(self) -> str:
        """The human-readable message about a full disk."""
        return f"The sandbox's disk is full: vm.disk is {self._vm.disk}; raise it."

    def explain_failure(self, outcome: AgentOutcome, agent_name: str) -> Failure | None:
        """Attribute the agent's failure to an exhausted resource if that is the likely cause.

        A disk counts only if it is still full. If the agent reported an error, its message must name the error of that
        resource, because the shortage may have ended before the failure. agent_name: for the message.
        """
        failure, result = outcome.failure, outcome.result
        if failure is None or failure.code not in _UNEXPLAINED_CODES:
            return failure
        is_explained = result is not None and result.get("is_error") is not False
        for code, name in _ERRNO_NAMES.items():
            if self._is_exhausted(code) and (not is_explained or name in failure.message):
                return Failure(code, f"{self._reported[code]} Last message from {agent_name}: {failure.message}")
        return failure

    def _is_exhausted(self, code: FailureCode) -> bool:
        has_space_again = code is FailureCode.DISK_FULL and self.disk_usage is not None and not self.disk_usage.is_full
        return code in self._reported and not has_space_again

    def _report(self, code: FailureCode, message: str) -> None:
        if code not in self._reported:
            self._reported[code] = message
            self._record(ErrorReported(code, message))
