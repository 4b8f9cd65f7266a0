"""What gVisor can do on this machine, found out by making a sandbox."""

import os
from pathlib import Path

from sandbox.contracts.runtime import Probe, Runtime
from sandbox.model.errors import SandboxError
from sandbox.runtimes import cgroups
from sandbox.runtimes.trying import missing_limits, try_once

NAME = "gvisor"
TIER = "gvisor"
_STRENGTH = 20
_PROGRAMS = (Path("/usr/bin/runsc"), Path("/usr/local/bin/runsc"))
_MEMORY_BYTES = 256 * 1024 * 1024

_ISOLATES = (
    "system calls: answered by a kernel of the sandbox's own, a program that may call little of the host's",
    "files: the host's /usr read-only, the workspace, a home and /tmp, nothing else",
    "processes, users, host name, IPC: of that kernel, unknown to the host's",
    "network: a namespace of its own in which only the gateway listens",
    "privileges: none on the host, not even those of an ordinary user; a kernel uid of its own",
)
_GAPS = (
    "the agent's own programs can read its environment, because gVisor runs only programs that can be read",
    "TCP and UDP are the host kernel's, in the sandbox's own network namespace",
    "out of memory ends the whole sandbox and not one process of it",
    "that no more processes could be made is felt by the agent, and not told in the task",
    "each start takes about 0.2 s, and calls to files take longer than on the host's kernel",
)


def find_program() -> str | None:
    """runsc's path, from fixed places and not from PATH."""
    return next((str(path) for path in _PROGRAMS if os.access(path, os.X_OK)), None)


async def probe_by_trying(runtime: Runtime, run_dir: Path, hierarchies: cgroups.Hierarchies) -> Probe:
    """Create, run `true`, destroy; within 10 s."""
    if find_program() is None:
        return _failing("runsc is missing; install it: apt-get install runsc", is_final=os.getuid() != 0)
    if os.getuid() != 0:
        mend = "gVisor needs two kernel uids a sandbox, which only root can give; run the server as root."
        return _failing(mend, is_final=True)
    try:
        limits = await try_once(runtime, run_dir, hierarchies, memory_bytes=_MEMORY_BYTES)
    except (SandboxError, OSError, TimeoutError) as error:
        return _failing(str(error))
    gaps = (*_GAPS, *missing_limits(limits))
    return Probe(NAME, works=True, tier=TIER, strength=_STRENGTH, isolates=_ISOLATES, gaps=gaps, limits=limits)


def _failing(mend: str, *, is_final: bool = False) -> Probe:
    return Probe(NAME, works=False, tier=TIER, strength=_STRENGTH, mend=mend, is_final=is_final)
