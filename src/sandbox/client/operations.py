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
from sandbox.client.requests import Request
from sandbox.client.responses import Submitted, Task
from sandbox.client.sse import SseParser
from sandbox.model.task_state import TERMINAL_STATES

DELAYS_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0)
"""About 30 s in all: a server that is restarted is back by then."""

RETRY_AFTER_SECONDS_MAX = 10.0
"""A server that asks for a longer pause is asked again after this one."""


class Backoff:
    """Pauses between tries, longer and longer; after each success they begin anew."""

    def __init__(self, delays_seconds: tuple[float, ...] | None = None) -> None:
        self._delays_seconds = DELAYS_SECONDS if delays_seconds is None else delays_seconds
        self._remaining: Iterator[float] = iter(self._delays_seconds)

    def reset(self) -> None:
        """Something arrived: be patient again."""
        self._remaining = iter(self._delays_seconds)

    def next_delay_seconds(self, error: ClientError) -> float:
        """How long to wait before the next try, which is never shorter than what the server asks for within bounds.

        Raises `error` when there was the last try, or when another one cannot help.
        """
        seconds = next(self._remaining, None)
        if seconds is None or not error.retryable:
            raise error
        return max(seconds, min(error.retry_after_seconds or 0.0, RETRY_AFTER_SECONDS_MAX))


LONG_POLL_SECONDS = 60.0
"""How long one request for the end of a task waits; a longer wait is several of them."""

LONG_POLL_PAUSE_SECONDS = 0.1
"""Before waiting once more: a server that shuts down answers at once."""

RESUBMIT_SECONDS = 60.0
"""How long after the first try a submission whose answer was lost is tried again."""

STREAM_IDLE_TIMEOUT_SECONDS = 45.0
"""A stream that is silent for so long is dead: the server says something every 15 s."""


@dataclass(frozen=True)
class Sleep:
    """Sleep for so long."""

    seconds: float


ResponseT = TypeVar("ResponseT")
OperationSteps = Generator[Request[Any] | Sleep, Any, ResponseT]


class Operation(Generic[ResponseT]):
    """A conversation that is under way. step: what to do next, None once it is over and `result` is there."""

    result: ResponseT

    def __init__(self, conversation: OperationSteps[ResponseT]) -> None:
        self._steps = conversation
        self.step: Request[Any] | Sleep | None = None
        self.send(None)

    def send(self, answer: Any) -> None:
        """It was done; a pause has no answer."""
        self._advance(lambda: self._steps.send(answer))

    def throw(self, error: ClientError) -> None:
        """It failed. Raises the error where the conversation cannot do without."""
        self._advance(lambda: self._steps.throw(error))

    def _advance(self, move: Callable[[], Request[Any] | Sleep]) -> None:
        try:
            self.step = move()
        except StopIteration as end:
            self.step, self.result = None, end.value


def submit(call: Request[Submitted]) -> OperationSteps[Submitted]:
    """The same is asked again where its answer was lost: its idempotency key makes one task of it."""
    deadline, backoff, is_lost = time.monotonic() + RESUBMIT_SECONDS, Backoff(), False
    while True:
        try:
            answer: Submitted = yield call
        except ClientError as error:
            is_lost = is_lost or (isinstance(error, UnreachableError) and error.may_have_arrived)
            if not is_lost or time.monotonic() > deadline:
                raise
            yield Sleep(backoff.next_delay_seconds(error))
        else:
            return answer


def wait(task_id: str, timeout_seconds: float | None) -> OperationSteps[Task]:
    """A server that is restarted meanwhile is waited for, within bounds."""
    deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
    status: Task = yield requests.status(task_id)
    backoff = Backoff()
    while status["state"] not in TERMINAL_STATES:
        left = LONG_POLL_SECONDS if deadline is None else min(LONG_POLL_SECONDS, deadline - time.monotonic())
        if left <= 0:
            break
        try:
            status = yield requests.wait(task_id, left)
        except ClientError as error:
            yield Sleep(backoff.next_delay_seconds(error))
            continue
        backoff.reset()
        if status["state"] not in TERMINAL_STATES:
            yield Sleep(LONG_POLL_PAUSE_SECONDS)
    return status


class ResumableStream:
    """The story of a task over one connection after the other, without loss or doubling."""

    def __init__(self, task_id: str, stream: str, **position: str | int | None) -> None:
        self.is_finished = False
        self._task_id = task_id
        self._stream = stream
        self._position = position
        self._backoff = Backoff()
        self._parser = SseParser()

    def next_request(self) -> Request[requests.StreamBody]:
        """What to ask for next; an answer without content is the end."""
        self._parser = SseParser()
        return requests.follow(self._task_id, STREAM_IDLE_TIMEOUT_SECONDS, stream=self._stream, **self._position)

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that these bytes complete; also of a story with nothing to tell something arrives."""
        self._backoff.reset()
        for event in self._parser.feed(chunk):
            self._position = {"after": event["seq"]}
            self.is_finished = event["type"] == "end"
            yield event
            if self.is_finished:
                return

    def next_delay_seconds(self, error: ClientError | None = None) -> float:
        """How long to wait after a connection that broke, or was closed too early. Raises the error in the end."""
        return self._backoff.next_delay_seconds(
            error or UnreachableError("The server closed the stream before the task's end.")
        )
