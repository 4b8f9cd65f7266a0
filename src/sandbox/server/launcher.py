"""Hands tasks over to runners."""

import asyncio
import base64
import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import msgspec

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.images import Image, ImageUnusableError
from sandbox.interfaces.journal import JournalBusyError, Journals, Recorder
from sandbox.interfaces.placement import Placement
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.interfaces.tasks import UnavailableError
from sandbox.model.disk_space import refusal_of
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import (
    AgentExited,
    AttemptFailed,
    AttemptStarted,
    CancelRequested,
    FollowUpForgone,
    TaskFinished,
    Trouble,
)
from sandbox.model.limits import FINISHERS_MAX
from sandbox.model.manifest.schema import Secret
from sandbox.model.retry import find_follow_up, pause_seconds
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.server.journal_scan import LongJournals, Turn
from sandbox.server.runtime_prober import RuntimeProber
from sandbox.server.tracked_task import Feed

_log = logging.getLogger(__name__)

ResolveSecrets = Callable[[Sequence[Secret]], Awaitable[Mapping[str, str]]]
"""The values of secrets by name. Raises SecretUnavailableError."""

FindImage = Callable[[str], Image | None]
"""What a profile stands for now, None for the host's own /usr. Raises ImageUnusableError."""


_OF_THE_MOMENT = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EPIPE, errno.ETIMEDOUT})
"""What a machine says that has no process, memory or descriptor to give just now, and a runner's pipe when somebody
killed the runner before it had its order, or the machine was too busy for it; no task has a part in it."""

_LOST = Failure(FailureCode.RUNNER_LOST, "The task's runner died and nobody could clean up after it.")
_UNCOLLECTED = Failure(
    FailureCode.COLLECT_FAILED,
    "The agent had ended, but the task's runner died and nobody could keep all that it left; submit the task again.",
)
_UNCLEANED = "Something of the sandbox may be left: the task's runner died and nobody could clean up after it."


class Host(NamedTuple):
    """The machine that runners are started on, and since which boot it is up."""

    name: str
    boot_id: str


class Launcher:
    """Writes the intent down, starts the runner, and lets go of the journal: its lock goes with the runner."""

    def __init__(
        self,
        journals: Journals,
        placement: Placement,
        clock: Clock,
        resolve: ResolveSecrets,
        find_image: FindImage,
        *,
        prober: RuntimeProber,
        host: Host,
    ) -> None:
        self._journals = LongJournals(journals)
        self._journals_of_wishes = LongJournals(journals)
        self._placement = placement
        self._clock = clock
        self._resolve = resolve
        self._find_image = find_image
        self._prober = prober
        self._host = host
        self._asking: set[asyncio.Task[object]] = set()

    async def launch(self, feed: Feed) -> None:
        """Start the first attempt of a pending task; one that was cancelled meanwhile is left alone.

        Raises OSError when nothing could be written; the task is still pending then.
        """
        # Before the lock is taken: a wish to cancel does not wait for somebody else's Vault.
        answer = await self._ask(feed.task)
        async with feed.writing:
            recorder = feed.recorder
            if recorder is None:
                return
            try:
                await self._begin(recorder, answer)
            finally:
                # Also when the end could not be written: a free lock is what a finisher waits for.
                if recorder.task.state is not TaskState.PENDING:
                    feed.recorder = None
                    feed.stir()
                    recorder.writer.close()

    async def take_back(self, feed: Feed) -> bool:
        """Take the journal of a pending task for its launch; whether it was free, and the task still waits for that.

        Raises OSError, JournalDamagedError.
        """
        async with self._journals.turn() as turn, feed.writing:
            try:
                writer = await self._journals.open(feed.task.id, turn)
            except JournalBusyError:
                return False
            try:
                task = (await self._journals.read_on(feed.task.id, feed.reading, turn)).task
                if task is not None and task.waits_to_begin:
                    feed.recorder = Recorder(writer, task, self._clock.now)
            finally:
                if feed.recorder is None:
                    writer.close()
            return feed.recorder is not None

    def break_off_questions(self) -> None:
        """End the launches that wait for secrets: nothing of them is written, and the next server begins them anew."""
        for launch in self._asking:
            launch.cancel()

    async def _ask(self, task: Task) -> Mapping[str, str] | Failure:
        launch = asyncio.current_task()
        assert launch is not None
        self._asking.add(launch)
        try:
            return await self._secrets(task)
        finally:
            self._asking.discard(launch)

    async def _secrets(self, task: Task) -> Mapping[str, str] | Failure:
        """The values by name; they go to the runner and nowhere else."""
        try:
            return await self._resolve(task.manifest.secrets)
        except SecretUnavailableError as error:
            _log.warning("Secrets of task %s cannot be had: %s", task.id, error.detail, extra={"task_id": task.id})
            detail = error.detail if error.detail != error.message else ""
            return Failure(FailureCode.SECRET_UNAVAILABLE, error.message, detail=detail)
        except Exception as error:
            # Whatever else it says may hold a value.
            what = f"The secrets could not be resolved ({type(error).__name__}); look at where they come from."
            return Failure(FailureCode.SECRET_UNAVAILABLE, what)

    async def _begin(self, recorder: Recorder, answer: Mapping[str, str] | Failure) -> None:
        if recorder.task.state is not TaskState.PENDING:
            return
        if recorder.task.cancel is not None or recorder.task.failure is not None:
            await asyncio.to_thread(recorder.record, TaskFinished())
            return
        if isinstance(answer, Failure):
            await asyncio.to_thread(end_books, recorder, answer)
            return
        await self._attempt(recorder, answer)

    async def _attempt(self, recorder: Recorder, secrets: Mapping[str, str]) -> None:
        is_first = recorder.task.attempt is None
        try:
            image = await asyncio.to_thread(self._find_image, recorder.task.manifest.vm.profile)
        except ImageUnusableError as error:
            await asyncio.to_thread(_give_up, recorder, Failure(FailureCode.PROVISION_FAILED, error.message), is_first)
            return
        started = self._next_attempt(recorder.task)
        await asyncio.to_thread(recorder.record, started)
        try:
            await self._start(recorder, started.attempt_id, secrets=dict(secrets), image=image)
        except OSError as error:
            if refusal_of(error) is not None or error.errno in _OF_THE_MOMENT:
                # The journal is free now: a finisher ends this attempt once it can be started, and another may follow.
                _log.warning("The runner of task %s could not be started: %s", recorder.task.id, error)
                return
            failure = Failure(FailureCode.INTERNAL, f"The runner could not be started: {error}.")
            await asyncio.to_thread(_give_up, recorder, failure, is_first)

    def _next_attempt(self, task: Task) -> AttemptStarted:
        before = task.attempt
        resumes = before is not None and before.follow_up is not None and before.hands_disk_on(before.follow_up)
        return AttemptStarted(
            new_attempt_id(),
            self._prober.result.template.runtime,
            self._host.name,
            self._host.boot_id,
            number=task.attempts + 1,
            resumes=resumes,
        )

    async def finish(self, feed: Feed) -> None:
        """Nobody carries the task on: let a finisher end what a dead runner left, or begin the attempt that follows.

        A finisher that dies is followed by another one, each time after a longer pause; after the last one the books
        are ended here, and so are those of a task that has not begun and is to end.
        Raises OSError, JournalDamagedError.
        """
        if not feed.has_paused(pause_seconds(feed.task), self._clock.monotonic()):
            return
        if _may_go_on(feed.task) and (obstacle := self._prober.obstacle) is not None:
            feed.note = f"Waiting: {obstacle}"
            return
        if not _may_go_on(feed.task) and not _is_forced(feed.task) and not feed.has_rested(self._clock.monotonic()):
            feed.note = "Who cleans up after the task died too; another one is tried after a pause."
            return
        # As in `launch`: asked before anything is taken.
        answer = await self._secrets(feed.task)
        # The turn first: a wish to cancel does not wait while this waits for the journals of other tasks.
        async with self._journals.turn() as turn, feed.writing, self._taking(feed, self._journals, turn) as recorder:
            if recorder is not None and not recorder.task.state.is_terminal:
                await self._finish(recorder, feed, answer)

    @asynccontextmanager
    async def turn_for_wish(self, within_seconds: float) -> AsyncIterator[Turn]:
        """Wait to look through a journal for a wish to cancel, for which there are turns of their own.

        Raises UnavailableError where others need theirs for longer.
        """
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(within_seconds):
                    turn = await held.enter_async_context(self._journals_of_wishes.turn())
            except TimeoutError as error:
                raise UnavailableError(
                    "The server is still cancelling other tasks whose runners died; try again."
                ) from error
            yield turn

    async def take_wish(self, feed: Feed, wish: CancelRequested, turn: Turn) -> Task | None:
        """Write down a wish that no runner takes; gives the task after it, None where it could not be written now.

        Whoever calls holds `feed.writing`; who follows the task does the rest.

        Raises OSError, JournalDamagedError.
        """
        async with self._taking(feed, self._journals_of_wishes, turn) as recorder:
            if recorder is None or recorder.task.state.is_terminal:
                return None
            await asyncio.to_thread(recorder.record, wish)
        feed.stir()
        return recorder.task

    @asynccontextmanager
    async def _taking(self, feed: Feed, journals: LongJournals, turn: Turn) -> AsyncIterator[Recorder | None]:
        """Hold a journal that nobody holds, for as long as the block lasts; None when somebody does."""
        try:
            writer = await journals.open(feed.task.id, turn)
        except JournalBusyError:
            yield None
            return
        try:
            reading = await journals.read_on(feed.task.id, feed.reading, turn)
            yield Recorder(writer, reading.task, self._clock.now)
        finally:
            writer.close()

    async def _finish(self, recorder: Recorder, feed: Feed, answer: Mapping[str, str] | Failure) -> None:
        attempt = recorder.task.attempt
        if attempt is None:
            await self._begin(recorder, answer)
            return
        if _may_go_on(recorder.task):
            await self._follow_up(recorder, answer)
            feed.finishers_launched = 0
            return
        if feed.finishers_launched >= FINISHERS_MAX:
            if recorder.task.is_concluded and not feed.has_told_of_leftovers:
                await asyncio.to_thread(recorder.record, Trouble("teardown_failed", _UNCLEANED))
                feed.has_told_of_leftovers = True
            await asyncio.to_thread(end_books, recorder, _UNCOLLECTED if recorder.task.agent_has_exited else _LOST)
            return
        secrets = {} if isinstance(answer, Failure) else dict(answer)
        await self._start(recorder, attempt.id, secrets=secrets, finish=True)
        feed.count_finisher(self._clock.monotonic())

    async def _follow_up(self, recorder: Recorder, answer: Mapping[str, str] | Failure) -> None:
        """Begin the next attempt; where it cannot, a finisher ends the books."""
        if isinstance(answer, Failure):
            await asyncio.to_thread(recorder.record, AttemptFailed(answer))
        else:
            await self._attempt(recorder, answer)

    async def _start(
        self,
        recorder: Recorder,
        attempt_id: str,
        *,
        secrets: dict[str, str],
        image: Image | None = None,
        finish: bool = False,
    ) -> None:
        """A finisher reaches no model; it has the secrets to know them in what it collects."""
        attempt = recorder.task.attempt
        template = self._prober.result.template
        order = msgspec.structs.replace(
            template,
            task_id=recorder.task.id,
            attempt_id=attempt_id,
            resumes=attempt is not None and attempt.resumes,
            upstream=None if finish else template.upstream,
            secrets=secrets,
            image=image,
            finish=finish,
        )
        await self._placement.launch(order, recorder.writer.lock_fd)


def new_attempt_id() -> str:
    """Twelve base32 characters, random."""
    return base64.b32encode(os.urandom(8)).decode().lower()[:12]


def _may_go_on(task: Task) -> bool:
    return task.is_between_attempts and task.cancel is None and task.failure is None


def _is_forced(task: Task) -> bool:
    return task.cancel is not None and task.cancel.force


def _give_up(recorder: Recorder, failure: Failure, is_first: bool) -> None:
    """Of a first attempt nothing is there; what earlier ones left is removed by a finisher, which ends the books."""
    if is_first:
        end_books(recorder, failure)
    else:
        recorder.record(AttemptFailed(failure))


def cancel_pending(recorder: Recorder, wish: CancelRequested) -> None:
    """A task that has not begun ends at once, and its journal is let go."""
    recorder.record(wish)
    recorder.record(TaskFinished())
    recorder.writer.close()


def end_books(recorder: Recorder, failure: Failure) -> None:
    """No attempt follows: what is left of the last one may still live.

    What has come to its own end and was kept stays as it is; all else fails.
    """
    if not recorder.task.is_concluded:
        _fail(recorder, failure)
    recorder.record(TaskFinished())


def _fail(recorder: Recorder, failure: Failure) -> None:
    if recorder.task.attempt_state is TaskState.RUNNING:
        recorder.record(AgentExited(None, None, failure))
    else:
        recorder.record(AttemptFailed(failure))
    while (follow_up := find_follow_up(recorder.task)) is not None:
        recorder.record(FollowUpForgone(follow_up, failure.message))
