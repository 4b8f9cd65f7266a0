"""What takes more than one request: submitting over a connection that breaks, waiting for an end, following a story.

Nothing here sends or sleeps. A conversation yields what is to be done and is sent the answer, or is thrown the error;
`client.py` and `async_client.py` do it, each in its own way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sandbox.client import requests
from sandbox.client.errors import ClientError, UnreachableError
from sandbox.client.events import Event
from sandbox.client.requests import Call
from sandbox.client.responses import Submitted, Task
from sandbox.client.sse import EventStream
from sandbox.model.task_state import TERMINAL_STATES

PAUSES_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0)
"""About 30 s in all: a server that is restarted is back by then."""

RETRY_AFTER_SECONDS_MAX = 10.0
"""A server that asks for a longer pause is asked again after this one."""


class Patience:
    """Pauses between tries, longer and longer; after each success they begin anew."""

    def __init__(self, pauses_seconds: tuple[float, ...] | None = None) -> None:
        self._pauses_seconds = PAUSES_SECONDS if pauses_seconds is None else pauses_seconds
        self._left: Iterator[float] = iter(self._pauses_seconds)

    def restore(self) -> None:
        """Something arrived: be patient again."""
        self._left = iter(self._pauses_seconds)

    def pause_seconds(self, error: ClientError) -> float:
        """How long to wait before the next try, which is never shorter than what the server asks for within bounds.

        Raises `error` when there was the last try, or when another one cannot help.
        """
        seconds = next(self._left, None)
        if seconds is None or not error.retryable:
            raise error
        return max(seconds, min(error.retry_after_seconds or 0.0, RETRY_AFTER_SECONDS_MAX))


WAIT_SECONDS = 60.0
"""How long one request for the end of a task waits; a longer wait is several of them."""

AGAIN_SECONDS = 0.1
"""Before waiting once more: a server that shuts down answers at once."""

RESUBMIT_SECONDS = 60.0
"""How long after the first try a submission whose answer was lost is tried again."""

SILENCE_SECONDS = 45.0
"""A stream that is silent for so long is dead: the server says something every 15 s."""


@dataclass(frozen=True)
class Pause:
    """Sleep for so long."""

    seconds: float


AnswerT = TypeVar("AnswerT")
Conversation = Generator[Call[Any] | Pause, Any, AnswerT]


class Talk(Generic[AnswerT]):
    """A conversation that is under way. step: what to do next, None once it is over and `result` is there."""

    result: AnswerT

    def __init__(self, conversation: Conversation[AnswerT]) -> None:
        self._conversation = conversation
        self.step: Call[Any] | Pause | None = None
        self.answer(None)

    def answer(self, answer: Any) -> None:
        """It was done; a pause has no answer."""
        self._go_on(lambda: self._conversation.send(answer))

    def refuse(self, error: ClientError) -> None:
        """It failed. Raises the error where the conversation cannot do without."""
        self._go_on(lambda: self._conversation.throw(error))

    def _go_on(self, move: Callable[[], Call[Any] | Pause]) -> None:
        try:
            self.step = move()
        except StopIteration as end:
            self.step, self.result = None, end.value


def submit(call: Call[Submitted]) -> Conversation[Submitted]:
    """The same is asked again where its answer was lost: its idempotency key makes one task of it."""
    deadline, patience, is_lost = time.monotonic() + RESUBMIT_SECONDS, Patience(), False
    while True:
        try:
            answer: Submitted = yield call
        except ClientError as error:
            is_lost = is_lost or (isinstance(error, UnreachableError) and error.may_have_arrived)
            if not is_lost or time.monotonic() > deadline:
                raise
            yield Pause(patience.pause_seconds(error))
        else:
            return answer


def wait(task_id: str, timeout_seconds: float | None) -> Conversation[Task]:
    """A server that is restarted meanwhile is waited for, within bounds."""
    deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
    status: Task = yield requests.status(task_id)
    patience = Patience()
    while status["state"] not in TERMINAL_STATES:
        left = WAIT_SECONDS if deadline is None else min(WAIT_SECONDS, deadline - time.monotonic())
        if left <= 0:
            break
        try:
            status = yield requests.wait(task_id, left)
        except ClientError as error:
            yield Pause(patience.pause_seconds(error))
            continue
        patience.restore()
        if status["state"] not in TERMINAL_STATES:
            yield Pause(AGAIN_SECONDS)
    return status


class Following:
    """The story of a task over one connection after the other, without loss or doubling."""

    def __init__(self, task_id: str, stream: str, **beginning: str | int | None) -> None:
        self.is_over = False
        self._task_id = task_id
        self._stream = stream
        self._beginning = beginning
        self._patience = Patience()
        self._connection = EventStream()

    def connect(self) -> Call[requests.Stream]:
        """What to ask for next; an answer without content is the end."""
        self._connection = EventStream()
        return requests.follow(self._task_id, SILENCE_SECONDS, stream=self._stream, **self._beginning)

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that these bytes complete; also of a story with nothing to tell something arrives."""
        self._patience.restore()
        for event in self._connection.feed(chunk):
            self._beginning = {"after": event["seq"]}
            self.is_over = event["type"] == "end"
            yield event
            if self.is_over:
                return

    def pause_seconds(self, error: ClientError | None = None) -> float:
        """How long to wait after a connection that broke, or was closed too early. Raises the error in the end."""
        return self._patience.pause_seconds(
            error or UnreachableError("The server closed the stream before the task's end.")
        )
