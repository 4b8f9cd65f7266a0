"""Operations that are retried over several requests: submit, wait for the end, follow a stream.

Nothing here performs I/O or sleeps. An operation yields the next action and receives its response or its exception;
`client.py` and `async_client.py` execute the actions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sandbox.client import requests
from sandbox.client.errors import ClientError, UnreachableError
from sandbox.client.parsing import SseParser
from sandbox.client.requests import Request
from sandbox.client.response_types import Submitted, Task
from sandbox.model.task_state import FINAL_STATES
from sandbox.model.wire.event_bodies import Event

DELAYS_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0)
"""Delays between retries: about 30 s in total, which covers a restart of the server."""

RETRY_AFTER_SECONDS_MAX = 10.0
"""Maximum delay that a server may request with Retry-After."""


class Backoff:
    """Increasing delays between retries; a success resets them."""

    def __init__(self, delays_seconds: tuple[float, ...] | None = None) -> None:
        self._delays_seconds = DELAYS_SECONDS if delays_seconds is None else delays_seconds
        self._remaining: Iterator[float] = iter(self._delays_seconds)

    def reset(self) -> None:
        """Start again with the shortest delay."""
        self._remaining = iter(self._delays_seconds)

    def next_delay_seconds(self, error: ClientError) -> float:
        """Return the delay before the next retry: at least the server's Retry-After, up to RETRY_AFTER_SECONDS_MAX.

        Raises `error` if no retry is left or the error is not retryable.
        """
        seconds = next(self._remaining, None)
        if seconds is None or not error.retryable:
            raise error
        return max(seconds, min(error.retry_after_seconds or 0.0, RETRY_AFTER_SECONDS_MAX))


LONG_POLL_SECONDS = 60.0
"""Maximum time that one request waits for the task to end; longer waits use several requests."""

LONG_POLL_PAUSE_SECONDS = 0.1
"""Delay before the next long poll, because a server that is shutting down responds immediately."""

RESUBMIT_TIMEOUT_SECONDS = 60.0
"""How long to retry a submission whose response was lost."""

STREAM_IDLE_TIMEOUT_SECONDS = 45.0
"""A stream that sends no data for this long is considered dead: the server sends a keep-alive every 15 s."""


@dataclass(frozen=True)
class Sleep:
    """An action: sleep for this time."""

    seconds: float


ResponseT = TypeVar("ResponseT")
OperationActions = Generator[Request[Any] | Sleep, Any, ResponseT]


class Operation(Generic[ResponseT]):
    """An operation in progress. action: what to execute next, None once `result` is set."""

    result: ResponseT

    def __init__(self, actions: OperationActions[ResponseT]) -> None:
        self._actions = actions
        self.action: Request[Any] | Sleep | None = None
        self.send(None)

    def send(self, response: Any) -> None:
        """Continue with the response to the executed action; None after a Sleep."""
        self._advance(lambda: self._actions.send(response))

    def throw(self, error: ClientError) -> None:
        """Continue with the error that the executed action raised.

        Raises the error if the operation does not handle it.
        """
        self._advance(lambda: self._actions.throw(error))

    def _advance(self, get_action: Callable[[], Request[Any] | Sleep]) -> None:
        try:
            self.action = get_action()
        except StopIteration as end:
            self.action, self.result = None, end.value


def submit(request: Request[Submitted]) -> OperationActions[Submitted]:
    """Submit, and retry if the response was lost; the idempotency key prevents a second task."""
    deadline, backoff, is_lost = time.monotonic() + RESUBMIT_TIMEOUT_SECONDS, Backoff(), False
    while True:
        try:
            submitted: Submitted = yield request
        except ClientError as error:
            is_lost = is_lost or (isinstance(error, UnreachableError) and error.may_have_arrived)
            if not is_lost or time.monotonic() > deadline:
                raise
            yield Sleep(backoff.next_delay_seconds(error))
        else:
            return submitted


def wait(task_id: str, timeout_seconds: float | None) -> OperationActions[Task]:
    """Wait until the task has ended; retry for a limited time while the server restarts."""
    deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
    status: Task = yield requests.status(task_id)
    backoff = Backoff()
    while status["state"] not in FINAL_STATES:
        left = LONG_POLL_SECONDS if deadline is None else min(LONG_POLL_SECONDS, deadline - time.monotonic())
        if left <= 0:
            break
        try:
            status = yield requests.wait(task_id, left)
        except ClientError as error:
            yield Sleep(backoff.next_delay_seconds(error))
            continue
        backoff.reset()
        if status["state"] not in FINAL_STATES:
            yield Sleep(LONG_POLL_PAUSE_SECONDS)
    return status


class StateStream:
    """Reads the states of all tasks over successive connections, without gaps. after: the id of an earlier event."""

    def __init__(self, after: str | None) -> None:
        self._after = after or ""
        self._has_begun = False
        self._backoff = Backoff()
        self._parser = SseParser()

    def next_request(self) -> Request[requests.StreamedBody]:
        """Return the next request."""
        self._parser = SseParser()
        return requests.follow_states(STREAM_IDLE_TIMEOUT_SECONDS, self._after)

    def feed(self, chunk: bytes) -> Iterator[tuple[str, Event]]:
        """Parse the events completed by these bytes; yield each with the id after which to continue."""
        self._backoff.reset()
        self._has_begun = True
        for event in self._parser.feed(chunk):
            self._after = self._parser.last_id or self._after
            yield self._after, event
        self._after = self._parser.last_id or self._after

    def next_delay_seconds(self, error: ClientError | None = None) -> float:
        """Return the delay after a lost or closed connection.

        Raises the error once no retry is left, and if the first connection fails.
        """
        if error is not None and not self._has_begun:
            raise error
        return self._backoff.next_delay_seconds(error or UnreachableError("The server closed the stream."))


class TaskEventStream:
    """Reads a task's events over successive connections, without gaps or duplicates."""

    def __init__(self, task_id: str, stream: str, **position: str | int | None) -> None:
        self.is_finished = False
        self._task_id = task_id
        self._stream = stream
        self._position = position
        self._backoff = Backoff()
        self._parser = SseParser()

    def next_request(self) -> Request[requests.StreamedBody]:
        """Return the next request; a response without content (204) marks the end."""
        self._parser = SseParser()
        return requests.follow(self._task_id, STREAM_IDLE_TIMEOUT_SECONDS, stream=self._stream, **self._position)

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Parse the events completed by these bytes. Any bytes, including keep-alives, reset the backoff."""
        self._backoff.reset()
        for event in self._parser.feed(chunk):
            self._position = {"after": event["seq"]}
            self.is_finished = event["type"] == "end"
            yield event
            if self.is_finished:
                return

    def next_delay_seconds(self, error: ClientError | None = None) -> float:
        """Return the delay after a lost or prematurely closed connection. Raises the error once no retry is left."""
        return self._backoff.next_delay_seconds(
            error or UnreachableError("The server closed the stream before the task ended.")
        )
