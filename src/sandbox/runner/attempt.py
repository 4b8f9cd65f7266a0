"""Runs one attempt: checks its order, runs its steps and closes the attempt.

Closing prepares the next attempt, or ends the task. It also closes an attempt whose runner has died.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import TypeVar

import msgspec

from sandbox.interfaces.agent import AgentDriver
from sandbox.interfaces.disks import Disk
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.runner import FinishAttempt, RunAttempt
from sandbox.interfaces.runtime import Runtime
from sandbox.model.errors import SandboxError, error_reason
from sandbox.model.events import (
    AgentExited,
    AgentResult,
    AttemptStarted,
    AttemptTornDown,
    ErrorReported,
    FollowUp,
    FollowUpSkipped,
    Output,
    Record,
    TaskFinished,
)
from sandbox.model.failure import AttemptError, Failure, FailureCode
from sandbox.model.fixed_limits import HOST_ERROR_PAUSE_SECONDS, METADATA_TIMEOUT_SECONDS
from sandbox.model.resources import DISK_FULL_ERRNOS, transient_disk_error
from sandbox.model.state_machine import next_follow_up
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.runner.agent_output import rendered_output
from sandbox.runner.attempt_context import AttemptContext, read_handle, read_records
from sandbox.runner.steps.collect import CollectStep
from sandbox.runner.steps.prepare_workspace import PrepareWorkspaceStep, require_same_secrets, take_over_files
from sandbox.runner.steps.provision import ProvisionStep
from sandbox.runner.steps.run import RunStep
from sandbox.runner.steps.teardown import TeardownStep

_COLLECT_TIMEOUT = Failure(FailureCode.COLLECT_FAILED, "Collecting took too long; raise lifecycle.collect_timeout.")
_log = logging.getLogger(__name__)


class AttemptCloser:
    """Ends an attempt: prepares for the next attempt, or collects the results and ends the task.

    driver: renders the last result, and determines whether the session can be resumed; None if this version of Sandbox
        does not have the task's agent, so no other attempt follows.
    """

    def __init__(
        self,
        attempt: AttemptContext,
        collect: CollectStep,
        teardown: TeardownStep,
        disk: Disk,
        journals: Journals,
        driver: AgentDriver | None,
    ) -> None:
        self._attempt = attempt
        self._collect = collect
        self._teardown = teardown
        self._disk = disk
        self._journals = journals
        self._driver = driver
        self._storage_failure: Failure | None = None
        """Why the artifacts cannot be stored."""

    async def reattach_disk(self) -> None:
        """Reopen the disk, so its contents can be collected; record an error if the disk cannot be opened."""
        files = self._attempt.layout
        if self._attempt.resumes:
            take_over_files(self._attempt)
        if files.disk.exists() and not self._attempt.task.is_collected:
            try:
                await self._disk.open(self._attempt.task.manifest.vm.disk_bytes)
            except AttemptError as error:
                self._attempt.recorder.record(ErrorReported(error.failure.code, error.message))

    async def follow_up_or_end(self) -> None:
        """Prepare for the next attempt; if none follows, collect, tear down and end the task."""
        self._attempt.recorder.stop_reallocating_reserve()
        while (follow_up := next_follow_up(self._attempt.task)) is not None:
            if await self._prepare_follow_up(follow_up):
                return
            # The disk may have been detached for a follow-up attempt; reattach it so its contents can be collected.
            await self.reattach_disk()
        await self._collect_with_timeout()
        await self._teardown.run(read_handle(self._attempt.layout.handle))
        self._attempt.recorder.record(TaskFinished())

    async def _prepare_follow_up(self, follow_up: FollowUp) -> bool:
        """Tear down the attempt before its follow-up. Returns False if the follow-up is skipped or no longer needed."""
        attempt = self._attempt
        try:
            if self._driver is None:
                kind = attempt.task.manifest.agent.kind
                raise AttemptError(FailureCode.AGENT_NOT_OFFERED, f"This server does not have the agent {kind}.")
            if follow_up is FollowUp.RESUME:
                await self._require_resumable(self._driver)
            present = attempt.task.attempt
            keeps_disk = present is not None and present.hands_over_disk(follow_up)
            await self._teardown.run_for_follow_up(read_handle(attempt.layout.handle), keeps_disk=keeps_disk)
        except Exception as error:
            _log.error("No other attempt can follow", exc_info=error)
            reason = error.message if isinstance(error, AttemptError) else describe_error(error)
            attempt.recorder.record(FollowUpSkipped(follow_up, reason))
            return False
        if next_follow_up(attempt.task) is not follow_up:  # cancelled in the meantime
            return False
        attempt.recorder.record(AttemptTornDown())
        return True

    async def _require_resumable(self, driver: AgentDriver) -> None:
        """Raise AttemptError if the agent cannot resume; a retry may still follow."""
        if not await asyncio.to_thread(self._has_session, driver):
            raise AttemptError(FailureCode.SANDBOX_LOST, "The agent's session is not on the disk.")
        await require_same_secrets(self._attempt)

    def _has_session(self, driver: AgentDriver) -> bool:
        present = self._attempt.task.attempt
        session_id = present.session_id if present is not None else None
        return session_id is not None and driver.has_session(self._attempt.layout.home, session_id)

    async def _collect_with_timeout(self) -> None:
        seconds = self._attempt.task.manifest.lifecycle.collect_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._collect_with_retries()
        except TimeoutError:
            self._attempt.record_failure(self._storage_failure or _COLLECT_TIMEOUT)
        except Exception as error:
            _log.error("Collecting failed", exc_info=error)
            self._attempt.record_failure(
                Failure(FailureCode.COLLECT_FAILED, f"Collecting failed ({describe_error(error)}).")
            )
        if not self._attempt.task.is_collected:
            # The failure is recorded first: if this runner dies here, the task keeps its outcome.
            await self._store_metadata()

    async def _store_metadata(self) -> None:
        try:
            async with asyncio.timeout(METADATA_TIMEOUT_SECONDS):
                await self._collect.store_metadata()
        except Exception as error:
            _log.error("The metadata could not be stored: %s", error_reason(error))

    async def _collect_with_retries(self) -> None:
        """Collect the results, and retry while the disk rejects writes, so finished work is not lost."""
        try:
            await self._teardown.sync_disk()
        except AttemptError as error:
            self._attempt.record_failure(error.failure)
        while True:
            try:
                self._attempt.recorder.flush_pending()
                await self._record_last_result()
                await self._collect.run()
                return
            except (OSError, AttemptError) as error:
                if (disk_error := transient_disk_error(error)) is None:
                    raise
                message = f"The artifacts could not be stored ({disk_error.strerror}); free space on the server's disk."
                if self._storage_failure is None:
                    _log.warning("%s Retrying until lifecycle.collect_timeout.", message)
                self._storage_failure = Failure(FailureCode.DISK_FULL, message)
            await asyncio.sleep(HOST_ERROR_PAUSE_SECONDS)

    async def _record_last_result(self) -> None:
        """Render the agent's last result and record it as stdout, unless stdout is already recorded or is not rendered.

        Only the agent's driver can render the result. Raises OSError.
        """
        manifest = self._attempt.task.manifest
        if self._driver is None or not manifest.agent.has_rendered_stdout:
            return
        unrecorded = await asyncio.to_thread(self._find_unrecorded_result)
        if unrecorded is None:
            return
        exited, is_in_conversation = unrecorded
        text = self._driver.render_output(manifest, exited.result)
        for output in rendered_output(text, is_parsed=is_in_conversation):
            self._attempt.recorder.record(output)

    def _find_unrecorded_result(self) -> tuple[AgentExited, bool] | None:
        """Return the last exit, and whether a conversation event represents its result.

        Returns None if stdout is recorded, and if no agent has exited.
        """
        unrecorded, is_in_conversation = None, False
        for record in read_records(self._journals, self._attempt.task.id):
            match record.event:
                case Output(stream="stdout"):
                    return None
                case AttemptStarted():
                    is_in_conversation = False
                case AgentResult():
                    is_in_conversation = True
                case AgentExited() as exited:
                    unrecorded = exited, is_in_conversation
        return unrecorded


class DeadRunnerFinisher(msgspec.Struct, frozen=True):
    """Ends an attempt whose runner died. boot_id: the id of the host's current boot."""

    attempt: AttemptContext
    runtime: Runtime
    boot_id: str
    closer: AttemptCloser

    async def finish(self) -> None:
        """Destroy the attempt's sandbox, then write the missing records."""
        async with self.attempt.recorder.flushing_periodically():
            await self._destroy_sandbox()
            await self.closer.reattach_disk()
            task, lost = self.attempt.task, self._loss_failure()
            if task.attempt_state is TaskState.RUNNING or not (task.agent_has_exited or task.failure is not None):
                self.attempt.record_failure(lost)
            await self.closer.follow_up_or_end()

    async def _destroy_sandbox(self) -> None:
        """Destroy the sandbox before its files are read. Raises OSError, and the errors of `Runtime.destroy`.

        If only the teardown of the attempt is left, logs these errors instead of raising them.
        """
        handle = read_handle(self.attempt.layout.handle)
        if handle is None:
            return
        try:
            await self.runtime.destroy(handle, self.attempt.layout.disk)
        except (AttemptError, OSError) as error:
            if not self.attempt.task.needs_only_teardown:
                raise
            _log.warning("The remains of the sandbox cannot be removed: %s", error_reason(error))

    def _loss_failure(self) -> Failure:
        """Return `host_lost` if the host has rebooted since the attempt started, otherwise `runner_lost`."""
        attempt = self.attempt.task.attempt
        is_other_boot = attempt is not None and attempt.boot_id not in ("", self.boot_id)
        code, message = (
            (FailureCode.HOST_LOST, "The machine was restarted while the task was running")
            if is_other_boot
            else (FailureCode.RUNNER_LOST, "The task's runner died")
        )
        return Failure(code, f"{message}; the agent's work up to that point is stored. Submit the task again.")


def describe_error(error: Exception) -> str:
    """Return the kind of an unexpected error and, for an OSError or a timeout, the reason."""
    if isinstance(error, TimeoutError):
        return error_reason(error)
    return f"{type(error).__name__}: {error}" if isinstance(error, OSError) else type(error).__name__


T = TypeVar("T")


class StaleOrderError(SandboxError):
    """The order is for an attempt that has ended, or that another runner has already started."""

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

        This record ends the task, or only the attempt if another attempt follows.
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
