"""The `Runtime` that makes sandboxes with runsc."""

import os
from pathlib import Path

from sandbox.contracts.runtime import Listeners, Probe, SandboxHandle, SandboxSpec
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.runtimes import seccomp
from sandbox.runtimes.cgroups import ControlGroup
from sandbox.runtimes.gvisor.bundle import lay_out
from sandbox.runtimes.gvisor.probe import NAME, TIER, find_program, probe_by_trying
from sandbox.runtimes.gvisor.sandbox import GvisorSandbox
from sandbox.runtimes.kernel_uid import FILES_UIDS_OFFSET, SANDBOX_UIDS
from sandbox.runtimes.launch import Launch, start_launcher
from sandbox.runtimes.launched import Made
from sandbox.runtimes.launching import LaunchedSandboxes
from sandbox.runtimes.places import PLACES

_TASKS_PER_PROCESS = 4
_TASKS_OF_KERNEL = 256


class GvisorKind:
    """The launcher becomes runsc; gVisor is of the kernel uid, and the agent's files are of one that no process has."""

    name = NAME

    def find_program(self) -> str:
        """runsc's path."""
        program = find_program()
        if program is None:
            raise AttemptError(FailureCode.PROVISION_FAILED, "runsc is missing; install it (package runsc).")
        return program

    def files_uid(self, kernel_uid: int) -> int:
        """The one that is 1000 inside."""
        return kernel_uid + FILES_UIDS_OFFSET

    def count_tasks(self, processes_max: int) -> int:
        """gVisor itself keeps the limit; this one is above it, and keeps a gVisor that does not."""
        return processes_max * _TASKS_PER_PROCESS + _TASKS_OF_KERNEL

    def launch(self, spec: SandboxSpec, kernel_uid: int | None) -> Launch:
        """Lay the whole file system of the sandbox."""
        if kernel_uid is None:
            raise AttemptError(FailureCode.PROVISION_FAILED, "gVisor needs root; run the server as root.")
        places = {name: spec.disk / name for name in PLACES}
        files_uid = self.files_uid(kernel_uid)
        return start_launcher(
            spec.attempt_id,
            kernel_uid,
            places,
            agent_uid=files_uid,
            tree=lay_out(spec),
            shared_filter=seccomp.assemble_socket_filter(os.uname().machine),
            transparent_ports=spec.transparent_ports,
        )

    def make_sandbox(
        self, handle: SandboxHandle, spec: SandboxSpec, group: ControlGroup, launch: Launch, listeners: Listeners
    ) -> GvisorSandbox:
        """Of a launcher that is ready."""
        return GvisorSandbox(Made(handle, spec, self.find_program(), group, launch, listeners))


class GvisorRuntime(LaunchedSandboxes):
    """Sandboxes on gVisor's kernel, as root only.

    run_dir: a short private directory, for what the probe makes.
    """

    name = NAME
    tier = TIER

    def __init__(self, run_dir: Path, uid_range: range = SANDBOX_UIDS) -> None:
        super().__init__(GvisorKind(), uid_range)
        self._run_dir = run_dir

    async def probe(self) -> Probe:
        """Make a sandbox, run `true` in it, end it."""
        return await probe_by_trying(self, self._run_dir, self.hierarchies)
