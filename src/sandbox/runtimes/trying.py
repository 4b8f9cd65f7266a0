"""Finding out what a runtime can do here, by making a sandbox with an execute-only program, as agents are."""

import asyncio
import base64
import os
from pathlib import Path

from sandbox.contracts.inside import WORKSPACE
from sandbox.contracts.layout import probe_place
from sandbox.contracts.runtime import Command, Runtime, SandboxHandle, SandboxSpec
from sandbox.model.errors import SandboxError
from sandbox.runtimes import cgroups

_SECONDS = 8.0


async def try_once(
    runtime: Runtime,
    run_dir: Path,
    hierarchies: cgroups.Hierarchies,
    *,
    memory_bytes: int,
    within_seconds: float = _SECONDS,
) -> frozenset[str]:
    """Create, run a copy of `true`, destroy, within 10 s; gives the limits that hold.

    Raises SandboxError, OSError, TimeoutError.
    """
    import shutil

    attempt_id = base64.b32encode(os.urandom(10)).decode().lower()[:12]
    disk = probe_place(run_dir, attempt_id)
    async with asyncio.timeout(within_seconds):
        handle = runtime.plan(attempt_id)
        try:
            disk.mkdir(parents=True, mode=0o700)
            shutil.copyfile("/usr/bin/true", disk / "true")
            (disk / "true").chmod(0o111)
            return await _run_true(runtime, handle, disk, hierarchies, memory_bytes)
        finally:
            await runtime.destroy(handle, disk)
            shutil.rmtree(disk, ignore_errors=True)


def missing_limits(limits: frozenset[str]) -> tuple[str, ...]:
    """The gap, where not all limits hold."""
    missing = [name for name in ("memory", "cpus", "processes") if name not in limits]
    return (f"no control group limits {', '.join(missing)}",) if missing else ()


async def _run_true(
    runtime: Runtime, handle: SandboxHandle, disk: Path, hierarchies: cgroups.Hierarchies, memory_bytes: int
) -> frozenset[str]:
    program = "/opt/agent/true"
    spec = SandboxSpec(handle.attempt_id, disk, 1, memory_bytes, processes_max=16, programs={disk / "true": program})
    sandbox = await runtime.create(handle, spec)
    limits = hierarchies.group(handle.attempt_id).limits()
    _, errors = await sandbox.start(Command([program], {}, WORKSPACE))
    exit_ = await sandbox.wait()
    if exit_.code != 0:
        said = (await errors.read(4096)).decode(errors="replace").strip()
        raise SandboxError(f"'true' ended with {exit_.code} in a sandbox: {said}")
    return limits
