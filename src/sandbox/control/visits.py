"""Shells in what failed tasks left."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import msgspec

from sandbox.contracts.placement import (
    Placement,
    RunnerControl,
    RunnerUnreachableError,
    TerminalOrder,
)
from sandbox.contracts.profiles import Image, ImageUnusableError
from sandbox.contracts.secret_source import SecretUnavailableError
from sandbox.contracts.tasks import SandboxNotPreservedError, UnavailableError
from sandbox.contracts.terminals import TerminalLine, TerminalRefusedError
from sandbox.control.launch import ResolveSecrets
from sandbox.control.preservation import Preservation
from sandbox.control.runtime_prober import RuntimeProber
from sandbox.model.errors import reason_of
from sandbox.model.limits import VISIT_START_SECONDS
from sandbox.model.task import Task

_POLL_SECONDS = 0.05


class Visits:
    """Starts a runner for whoever comes first, and sends those who come meanwhile to it.

    The runner holds a lock beside the kept files, handed over as a journal's is: one sandbox a disk, and none that
    is released under somebody's feet.
    """

    def __init__(
        self,
        placement: Placement,
        runners: RunnerControl,
        preservation: Preservation,
        resolve: ResolveSecrets,
        find_image: Callable[[str], Image | None],
        prober: RuntimeProber,
    ) -> None:
        self._placement = placement
        self._runners = runners
        self._preservation = preservation
        self._resolve = resolve
        self._find_image = find_image
        self._prober = prober

    async def open_terminal(self, task: Task, order: TerminalOrder) -> TerminalLine:
        """A shell in what a failed task left. Raises TerminalRefusedError, UnavailableError."""
        try:
            return await self._open(task, order)
        except SandboxNotPreservedError as error:
            raise TerminalRefusedError(error.message) from error
        except OSError as error:
            reason = reason_of(error)
            raise UnavailableError(f"No shell of task {task.id} can be opened: {reason}; try again.") from error

    async def _open(self, task: Task, order: TerminalOrder) -> TerminalLine:
        """Raises what `open_terminal` does, SandboxNotPreservedError, OSError."""
        if not self._preservation.is_kept(task):
            raise SandboxNotPreservedError(task)
        if order.agent:
            raise TerminalRefusedError(f"The agent of task {task.id} has ended; open a shell in what it left.")
        deadline = asyncio.get_running_loop().time() + VISIT_START_SECONDS
        has_launched = False
        while asyncio.get_running_loop().time() < deadline:
            with suppress(RunnerUnreachableError):
                return await self._runners.open_terminal(self._preservation.attempt_of(task) or "", order)
            with self._preservation.holding(task) as lock_fd:
                if lock_fd is not None and has_launched:
                    break
                if lock_fd is not None:
                    await self._launch(task, lock_fd)
                    has_launched = True
            await asyncio.sleep(_POLL_SECONDS)
        raise UnavailableError(f"No sandbox could be made of what task {task.id} left; its runner.log tells more.")

    async def _launch(self, task: Task, lock_fd: int) -> None:
        """Raises TerminalRefusedError where another try would be no better, UnavailableError."""
        if (obstacle := self._prober.obstacle) is not None:
            problem = f"No shell of task {task.id} can be opened. {obstacle}"
            raise UnavailableError(problem, retry_after_seconds=self._prober.retry_after_seconds)
        secrets = await self._secrets(task)
        try:
            if not await asyncio.to_thread(self._preservation.was_made_with, task, secrets):
                reason = "its secrets have other values now than its agent had, which could not be redacted"
                raise UnavailableError(f"No shell of task {task.id} can be opened: {reason}.")
            order = msgspec.structs.replace(
                self._prober.result.template,
                task_id=task.id,
                attempt_id=self._preservation.attempt_of(task) or "",
                upstream=None,
                secrets=secrets,
                image=await asyncio.to_thread(self._find_image, task.manifest.vm.profile),
                visit=True,
            )
            await self._placement.launch(order, lock_fd)
        except ImageUnusableError as error:
            raise TerminalRefusedError(f"No shell of task {task.id} can be opened: {error.message}") from error
        except OSError as error:
            raise UnavailableError(f"No runner could be started: {error}; try again.") from error

    async def _secrets(self, task: Task) -> dict[str, str]:
        """They are for redaction only, and without them nobody may see what the agent left."""
        try:
            return dict(await self._resolve(task.manifest.secrets))
        except SecretUnavailableError as error:
            reason = error.detail  # only operators open terminals
        except Exception as error:
            # Whatever else it says may hold a value, so it is no cause of what is raised either.
            reason = f"the secrets could not be resolved ({type(error).__name__}); look at where they come from."
        problem = f"No shell of task {task.id} can be opened. What it shows could not be redacted: {reason}"
        raise UnavailableError(problem)
