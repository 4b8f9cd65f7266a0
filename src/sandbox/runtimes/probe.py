"""Probes a runtime: creates a sandbox with an execute-only program, like an agent's, and confines a host program."""

import asyncio
import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from sandbox.interfaces.runtime import (
    SANDBOX_WORKSPACE,
    Command,
    ConfinedCommand,
    Confinement,
    ConfinementLostError,
    ConfinementSpec,
    Runtime,
    RuntimeProbe,
    SandboxHandle,
    SandboxSpec,
)
from sandbox.interfaces.task_file_layout import new_attempt_id, probe_directory
from sandbox.model.errors import SandboxError
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runtimes.limits import cgroups

_PROBE_SECONDS = 8.0
_BUSY_TIME_FACTOR = 4
_SIGNAL_EXIT_BASE = 128
_TRANSIENT_ERRNOS = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
_MEMORY_BYTES, _PROCESSES_MAX = 64 * 1024 * 1024, 16


def is_machine_busy() -> bool:
    """Return whether the load average of the last minute exceeds the number of CPUs."""
    return os.getloadavg()[0] > (os.cpu_count() or 1)


class RuntimeProperties(msgspec.Struct, frozen=True):
    """The properties of a runtime that no probe changes; for the fields, see `RuntimeProbe`."""

    name: str
    tier: str
    strength: int
    isolation_notes: Sequence[str]
    gaps: Sequence[str]

    def available_probe(
        self, enforced_limits: frozenset[str], *, more_gaps: Sequence[str] = (), is_explicit_only: bool = False
    ) -> RuntimeProbe:
        """Return the result of a successful probe. more_gaps: gaps that exist only on this host."""
        return RuntimeProbe(
            self.name,
            is_available=True,
            tier=self.tier,
            strength=self.strength,
            isolation_notes=self.isolation_notes,
            gaps=(*self.gaps, *more_gaps, *_find_limit_gaps(enforced_limits)),
            enforced_limits=enforced_limits,
            is_explicit_only=is_explicit_only,
        )

    def unavailable_probe(
        self, remedy: str, *, is_explicit_only: bool = False, is_permanent: bool = False
    ) -> RuntimeProbe:
        """Return the result of a failed probe."""
        return RuntimeProbe(
            self.name,
            is_available=False,
            tier=self.tier,
            strength=self.strength,
            remedy=remedy,
            is_explicit_only=is_explicit_only,
            is_permanent=is_permanent,
        )


def _find_limit_gaps(limits: frozenset[str]) -> tuple[str, ...]:
    """Return one message that lists which of the limits on memory, CPUs and processes are missing; empty if none is."""
    missing = [name for name in ("memory", "cpus", "processes") if name not in limits]
    return (f"not limited by a control group: {', '.join(missing)}",) if missing else ()


class InconclusiveProbeError(Exception):
    """A probe failed for a reason that may be temporary. The message contains the reason."""


async def run_probe(
    runtime: Runtime,
    run_dir: Path,
    hierarchies: cgroups.Hierarchies,
    *,
    memory_bytes: int,
    timeout_seconds: float = _PROBE_SECONDS,
) -> frozenset[str]:
    """Create a sandbox, run a copy of `true` in it and destroy it. Returns the limits that are enforced.

    timeout_seconds: time limit for one run. If it expires while the machine is busy, the probe is repeated with four
    times as much time: otherwise, tasks that use all their CPU time could make a runtime look broken. Raises
    SandboxError, OSError, TimeoutError.
    """
    try:
        return await _run_probe_once(runtime, run_dir, hierarchies, memory_bytes, timeout_seconds)
    except TimeoutError:
        if not is_machine_busy():
            raise
    return await _run_probe_once(runtime, run_dir, hierarchies, memory_bytes, timeout_seconds * _BUSY_TIME_FACTOR)


async def _run_probe_once(
    runtime: Runtime, run_dir: Path, hierarchies: cgroups.Hierarchies, memory_bytes: int, timeout_seconds: float
) -> frozenset[str]:
    import shutil

    attempt_id = new_attempt_id()
    disk = probe_directory(run_dir, attempt_id)
    try:
        async with asyncio.timeout(timeout_seconds):
            handle = runtime.prepare(attempt_id)
            try:
                disk.mkdir(parents=True, mode=0o700)
                shutil.copyfile("/usr/bin/true", disk / "true")
                (disk / "true").chmod(0o111)
                return await _run_true(runtime, handle, disk, hierarchies, memory_bytes)
            finally:
                await runtime.destroy(handle, disk)
                shutil.rmtree(disk, ignore_errors=True)
    except TimeoutError:
        raise TimeoutError(f"The program 'true' did not exit within {timeout_seconds:g} s in a sandbox.") from None


async def find_confinement_problem(runtime: Runtime, run_dir: Path) -> str | None:
    """Return why the host's git cannot run confined, or None if it can. Takes up to twice `_PROBE_SECONDS`.

    A failed test is repeated, because a temporary shortage of processes or memory can look like any other error. Raises
    InconclusiveProbeError if the second test also fails for a reason that may be temporary.
    """
    with suppress(InconclusiveProbeError):
        if await _find_confinement_problem_once(runtime, run_dir) is None:
            return None
    return await _find_confinement_problem_once(runtime, run_dir)


async def _find_confinement_problem_once(runtime: Runtime, run_dir: Path) -> str | None:
    import shutil

    attempt_id = new_attempt_id()
    directory = probe_directory(run_dir, attempt_id)
    spec = ConfinementSpec(1, _MEMORY_BYTES, _PROCESSES_MAX, [directory])
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            handle = runtime.prepare(attempt_id)
            try:
                directory.mkdir(parents=True, mode=0o700)
                async with runtime.confine(handle, spec) as confinement:
                    code = await _run_git(confinement, directory)
            finally:
                await runtime.destroy(handle, directory)
                shutil.rmtree(directory, ignore_errors=True)
    except TimeoutError:
        raise InconclusiveProbeError(f"git did not exit within {_PROBE_SECONDS:g} s") from None
    except (SandboxError, OSError) as error:
        if _is_transient(error):
            raise InconclusiveProbeError(str(error)) from error
        return str(error)
    if code > _SIGNAL_EXIT_BASE:
        raise InconclusiveProbeError(f"git was killed by signal {code - _SIGNAL_EXIT_BASE}")
    return None if code == 0 else f"git exited with code {code}"


def _is_transient(error: BaseException | None) -> bool:
    """Return whether a process could not be started or was killed, for example by the kernel for lack of memory."""
    if isinstance(error, AttemptError):
        return error.code is FailureCode.SANDBOX_LOST or _is_transient(error.__cause__)
    return isinstance(error, ConfinementLostError) or (isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS)


async def _run_git(confinement: Confinement, directory: Path) -> int:
    devnull_fd = os.open(os.devnull, os.O_RDWR)
    try:
        variables = {"PATH": os.environ.get("PATH", os.defpath)}
        return await confinement.run(
            ConfinedCommand(["git", "version"], variables, directory, devnull_fd, devnull_fd, devnull_fd)
        )
    finally:
        os.close(devnull_fd)


async def _run_true(
    runtime: Runtime, handle: SandboxHandle, disk: Path, hierarchies: cgroups.Hierarchies, memory_bytes: int
) -> frozenset[str]:
    program = "/opt/agent/true"
    spec = SandboxSpec(handle.attempt_id, disk, 1, memory_bytes, processes_max=16, programs={disk / "true": program})
    sandbox = await runtime.create(handle, spec)
    limits = hierarchies.group(handle.attempt_id).limits()
    _, errors = await sandbox.start(Command([program], {}, SANDBOX_WORKSPACE))
    exit_status = await sandbox.wait()
    if exit_status.code != 0:
        still_running = "did not exit before its sandbox ended"
        end_description = (
            still_running if exit_status.code is None else f"exited with code {exit_status.code} in a sandbox"
        )
        stderr = (await errors.read(4096)).decode(errors="replace").strip().removesuffix(".")
        raise SandboxError(f"'true' {end_description}{': ' if stderr else ''}{stderr}.")
    return limits
