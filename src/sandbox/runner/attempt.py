"""Runs one attempt: checks its order, and runs its steps until the attempt is closed."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import TypeVar

import msgspec

from sandbox.interfaces.runner import FinishAttempt, RunAttempt
from sandbox.model.disk_space import DISK_FULL_ERRNOS, transient_disk_error
from sandbox.model.errors import SandboxError
from sandbox.model.events import AttemptStarted, ErrorReported, Record
from sandbox.model.failure import AttemptError, Failure, FailureCode
from sandbox.model.task import Task
from sandbox.runner.attempt_closing import AttemptCloser, describe_error
from sandbox.runner.attempt_context import AttemptContext
from sandbox.runner.steps.prepare_workspace import PrepareWorkspaceStep
from sandbox.runner.steps.provision import ProvisionStep
from sandbox.runner.steps.run import RunStep

T = TypeVar("T")
_log = logging.getLogger(__name__)


class StaleOrderError(SandboxError):
    """The order is for an attempt that is over, or that another runner has already started."""

    code = "internal_error"


def check_order_is_current(order: RunAttempt | FinishAttempt, task: Task | None, last_record: Record | None) -> Task:
    """Check that the order is not stale, and return its task.

    Call this function while holding the journal's lock, before the first step.

    A RunAttempt order is current only directly after the AttemptStarted record, because an attempt is started once. A
    FinishAttempt order is current if its attempt is the last one of an unfinished task. last_record: the newest
    record. Raises StaleOrderError.
    """
    if task is None or task.attempt is None or task.attempt.id != order.attempt_id or task.state.is_final:
        raise StaleOrderError(f"Task {order.task_id} has no running attempt {order.attempt_id}.")
    event = last_record.event if last_record is not None else None
    is_just_started = isinstance(event, AttemptStarted) and event.attempt_id == order.attempt_id
    if isinstance(order, RunAttempt) and not is_just_started:
        raise StaleOrderError(f"Attempt {order.attempt_id} was started by another runner.")
    return task


class AttemptStoppedError(Exception):
    """The attempt was asked to stop; the journal contains the reason."""


class AttemptRunner(msgspec.Struct, frozen=True):
    """Runs one attempt."""

    attempt: AttemptContext
    stage: PrepareWorkspaceStep
    provision: ProvisionStep
    run_step: RunStep
    closer: AttemptCloser

    async def run(self) -> None:
        """Run all steps: stage, provision, run, collect and teardown. Always write a final record.

        It ends the task, or only the attempt if another one follows.
        """
        self.attempt.recorder.allocate_reserve()
        async with self.attempt.recorder.flushing_periodically():
            self._record_unredacted_secrets()
            await self._run_steps()
            if self.attempt.resumes:
                # The attempt may have failed before taking over the previous disk, which holds the agent's work.
                await self.closer.reattach_disk()
            await self.closer.follow_up_or_end()

    def _record_unredacted_secrets(self) -> None:
        redactor = self.attempt.redactor
        for name in redactor.unsearchable_secret_names if redactor is not None else ():
            message = f"The value of {name} is under 8 characters, too short to be redacted from logs and artifacts."
            self.attempt.recorder.record(ErrorReported("secret_not_redacted", message))

    async def _run_steps(self) -> None:
        lifecycle = self.attempt.task.manifest.lifecycle
        try:
            await self._run_step(
                self.stage.run(),
                lifecycle.stage_timeout_seconds,
                Failure(FailureCode.STAGE_TIMEOUT, "Cloning took too long; raise lifecycle.stage_timeout."),
            )
            provisioned = await self._run_step(
                self.provision.run(),
                lifecycle.provision_timeout_seconds,
                Failure(
                    FailureCode.PROVISION_TIMEOUT,
                    "Creating the sandbox took too long; raise lifecycle.provision_timeout.",
                ),
            )
            await self.run_step.run(provisioned)
        except AttemptStoppedError:
            pass
        except AttemptError as error:
            self.attempt.record_failure(error.failure)
        except Exception as error:
            _log.error("A step failed", exc_info=error)
            self.attempt.record_failure(_to_failure(error))

    async def _run_step(self, step: Coroutine[None, None, T], timeout_seconds: float, timeout_failure: Failure) -> T:
        """Run a step until it finishes, the attempt is asked to stop, or the timeout expires."""
        stop_requested = self.attempt.recorder.stop_request.requested
        work = asyncio.ensure_future(step)
        stop = asyncio.ensure_future(stop_requested.wait())
        try:
            await asyncio.wait({work, stop}, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not stop_requested.is_set():
                return work.result()
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)
        if not stop_requested.is_set():
            raise AttemptError(timeout_failure.code, timeout_failure.message)
        raise AttemptStoppedError


def _to_failure(error: Exception) -> Failure:
    description = describe_error(error)
    disk_error = transient_disk_error(error)
    if disk_error is not None and disk_error.errno in DISK_FULL_ERRNOS:
        message = f"No space was left ({description}); raise vm.disk, or free space in the server's data directory."
        return Failure(FailureCode.DISK_FULL, message)
    if disk_error is not None:
        remedy = "check the disk and the kernel log, and submit the task again"
        message = f"A disk of the server failed ({description}); {remedy}."
        return Failure(FailureCode.INTERNAL, message)
    return Failure(FailureCode.INTERNAL, f"The runner failed ({description}); please report this.")
