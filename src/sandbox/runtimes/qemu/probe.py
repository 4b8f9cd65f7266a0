"""What QEMU can do on this machine, found out by booting a guest."""

import os
from pathlib import Path
from typing import Protocol

from sandbox.contracts.runtime import Probe, Runtime
from sandbox.model.errors import SandboxError
from sandbox.runtimes import cgroups
from sandbox.runtimes.qemu.kvm import KvmFinding
from sandbox.runtimes.qemu.machine import Accelerator
from sandbox.runtimes.qemu.parts import find_parts
from sandbox.runtimes.qemu.sandbox import BootError
from sandbox.runtimes.trying import missing_limits, try_once

NAME = "qemu"
TIER = "vm"
_STRENGTH = 30
_MEMORY_BYTES = 128 * 1024 * 1024
_EMULATED_SECONDS = 60.0
_KVM_SECONDS = 10.0
_NEEDS_KVM = "KVM does not work here, so every instruction would be emulated: ask for the runtime by its name, qemu."

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
_GAP_EMULATED = "no KVM: all is emulated, five to twenty times slower, and QEMU promises no isolation by its emulator"


class Guests(Runtime, Protocol):
    """What is probed: a runtime that knows its control groups, and what its last guest booted with."""

    hierarchies: cgroups.Hierarchies
    booted_by: Accelerator | None


async def probe_by_trying(runtime: Guests, run_dir: Path, kvm: KvmFinding, *, only_kvm: bool) -> Probe:
    """Create, run `true`, destroy."""
    if os.uname().machine != "x86_64":
        return _failing("The qemu runtime is for x86_64; use another runtime.", is_final=True)
    if os.getuid() != 0:
        mend = "Only root can read the agent's program for a guest; use another runtime, or run as root."
        return _failing(mend, is_final=True)
    try:
        find_parts()
        kvm.forget()
        if kvm.is_there() and await kvm.is_too_slow():
            kvm.note_failure()
        if only_kvm and not kvm.may_work():
            return _failing(_NEEDS_KVM)
        seconds = _KVM_SECONDS if only_kvm else _EMULATED_SECONDS
        limits = await try_once(
            runtime, run_dir, runtime.hierarchies, memory_bytes=_MEMORY_BYTES, within_seconds=seconds
        )
    except (SandboxError, OSError, TimeoutError) as error:
        has_not_booted = isinstance(error, TimeoutError) or isinstance(error.__cause__, BootError)
        return _failing(_NEEDS_KVM if only_kvm and has_not_booted else str(error))
    has_kvm = runtime.booted_by is Accelerator.KVM
    return Probe(
        NAME,
        works=True,
        tier=TIER,
        strength=_STRENGTH,
        isolates=_ISOLATES,
        gaps=(*_GAPS, *(() if has_kvm else (_GAP_EMULATED,)), *missing_limits(limits)),
        limits=limits,
        only_by_name=not has_kvm,
    )


def _failing(mend: str, *, is_final: bool = False) -> Probe:
    return Probe(NAME, works=False, tier=TIER, strength=_STRENGTH, mend=mend, is_final=is_final)
