"""The gVisor `Runtime`, which runs runsc."""

import os
from pathlib import Path

from sandbox.interfaces.runtime import Listeners, Runtime, RuntimeProbe, SandboxHandle, SandboxSpec
from sandbox.model.errors import SandboxError
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runtimes.base_runtime import BaseRuntime
from sandbox.runtimes.base_sandbox import SandboxSetup
from sandbox.runtimes.gvisor.bundle import exposed_entries
from sandbox.runtimes.gvisor.sandbox import GvisorSandbox
from sandbox.runtimes.kernel_uid_pool import FILES_UIDS_OFFSET, SANDBOX_UIDS
from sandbox.runtimes.launcher_client import LauncherProcess, start_launcher
from sandbox.runtimes.limits import cgroups
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.runtimes.probe import RuntimeProperties, run_probe
from sandbox.runtimes.rootfs_spec import DISK_DIRECTORIES
from sandbox.runtimes.seccomp import syscall_filter

NAME = "gvisor"
TIER = "gvisor"
_PROGRAMS = (Path("/usr/bin/runsc"), Path("/usr/local/bin/runsc"))
_MEMORY_BYTES = 256 * 1024 * 1024

_PROPERTIES = RuntimeProperties(
    NAME,
    TIER,
    strength=20,
    isolation_notes=(
        "system calls: handled by gVisor's kernel, a program that may use few system calls of the host",
        "files: only the host's /usr (read-only), the workspace, a home directory and /tmp",
        "processes, users, host name, IPC: exist only in gVisor's kernel",
        "network: a separate namespace in which only the gateway listens",
        "privileges: none on the host; a separate kernel uid",
    ),
    gaps=(
        "the agent's own programs can read the agent's environment, because gVisor runs only readable programs",
        "TCP and UDP are handled by the host's kernel, in the sandbox's own network namespace",
        "running out of memory ends the whole sandbox, not one process",
        "reaching the process limit is visible to the agent, but not shown in the task's status",
        "each start takes about 0.2 s, and file operations take longer than on the host's kernel",
    ),
)


def find_runsc() -> str | None:
    """Return runsc's path. Looks in fixed locations, not in PATH."""
    return next((str(path) for path in _PROGRAMS if os.access(path, os.X_OK)), None)


async def probe_gvisor(runtime: Runtime, run_dir: Path, hierarchies: cgroups.Hierarchies) -> RuntimeProbe:
    """Create a sandbox, run `true` in it and destroy it, within 10 s."""
    if find_runsc() is None:
        return _PROPERTIES.unavailable_probe(
            "runsc is missing; install it: apt-get install runsc", is_permanent=os.getuid() != 0
        )
    if os.getuid() != 0:
        remedy = "gVisor needs two kernel uids per sandbox, which only root can set; run the server as root."
        return _PROPERTIES.unavailable_probe(remedy, is_permanent=True)
    try:
        limits = await run_probe(runtime, run_dir, hierarchies, memory_bytes=_MEMORY_BYTES)
    except (SandboxError, OSError, TimeoutError) as error:
        return _PROPERTIES.unavailable_probe(str(error))
    return _PROPERTIES.available_probe(limits)


_THREADS_PER_PROCESS = 4
"""Maximum number of host threads for each process in the sandbox."""

_GVISOR_KERNEL_THREADS = 256
"""Maximum number of host threads of gVisor itself."""


class GvisorDriver:
    """The launcher execs runsc. gVisor runs under the kernel uid; the agent's files have a uid that no process uses."""

    name = NAME

    def find_program(self) -> str:
        """Return runsc's path. Raises AttemptError (provision_failed) if it is missing."""
        program = find_runsc()
        if program is None:
            raise AttemptError(FailureCode.PROVISION_FAILED, "runsc is missing; install it (package runsc).")
        return program

    def files_uid(self, kernel_uid: int) -> int:
        """Return the uid that is mapped to 1000 in the sandbox."""
        return kernel_uid + FILES_UIDS_OFFSET

    def host_threads_max(self, processes_max: int) -> int:
        """Return a limit higher than gVisor's own process limit, in case gVisor does not enforce its limit."""
        return processes_max * _THREADS_PER_PROCESS + _GVISOR_KERNEL_THREADS

    def start_launcher(self, spec: SandboxSpec, kernel_uid: int | None) -> LauncherProcess:
        """Start the launcher, which exposes the sandbox's complete file system. Raises OSError, AttemptError."""
        if kernel_uid is None:
            raise AttemptError(FailureCode.PROVISION_FAILED, "gVisor needs root; run the server as root.")
        paths_by_name = {name: spec.disk / name for name in DISK_DIRECTORIES}
        files_uid = self.files_uid(kernel_uid)
        return start_launcher(
            spec.attempt_id,
            kernel_uid,
            paths_by_name,
            files_uid=files_uid,
            entries=exposed_entries(spec),
            seccomp_filter=syscall_filter.assemble_socket_and_extent_filter(os.uname().machine),
            transparent_ports=spec.transparent_ports,
        )

    def create_sandbox(
        self,
        handle: SandboxHandle,
        spec: SandboxSpec,
        group: ControlGroup,
        launcher: LauncherProcess,
        listeners: Listeners,
    ) -> GvisorSandbox:
        """Create the sandbox object for a launcher that is ready."""
        return GvisorSandbox(SandboxSetup(handle, spec, self.find_program(), group, launcher, listeners))


class GvisorRuntime(BaseRuntime):
    """Sandboxes on gVisor's kernel. Needs root.

    run_dir: private directory with a short path, for the probe's files.
    """

    name = NAME
    tier = TIER

    def __init__(self, run_dir: Path, uid_range: range = SANDBOX_UIDS) -> None:
        super().__init__(GvisorDriver(), uid_range)
        self._run_dir = run_dir

    async def probe(self) -> RuntimeProbe:
        """Create a sandbox, run `true` in it and destroy it."""
        return await probe_gvisor(self, self._run_dir, self.hierarchies)
