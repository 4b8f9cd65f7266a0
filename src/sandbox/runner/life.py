"""One attempt from its first step to the task's final record."""

import asyncio
import errno
import logging
from collections.abc import Coroutine
from typing import TypeVar

from sandbox.contracts.placement import CancelOrder, Receipt
from sandbox.model.errors import AttemptError, Failure, FailureCode
from sandbox.model.event import AgentExited, AttemptFailed, CancelRequested, TaskFinished, Trouble
from sandbox.model.life import EndAttempt
from sandbox.model.limits import OUTPUT_SYNC_SECONDS
from sandbox.model.state import TaskState
from sandbox.runner.equipment import Attempt
from sandbox.runner.steps.collect import collect, is_collected
from sandbox.runner.steps.provision import provision, read_handle
from sandbox.runner.steps.run import run
from sandbox.runner.steps.stage import stage
from sandbox.runner.steps.teardown import teardown
from sandbox.runner.terminals import Terminals
from sandbox.runner.wish import EndWish

T = TypeVar("T")
_log = logging.getLogger(__name__)


class EndedError(Exception):
    """The attempt was told to end; the reason is in the journal."""


class AttemptLife:
    """Carries one attempt out, or (the finisher) ends what a dead runner left."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._wish = EndWish()
        self.terminals = Terminals(attempt.redaction)
        attempt.recorder.on_effect = self._wish.take
        if (cancel := attempt.task.cancel) is not None:
            self._wish.take(EndAttempt(force=cancel.force))

    def cancel(self, order: CancelOrder) -> Receipt:
        """Write the wish down; it is durable when the receipt is given."""
        task = self._attempt.task
        if task.state.is_terminal:
            return Receipt(done=False, message=f"Task {task.id} is {task.state} already.")
        self._attempt.recorder.record(CancelRequested(order.reason, order.force))
        if task.agent_has_exited:
            return Receipt(done=True, message="The agent had ended already; the task keeps its outcome.")
        return Receipt(done=True)

    async def carry_out(self) -> None:
        """Stage, provision, run, collect, teardown; the last record is written whatever happens."""
        syncing = asyncio.create_task(self._sync_output())
        self._tell_what_is_not_redacted()
        try:
            await self._work()
            await self._conclude()
        finally:
            syncing.cancel()

    def _tell_what_is_not_redacted(self) -> None:
        redaction = self._attempt.redaction
        for name in redaction.too_short if redaction is not None else ():
            message = f"The value of {name} is under 8 characters, too short to be kept out of logs and artifacts."
            self._attempt.recorder.record(Trouble("secret_not_redacted", message))

    async def finish(self) -> None:
        """End what a dead runner left: its sandbox first, then its books."""
        handle = read_handle(self._attempt.files.handle)
        if handle is not None:
            await self._attempt.equipment.runtime.destroy(handle, self._attempt.files.disk)
        await self._find_disk()
        task = self._attempt.task
        lost = self._loss()
        if task.state is TaskState.RUNNING:
            self._attempt.recorder.record(AgentExited(None, None, lost))
        elif not task.agent_has_exited:
            self._attempt.recorder.record(AttemptFailed(lost))
        await self._conclude()

    def _loss(self) -> Failure:
        """With another boot of the machine all of its processes went, and not only the runner."""
        attempt = self._attempt.task.attempt
        is_other_boot = attempt is not None and attempt.boot_id not in ("", self._attempt.equipment.boot_id)
        code, what = (
            (FailureCode.HOST_LOST, "The machine was started anew while the task was under way")
            if is_other_boot
            else (FailureCode.RUNNER_LOST, "The task's runner died")
        )
        return Failure(code, f"{what}; what the agent had written until then is kept. Submit the task again.")

    async def _find_disk(self) -> None:
        """What was on the disk is collected; where there is none that can be read, that is told."""
        files = self._attempt.files
        if files.disk.exists() and not is_collected(self._attempt.task):
            try:
                await self._attempt.equipment.disks.open(files, self._attempt.task.manifest.vm.disk_bytes)
            except AttemptError as error:
                self._attempt.recorder.record(Trouble(error.failure.code, error.message))

    async def _work(self) -> None:
        lifecycle = self._attempt.task.manifest.lifecycle
        try:
            await self._bounded(
                stage(self._attempt),
                lifecycle.stage_timeout_seconds,
                Failure(FailureCode.STAGE_TIMEOUT, "Cloning took too long; raise lifecycle.stage_timeout."),
            )
            provisioned = await self._bounded(
                provision(self._attempt),
                lifecycle.provision_timeout_seconds,
                Failure(FailureCode.PROVISION_TIMEOUT, "The sandbox took too long; raise lifecycle.provision_timeout."),
            )
            await run(self._attempt, provisioned, self._wish, self.terminals)
        except EndedError:
            pass
        except AttemptError as error:
            self._fail(error.failure)
        except Exception as error:
            _log.error("A step failed", exc_info=error)
            self._fail(_failure_of(error))

    async def _bounded(self, step: Coroutine[None, None, T], timeout_seconds: float, late: Failure) -> T:
        """Run a step until it is done, the attempt is told to end, or its time is over."""
        work = asyncio.ensure_future(step)
        wish = asyncio.ensure_future(self._wish.made.wait())
        try:
            await asyncio.wait({work, wish}, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not self._wish.made.is_set():
                return work.result()
        finally:
            for task in (work, wish):
                task.cancel()
            await asyncio.gather(work, wish, return_exceptions=True)
        if not self._wish.made.is_set():
            raise AttemptError(late.code, late.message)
        raise EndedError

    async def _conclude(self) -> None:
        """Collect, tear down, and write the last record."""
        seconds = self._attempt.task.manifest.lifecycle.collect_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                await collect(self._attempt)
        except TimeoutError:
            self._fail(
                Failure(FailureCode.COLLECT_FAILED, "Collecting took too long; raise lifecycle.collect_timeout.")
            )
        except Exception as error:
            _log.error("Collecting failed", exc_info=error)
            self._fail(Failure(FailureCode.COLLECT_FAILED, f"Collecting failed ({_described(error)})."))
        await teardown(self._attempt, read_handle(self._attempt.files.handle))
        self._attempt.recorder.record(TaskFinished())

    def _fail(self, failure: Failure) -> None:
        task = self._attempt.task
        if task.state is TaskState.RUNNING:
            self._attempt.recorder.record(AgentExited(None, None, failure))
        else:
            self._attempt.recorder.record(AttemptFailed(failure))

    async def _sync_output(self) -> None:
        while True:
            await asyncio.sleep(OUTPUT_SYNC_SECONDS)
            try:
                await asyncio.to_thread(self._attempt.recorder.writer.sync)
            except OSError as error:
                # The next round tries again; a disk that is really broken shows when a record is written.
                _log.error("Output could not be flushed: %s", error)


def _failure_of(error: Exception) -> Failure:
    what = _described(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message = f"There was no room left ({what}); raise vm.disk, or make room in the server's data directory."
        return Failure(FailureCode.DISK_FULL, message)
    return Failure(FailureCode.INTERNAL, f"The runner failed ({what}); please report this.")


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, OSError) else type(error).__name__
