"""One attempt, from its first step to its final record."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import TypeVar

from sandbox.interfaces.journal import read_records
from sandbox.interfaces.placement import CANCEL_TOO_LATE, CancelOrder, Reply
from sandbox.model.disk_space import DISK_FULL_ERRNOS, transient_disk_error
from sandbox.model.errors import error_reason
from sandbox.model.events import (
    AgentExited,
    AttemptEnded,
    AttemptFailed,
    CancelRequested,
    ErrorReported,
    FollowUp,
    FollowUpSkipped,
    Output,
    TaskFinished,
)
from sandbox.model.failure import AttemptError, Failure, FailureCode
from sandbox.model.limits import METADATA_SECONDS, OUTPUT_SYNC_SECONDS, RETRY_SECONDS
from sandbox.model.retry import next_follow_up
from sandbox.model.state_machine import StopAttempt
from sandbox.model.task_state import TaskState
from sandbox.runner.agent_output import LineSplitter
from sandbox.runner.attempt_takeover import take_over_files
from sandbox.runner.dependencies import AttemptContext
from sandbox.runner.steps.collect import collect, store_metadata
from sandbox.runner.steps.provision import provision, read_handle
from sandbox.runner.steps.run import run
from sandbox.runner.steps.stage import require_same_secrets, stage
from sandbox.runner.steps.teardown import teardown, teardown_for_follow_up, verify_disk
from sandbox.runner.terminals import TerminalServer


async def record_last_result(attempt: AttemptContext) -> None:
    """Render the agent's last result and record it as stdout, unless stdout is recorded already or not rendered.

    Raises OSError.
    """
    if not attempt.task.manifest.agent.has_rendered_stdout:
        return
    exited = await asyncio.to_thread(_find_unrecorded_result, attempt)
    if exited is None:
        return
    splitter = LineSplitter()
    text = attempt.dependencies.agent.render_output(attempt.task.manifest, exited.result)
    for piece, continued in (*splitter.feed(text), *splitter.flush()):
        attempt.recorder.record(Output.from_bytes("stdout", piece, continued=continued))


def _find_unrecorded_result(attempt: AttemptContext) -> AgentExited | None:
    exited = None
    for record in read_records(attempt.dependencies.journals, attempt.task.id):
        if isinstance(record.event, Output) and record.event.stream == "stdout":
            return None
        if isinstance(record.event, AgentExited):
            exited = record.event
    return exited


T = TypeVar("T")
_COLLECT_TIMEOUT = Failure(FailureCode.COLLECT_FAILED, "Collecting took too long; raise lifecycle.collect_timeout.")
_log = logging.getLogger(__name__)


class AttemptStoppedError(Exception):
    """The attempt was asked to stop; the reason is in the journal."""


class AttemptRunner:
    """Runs one attempt or, as a finisher, ends an attempt whose runner died."""

    def __init__(self, attempt: AttemptContext) -> None:
        self._attempt = attempt
        self._stop_signal = attempt.recorder.stop_signal
        self._storage_failure: Failure | None = None
        """Why the artifacts cannot be stored."""
        self.terminals = TerminalServer(attempt.redaction, attempt.dependencies.throttle.queue())
        if (cancel := attempt.task.cancel) is not None:
            self._stop_signal.apply_effect(StopAttempt(force=cancel.force))

    def cancel(self, order: CancelOrder) -> Reply:
        """Record a cancel request; it is durable when the reply is returned."""
        task = self._attempt.task
        if task.state.is_final:
            return Reply(done=False, message=f"Task {task.id} is {task.state} already.")
        self._attempt.recorder.record(CancelRequested(order.reason, order.force))
        if self._attempt.task.cancel is None:
            return Reply(done=True, message=CANCEL_TOO_LATE)
        return Reply(done=True)

    async def run(self) -> None:
        """Run all steps: stage, provision, run, collect and teardown. Always write a final record.

        It ends the task, or only the attempt if another one follows.
        """
        self._attempt.recorder.allocate_reserve()
        async with self._flush_on_exit():
            self._record_unredacted_secrets()
            await self._run_steps()
            if self._attempt.resumes:
                # The attempt may have failed before taking over the previous disk, which holds the agent's work.
                await self._reattach_disk()
            await self._follow_up_or_end()

    def _record_unredacted_secrets(self) -> None:
        redaction = self._attempt.redaction
        for name in redaction.too_short_names if redaction is not None else ():
            message = f"The value of {name} is under 8 characters, too short to be redacted from logs and artifacts."
            self._attempt.recorder.record(ErrorReported("secret_not_redacted", message))

    async def finish(self) -> None:
        """End an attempt whose runner died: destroy its sandbox, then write the missing records."""
        async with self._flush_on_exit():
            await self._finish_lost_attempt()

    @contextlib.asynccontextmanager
    async def _flush_on_exit(self) -> AsyncIterator[None]:
        """Flush records periodically while the block runs; at its end, wait until all are written."""
        flush_task = asyncio.create_task(self._flush_periodically())
        try:
            yield
            await self._attempt.recorder.wait_until_written()
        finally:
            flush_task.cancel()

    async def _finish_lost_attempt(self) -> None:
        await self._destroy_sandbox()
        await self._reattach_disk()
        task = self._attempt.task
        lost = self._loss_failure()
        if task.attempt_state is TaskState.RUNNING:
            self._attempt.recorder.record(AgentExited(None, None, lost))
        elif not task.agent_has_exited and task.failure is None:
            self._attempt.recorder.record(AttemptFailed(lost))
        await self._follow_up_or_end()

    async def _destroy_sandbox(self) -> None:
        """Destroy the sandbox before its files are read. Once only the teardown is left, errors are only logged.

        Raises OSError, and the errors of `Runtime.destroy`.
        """
        handle = read_handle(self._attempt.layout.handle)
        if handle is None:
            return
        try:
            await self._attempt.dependencies.runtime.destroy(handle, self._attempt.layout.disk)
        except (AttemptError, OSError) as error:
            if not self._attempt.task.needs_only_teardown:
                raise
            _log.warning("The remains of the sandbox cannot be removed: %s", error_reason(error))

    def _loss_failure(self) -> Failure:
        """Return `host_lost` if the host has rebooted since the attempt started, else `runner_lost`."""
        attempt = self._attempt.task.attempt
        is_other_boot = attempt is not None and attempt.boot_id not in ("", self._attempt.dependencies.boot_id)
        code, message = (
            (FailureCode.HOST_LOST, "The machine was restarted while the task was running")
            if is_other_boot
            else (FailureCode.RUNNER_LOST, "The task's runner died")
        )
        return Failure(code, f"{message}; the agent's work up to that point is stored. Submit the task again.")

    async def _reattach_disk(self) -> None:
        """Open the disk again, so its contents can be collected; record an error if it cannot be read."""
        files = self._attempt.layout
        if self._attempt.resumes:
            take_over_files(self._attempt)
        if files.disk.exists() and not self._attempt.task.is_collected:
            try:
                await self._attempt.dependencies.disks.open(files, self._attempt.task.manifest.vm.disk_bytes)
            except AttemptError as error:
                self._attempt.recorder.record(ErrorReported(error.failure.code, error.message))

    async def _run_steps(self) -> None:
        lifecycle = self._attempt.task.manifest.lifecycle
        try:
            await self._run_step(
                stage(self._attempt),
                lifecycle.stage_timeout_seconds,
                Failure(FailureCode.STAGE_TIMEOUT, "Cloning took too long; raise lifecycle.stage_timeout."),
            )
            provisioned = await self._run_step(
                provision(self._attempt),
                lifecycle.provision_timeout_seconds,
                Failure(
                    FailureCode.PROVISION_TIMEOUT,
                    "Creating the sandbox took too long; raise lifecycle.provision_timeout.",
                ),
            )
            await run(self._attempt, provisioned, self.terminals)
        except AttemptStoppedError:
            pass
        except AttemptError as error:
            self._record_failure(error.failure)
        except Exception as error:
            _log.error("A step failed", exc_info=error)
            self._record_failure(_to_failure(error))

    async def _run_step(self, step: Coroutine[None, None, T], timeout_seconds: float, timeout_failure: Failure) -> T:
        """Run a step until it finishes, the attempt is asked to stop, or the timeout is over."""
        work = asyncio.ensure_future(step)
        stop = asyncio.ensure_future(self._stop_signal.requested.wait())
        try:
            await asyncio.wait({work, stop}, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not self._stop_signal.requested.is_set():
                return work.result()
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)
        if not self._stop_signal.requested.is_set():
            raise AttemptError(timeout_failure.code, timeout_failure.message)
        raise AttemptStoppedError

    async def _follow_up_or_end(self) -> None:
        """Prepare for the next attempt; if none follows, collect, tear down and end the task."""
        self._attempt.recorder.stop_keeping_reserve()
        while (follow_up := next_follow_up(self._attempt.task)) is not None:
            if await self._prepare_follow_up(follow_up):
                return
            # The disk may have been detached for a follow-up attempt; reattach it so its contents can be collected.
            await self._reattach_disk()
        await self._collect_with_timeout()
        await teardown(self._attempt, read_handle(self._attempt.layout.handle))
        self._attempt.recorder.record(TaskFinished())

    async def _prepare_follow_up(self, follow_up: FollowUp) -> bool:
        """Tear the attempt down for the next one. If that fails, skip the next one and return False."""
        attempt = self._attempt
        try:
            if follow_up is FollowUp.RESUME:
                await self._require_resumable()
            present = attempt.task.attempt
            keeps_disk = present is not None and present.transfers_disk(follow_up)
            await teardown_for_follow_up(attempt, read_handle(attempt.layout.handle), keeps_disk=keeps_disk)
        except Exception as error:
            _log.error("No other attempt can follow", exc_info=error)
            reason = error.message if isinstance(error, AttemptError) else _describe(error)
            attempt.recorder.record(FollowUpSkipped(follow_up, reason))
            return False
        if next_follow_up(attempt.task) is not follow_up:  # cancelled in the meantime
            return False
        attempt.recorder.record(AttemptEnded())
        return True

    async def _require_resumable(self) -> None:
        """Raise AttemptError if the agent cannot resume; a retry may still follow."""
        if not await asyncio.to_thread(self._has_session):
            raise AttemptError(FailureCode.SANDBOX_LOST, "The agent's session is not on the disk.")
        await require_same_secrets(self._attempt)

    def _has_session(self) -> bool:
        present, agent = self._attempt.task.attempt, self._attempt.dependencies.agent
        session_id = present.session_id if present is not None else None
        return session_id is not None and agent.has_session(self._attempt.layout.home, session_id)

    async def _collect_with_timeout(self) -> None:
        seconds = self._attempt.task.manifest.lifecycle.collect_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._collect_with_retries()
        except TimeoutError:
            self._record_failure(self._storage_failure or _COLLECT_TIMEOUT)
        except Exception as error:
            _log.error("Collecting failed", exc_info=error)
            self._record_failure(Failure(FailureCode.COLLECT_FAILED, f"Collecting failed ({_describe(error)})."))
        if not self._attempt.task.is_collected:
            # The failure is recorded first: if this runner dies here, the task keeps its outcome.
            await self._store_metadata()

    async def _store_metadata(self) -> None:
        try:
            async with asyncio.timeout(METADATA_SECONDS):
                await store_metadata(self._attempt)
        except Exception as error:
            _log.error("The metadata could not be stored: %s", error_reason(error))

    async def _collect_with_retries(self) -> None:
        """Retry while the disk rejects writes: finished work is worth the wait."""
        try:
            await verify_disk(self._attempt)
        except AttemptError as error:
            self._record_failure(error.failure)
        while True:
            try:
                self._attempt.recorder.flush_pending()
                await record_last_result(self._attempt)
                await collect(self._attempt)
                return
            except (OSError, AttemptError) as error:
                if (disk_error := transient_disk_error(error)) is None:
                    raise
                message = f"The artifacts could not be stored ({disk_error.strerror}); free space on the server's disk."
                if self._storage_failure is None:
                    _log.warning("%s Retrying until lifecycle.collect_timeout.", message)
                self._storage_failure = Failure(FailureCode.DISK_FULL, message)
            await asyncio.sleep(RETRY_SECONDS)

    def _record_failure(self, failure: Failure) -> None:
        if self._attempt.task.attempt_state is TaskState.RUNNING:
            self._attempt.recorder.record(AgentExited(None, None, failure))
        else:
            self._attempt.recorder.record(AttemptFailed(failure))

    async def _flush_periodically(self) -> None:
        logged = ""
        while True:
            await asyncio.sleep(OUTPUT_SYNC_SECONDS)
            try:
                self._attempt.recorder.flush_pending()
                await asyncio.to_thread(self._attempt.recorder.sync)
            except OSError as error:
                if str(error) != logged:
                    _log.error("Output could not be flushed: %s; retrying.", error)
                logged = str(error)


def _to_failure(error: Exception) -> Failure:
    description = _describe(error)
    disk_error = transient_disk_error(error)
    if disk_error is not None and disk_error.errno in DISK_FULL_ERRNOS:
        message = f"No space was left ({description}); raise vm.disk, or free space in the server's data directory."
        return Failure(FailureCode.DISK_FULL, message)
    if disk_error is not None:
        remedy = "check the disk and the kernel log, and submit the task again"
        message = f"A disk of the server failed ({description}); {remedy}."
        return Failure(FailureCode.INTERNAL, message)
    return Failure(FailureCode.INTERNAL, f"The runner failed ({description}); please report this.")


def _describe(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return error_reason(error)
    return f"{type(error).__name__}: {error}" if isinstance(error, OSError) else type(error).__name__
