"""The `Runtime` that makes sandboxes with bubblewrap."""

from pathlib import Path

from sandbox.contracts.runtime import Listeners, Probe, SandboxHandle, SandboxSpec
from sandbox.runtimes.bubblewrap.arguments import staged_paths
from sandbox.runtimes.bubblewrap.probe import NAME, TIER, probe_by_trying
from sandbox.runtimes.bubblewrap.sandbox import BubblewrapSandbox
from sandbox.runtimes.bwrap import need_program
from sandbox.runtimes.cgroups import ControlGroup
from sandbox.runtimes.kernel_uid import SANDBOX_UIDS
from sandbox.runtimes.launch import Launch, start_launcher
from sandbox.runtimes.launched import Made
from sandbox.runtimes.launching import LaunchedSandboxes


class BubblewrapKind:
    """The launcher becomes bubblewrap, and everything is of the one kernel uid."""

    name = NAME

    def find_program(self) -> str:
        """bubblewrap's path."""
        return need_program()

    def files_uid(self, kernel_uid: int) -> int:
        """The same."""
        return kernel_uid

    def count_tasks(self, processes_max: int) -> int:
        """As many."""
        return processes_max

    def launch(self, spec: SandboxSpec, kernel_uid: int | None) -> Launch:
        """Lay the disk's places and the programs for bubblewrap to bind."""
        return start_launcher(spec.attempt_id, kernel_uid, staged_paths(spec), transparent_ports=spec.transparent_ports)

    def make_sandbox(
        self, handle: SandboxHandle, spec: SandboxSpec, group: ControlGroup, launch: Launch, listeners: Listeners
    ) -> BubblewrapSandbox:
        """Of a launcher that is ready."""
        return BubblewrapSandbox(Made(handle, spec, self.find_program(), group, launch, listeners))


class BubblewrapRuntime(LaunchedSandboxes):
    """Sandboxes on the host's own kernel.

    run_dir: a short private directory, for what the probe makes.
    """

    name = NAME
    tier = TIER

    def __init__(self, run_dir: Path, uid_range: range = SANDBOX_UIDS) -> None:
        super().__init__(BubblewrapKind(), uid_range)
        self._run_dir = run_dir

    async def probe(self) -> Probe:
        """Make a sandbox, run `true` in it, end it."""
        return await probe_by_trying(self, self._run_dir, self.hierarchies)
