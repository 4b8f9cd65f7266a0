"""Debug session: a new sandbox on a preserved disk, for shells, without an agent, a gateway or a journal."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path, PurePosixPath

import msgspec

from sandbox.interfaces.agent import AgentLaunchSpec
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import Disk
from sandbox.interfaces.images import Image, ImageLocks
from sandbox.interfaces.runtime import (
    DEFAULT_GIT_AUTHOR,
    NODE_DIRECTORY,
    SANDBOX_HOME,
    SANDBOX_USER,
    SANDBOX_WORKSPACE,
    Command,
    Runtime,
    Sandbox,
    SandboxSpec,
)
from sandbox.interfaces.task_file_layout import AttemptLayout
from sandbox.model.events import ErrorReported, Event
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import (
    DEBUG_SESSION_IDLE_TIMEOUT_SECONDS,
    DEBUG_SESSION_SECONDS_MAX,
    SANDBOX_PROCESSES_MAX,
)
from sandbox.model.manifest.schema import Manifest, Vm
from sandbox.primitives.concurrency import run_until_first_complete
from sandbox.runner.attempt_context import read_handle, write_handle
from sandbox.runner.task_limits import ExhaustionDetector
from sandbox.runner.terminals import PAUSE_COMMAND, SHELL, SandboxTerminals, TerminalServer, shell_environment

_log = logging.getLogger(__name__)

_OUT_OF_SPACE_MESSAGE = "The disk of this shell is full; open another shell, or release the sandbox."

_PATH_DIRECTORIES = (
    f"{SANDBOX_HOME}/.local/bin",
    f"{NODE_DIRECTORY}/bin",
    *("/usr/local/bin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/sbin", "/sbin"),
)
_SHELL_VARIABLES = {
    "PATH": ":".join(_PATH_DIRECTORIES),
    "HOME": SANDBOX_HOME,
    "USER": SANDBOX_USER,
    "LOGNAME": SANDBOX_USER,
    "SHELL": SHELL[0],
    "LANG": "C.UTF-8",
    "TMPDIR": "/tmp",  # noqa: S108  (inside the sandbox, which has a separate /tmp)
}


def launch_spec_without_agent(manifest: Manifest) -> AgentLaunchSpec:
    """Return the parts of a launch spec that shells need, for a task whose agent this version does not have."""
    directory = str(PurePosixPath(SANDBOX_WORKSPACE, manifest.repository.subpath or "."))
    command = Command(SHELL, _SHELL_VARIABLES, directory)
    return AgentLaunchSpec(command, session_id="", programs={}, git_author=DEFAULT_GIT_AUTHOR)


ServeClients = Callable[[], AbstractAsyncContextManager[None]]


class DebugSessionRunner(msgspec.Struct, frozen=True):
    """Runs a sandbox for shells on a preserved disk.

    launch_spec: the agent's launch spec without secrets. Shells get its variables, except those for model access.
    """

    attempt_id: str
    layout: AttemptLayout
    vm: Vm
    launch_spec: AgentLaunchSpec
    image: Image | None
    runtime: Runtime
    disk: Disk
    image_locks: ImageLocks
    clock: Clock

    async def run(self, terminals: TerminalServer, serve_clients: ServeClients) -> None:
        """Run until the session ends. The disk remains preserved, including changes made in the session.

        serve_clients: accepts clients. Raises AttemptError (provision_failed, sandbox_lost).
        """
        await self._destroy_sandbox()
        await self._open_disk()
        try:
            sandbox = await self._create_sandbox()
            command = self.launch_spec.command
            variables = shell_environment(command.environment, self.launch_spec.model_variables)
            terminals.enable(SandboxTerminals(sandbox, variables, command.directory))
            async with serve_clients():
                await self._wait_until_over(sandbox, terminals)
        finally:
            terminals.disable()
            await self._destroy_sandbox()
            await self.disk.close()

    async def _destroy_sandbox(self) -> None:
        """Destroy the handle's sandbox, which belongs to this session or to an earlier one whose runner was killed."""
        handle = read_handle(self.layout.handle)
        if handle is not None:
            await self.runtime.destroy(handle, self.layout.disk)
            self.layout.handle.unlink()

    async def _create_sandbox(self) -> Sandbox:
        image = self.image
        if image is not None:
            self.image_locks.acquire(image)
        handle = self.runtime.prepare(self.attempt_id)
        write_handle(self.layout.handle, handle)
        spec = SandboxSpec(
            attempt_id=self.attempt_id,
            disk=self.layout.disk,
            cpus=self.vm.cpus,
            memory_bytes=self.vm.memory_bytes,
            processes_max=SANDBOX_PROCESSES_MAX,
            image=None if image is None else Path(image.directory),
            is_disk_reused=True,
            git_author=self.launch_spec.git_author,
        )
        sandbox = await self.runtime.create(handle, spec)
        # Nothing serves the gateway's sockets here: connections are refused immediately.
        sandbox.listeners.close()
        await sandbox.start(PAUSE_COMMAND)
        return sandbox

    async def _open_disk(self) -> None:
        """Open the disk. A full disk without an enforced size is enlarged, because the session needs some space."""
        disk, size_bytes = self.disk, self.vm.disk_bytes
        await disk.open(size_bytes)
        with contextlib.suppress(OSError):  # the disk watch handles errors
            while not disk.enforces_size and (use := await disk.measure_and_trim()).is_full:
                size_bytes = 2 * max(size_bytes, use.used_bytes)
                await disk.open(size_bytes)

    async def _wait_until_over(self, sandbox: Sandbox, terminals: TerminalServer) -> None:
        """Wait until all clients have left, the sandbox ends, a limit is exceeded or the maximum lifetime expires."""
        detector = ExhaustionDetector(self.vm, self.disk, _log_event)
        end = await run_until_first_complete(
            detector.watch_disk(self.clock),
            detector.watch_kernel_usage(sandbox),
            sandbox.wait(),
            terminals.wait_until_idle(DEBUG_SESSION_IDLE_TIMEOUT_SECONDS),
            asyncio.sleep(DEBUG_SESSION_SECONDS_MAX),
        )
        if isinstance(end, Failure):
            terminals.close_shells(_OUT_OF_SPACE_MESSAGE if end.code is FailureCode.DISK_FULL else end.message)


def _log_event(event: Event) -> None:
    """Log an error instead of recording it: a debug session has no journal."""
    if isinstance(event, ErrorReported):
        _log.warning("A debug session failed: %s", event.message)
