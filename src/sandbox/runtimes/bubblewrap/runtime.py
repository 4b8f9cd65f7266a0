"""The bubblewrap `Runtime`."""

import os
from pathlib import Path

from sandbox.interfaces.runtime import Listeners, Runtime, RuntimeProbe, SandboxHandle, SandboxSpec
from sandbox.model.errors import SandboxError
from sandbox.runtimes.base_runtime import BaseRuntime
from sandbox.runtimes.base_sandbox import SandboxSetup
from sandbox.runtimes.bubblewrap.command_line import exposed_entries, exposed_paths
from sandbox.runtimes.bubblewrap.disk_root import prepare_disk_root
from sandbox.runtimes.bubblewrap.sandbox import BubblewrapSandbox
from sandbox.runtimes.bubblewrap_command import find_bwrap, require_bwrap
from sandbox.runtimes.kernel_uid_pool import SANDBOX_UIDS
from sandbox.runtimes.launcher_client import LauncherProcess, start_launcher
from sandbox.runtimes.limits import cgroups
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.runtimes.probe import RuntimeProperties, run_probe
from sandbox.runtimes.seccomp import syscall_filter

NAME = "bubblewrap"
TIER = "namespaces"
_MEMORY_BYTES = 64 * 1024 * 1024

_PROPERTIES = RuntimeProperties(
    NAME,
    TIER,
    strength=10,
    isolation_notes=(
        "files: only the host's /usr (read-only), the workspace, a home directory and /tmp",
        "processes, users, host name, IPC and control groups: separate namespaces",
        "network: a separate namespace in which only the gateway listens",
        "privileges: no capabilities, no new privileges, a system call filter",
    ),
    gaps=(
        "the host's kernel is shared: a vulnerability in it affects the sandbox",
        "the host path of the workspace is visible inside (/proc/self/mountinfo)",
        "32-bit programs do not run",
    ),
)
_SHARED_UID_GAP = "sandboxes of an ordinary user share that user's kernel uid; as root each has a separate one"
_SYSCTLS = (
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"),
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("user/max_net_namespaces", "0", "sysctl -w user.max_net_namespaces=15000"),
)


async def probe_bubblewrap(runtime: Runtime, run_dir: Path, hierarchies: cgroups.Hierarchies) -> RuntimeProbe:
    """Create a sandbox, run `true` in it and destroy it, within 10 s."""
    if os.uname().machine not in syscall_filter.ARCHITECTURES:
        remedy = f"There is no system call filter for {os.uname().machine}; use another runtime."
        return _PROPERTIES.unavailable_probe(remedy, is_permanent=True)
    if find_bwrap() is None:
        return _PROPERTIES.unavailable_probe("bubblewrap is missing; install it: apt-get install bubblewrap")
    try:
        limits = await run_probe(runtime, run_dir, hierarchies, memory_bytes=_MEMORY_BYTES)
    except (SandboxError, OSError, TimeoutError) as error:
        return _PROPERTIES.unavailable_probe(_explain_failure(str(error)))
    return _PROPERTIES.available_probe(limits, more_gaps=() if os.getuid() == 0 else (_SHARED_UID_GAP,))


def _explain_failure(reason: str) -> str:
    """Return the reason for a failed probe, with the likely remedy."""
    reason = reason.removesuffix(".")
    for name, failing_value, remedy in _SYSCTLS:
        setting = Path("/proc/sys", name)
        if setting.exists() and setting.read_text().strip() == failing_value:
            return f"The kernel does not allow users to create namespaces; allow it: {remedy} ({reason})"
    return f"{reason}. User namespaces must be allowed for ordinary users; some containers forbid them."


class BubblewrapDriver:
    """The launcher execs bubblewrap. All processes and files have the same kernel uid."""

    name = NAME

    def find_program(self) -> str:
        """Return bubblewrap's path."""
        return require_bwrap()

    def files_uid(self, kernel_uid: int) -> int:
        """Return the kernel uid itself."""
        return kernel_uid

    def host_threads_max(self, processes_max: int) -> int:
        """Return `processes_max`, because a process in the sandbox is a process of the host."""
        return processes_max

    def start_launcher(self, spec: SandboxSpec, kernel_uid: int | None) -> LauncherProcess:
        """Start the launcher, which exposes the disk, the programs and the system files for bubblewrap."""
        prepare_disk_root(spec)
        return start_launcher(
            spec.attempt_id,
            kernel_uid,
            exposed_paths(spec),
            entries=exposed_entries(spec),
            transparent_ports=spec.transparent_ports,
        )

    def create_sandbox(
        self,
        handle: SandboxHandle,
        spec: SandboxSpec,
        group: ControlGroup,
        launcher: LauncherProcess,
        listeners: Listeners,
    ) -> BubblewrapSandbox:
        """Create the sandbox object for a launcher that is ready."""
        return BubblewrapSandbox(SandboxSetup(handle, spec, self.find_program(), group, launcher, listeners))


class BubblewrapRuntime(BaseRuntime):
    """Sandboxes on the host's kernel.

    run_dir: private directory with a short path, for the probe's files.
    """

    name = NAME
    tier = TIER

    def __init__(self, run_dir: Path, uid_range: range = SANDBOX_UIDS) -> None:
        super().__init__(BubblewrapDriver(), uid_range)
        self._run_dir = run_dir

    async def probe(self) -> RuntimeProbe:
        """Create a sandbox, run `true` in it and destroy it."""
        return await probe_bubblewrap(self, self._run_dir, self.hierarchies)
