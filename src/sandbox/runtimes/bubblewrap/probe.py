"""What bubblewrap can do on this machine, found out by making a sandbox."""

import asyncio
import base64
import os
from pathlib import Path

from sandbox.contracts.inside import WORKSPACE
from sandbox.contracts.runtime import Command, Probe, Runtime, SandboxHandle, SandboxSpec
from sandbox.model.errors import SandboxError
from sandbox.runtimes import cgroups, seccomp

NAME = "bubblewrap"
TIER = "namespaces"
_STRENGTH = 10
_PROGRAMS = (Path("/usr/bin/bwrap"), Path("/usr/local/bin/bwrap"), Path("/bin/bwrap"))
_PROBE_SECONDS = 8.0
_MEMORY_BYTES = 64 * 1024 * 1024

_ISOLATES = (
    "files: the host's /usr read-only, the workspace, a home and /tmp, nothing else",
    "processes, users, host name, IPC and control groups: namespaces of its own",
    "network: a namespace of its own in which only the gateway listens",
    "privileges: no capabilities, no new privileges, a filter on system calls",
)
_GAPS = (
    "the host's kernel is shared: a hole in it is a hole in the sandbox",
    "disk space is not limited",
    "the host's path of the workspace can be read inside (/proc/self/mountinfo)",
    "32-bit programs do not run",
)
_GAP_ONE_UID = "all sandboxes of an ordinary user have that user's kernel uid; as root each has its own"
_SYSCTLS = (
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("user/max_net_namespaces", "0", "sysctl -w user.max_net_namespaces=15000"),
)


def find_program() -> str | None:
    """bubblewrap's path, from fixed places and not from PATH."""
    return next((str(path) for path in _PROGRAMS if os.access(path, os.X_OK)), None)


async def probe_by_trying(runtime: Runtime, run_dir: Path, hierarchies: cgroups.Hierarchies) -> Probe:
    """Create, run `true`, destroy; within 10 s."""
    if os.uname().machine not in seccomp.ARCHITECTURES:
        return _failing(f"No system call filter is written for {os.uname().machine}; use another runtime.")
    if find_program() is None:
        return _failing("bubblewrap is missing; install it: apt-get install bubblewrap")
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            limits = await _try_once(runtime, run_dir, hierarchies)
    except (SandboxError, OSError, TimeoutError) as error:
        return _failing(_explain(str(error) or "It took too long."))
    gaps = (*_GAPS, *(() if os.getuid() == 0 else (_GAP_ONE_UID,)), *_missing_limits(limits))
    return Probe(NAME, works=True, tier=TIER, strength=_STRENGTH, isolates=_ISOLATES, gaps=gaps, limits=limits)


async def _try_once(runtime: Runtime, run_dir: Path, hierarchies: cgroups.Hierarchies) -> frozenset[str]:
    attempt_id = base64.b32encode(os.urandom(10)).decode().lower()[:12]
    disk = run_dir / f"probe-{attempt_id}"
    handle = runtime.plan(attempt_id)
    try:
        disk.mkdir(parents=True, mode=0o700)
        return await _run_true(runtime, handle, disk, hierarchies)
    finally:
        import shutil

        await runtime.destroy(handle, disk)
        shutil.rmtree(disk, ignore_errors=True)


async def _run_true(
    runtime: Runtime, handle: SandboxHandle, disk: Path, hierarchies: cgroups.Hierarchies
) -> frozenset[str]:
    spec = SandboxSpec(handle.attempt_id, disk, cpus=1, memory_bytes=_MEMORY_BYTES, processes_max=16)
    sandbox = await runtime.create(handle, spec)
    limits = hierarchies.group(handle.attempt_id).limits()
    _, errors = await sandbox.start(Command(["/usr/bin/true"], {}, WORKSPACE))
    exit_ = await sandbox.wait()
    if exit_.code != 0:
        said = (await errors.read(4096)).decode(errors="replace").strip()
        raise SandboxError(f"'true' ended with {exit_.code} in a sandbox: {said}")
    return limits


def _failing(mend: str) -> Probe:
    return Probe(NAME, works=False, tier=TIER, strength=_STRENGTH, mend=mend)


def _missing_limits(limits: frozenset[str]) -> tuple[str, ...]:
    missing = [name for name in ("memory", "cpus", "processes") if name not in limits]
    return (f"no control group limits {', '.join(missing)}",) if missing else ()


def _explain(reason: str) -> str:
    """The setting that is known to forbid user namespaces, where there is one, before what was said."""
    for name, bad, mend in _SYSCTLS:
        setting = Path("/proc/sys", name)
        if setting.exists() and setting.read_text().strip() == bad:
            return f"The kernel does not let users make namespaces; allow it: {mend} ({reason})"
    return f"{reason} User namespaces must be allowed for ordinary users; some containers forbid them."
