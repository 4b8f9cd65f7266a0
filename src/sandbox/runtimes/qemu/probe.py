"""What QEMU can do on this machine, found out by booting a guest."""

import os
from pathlib import Path

from sandbox.contracts.runtime import Probe, Runtime
from sandbox.model.errors import SandboxError
from sandbox.runtimes import cgroups
from sandbox.runtimes.trying import missing_limits, try_once

NAME = "qemu"
TIER = "virtual machine"
_STRENGTH = 30
_MEMORY_BYTES = 128 * 1024 * 1024

_ISOLATES = (
    "kernel: one of its own; the host's is reached only through QEMU and virtiofsd",
    "files: the host's /usr read-only, the workspace, a home and /tmp, nothing else",
    "network: none but QEMU's, which dials where only the gateway listens",
    "QEMU and virtiofsd: in a sandbox of namespaces themselves, with a system call filter and without privileges",
)
_GAPS = (
    "a hole in QEMU or virtiofsd leads to a sandbox of namespaces, on the host's kernel",
    "a task needs 544 MiB of the host's memory more than it asks for",
)
_GAP_EMULATED = "no KVM: every instruction is emulated, five to twenty times slower"


async def probe_by_trying(runtime: Runtime, run_dir: Path, hierarchies: cgroups.Hierarchies) -> Probe:
    """Create, run `true`, destroy; within 10 s."""
    if os.uname().machine != "x86_64":
        return _failing("The qemu runtime is for x86_64; use another runtime.")
    if os.getuid() != 0:
        return _failing("Only root can read the agent's program for a guest; use another runtime, or run as root.")
    try:
        limits = await try_once(runtime, run_dir, hierarchies, memory_bytes=_MEMORY_BYTES)
    except (SandboxError, OSError, TimeoutError) as error:
        return _failing(str(error) or "A guest did not boot in time.")
    gaps = (*_GAPS, _GAP_EMULATED, *missing_limits(limits))
    return Probe(
        NAME,
        works=True,
        tier=TIER,
        strength=_STRENGTH,
        isolates=_ISOLATES,
        gaps=gaps,
        limits=limits,
        only_by_name=True,
    )


def _failing(mend: str) -> Probe:
    return Probe(NAME, works=False, tier=TIER, strength=_STRENGTH, mend=mend)
