"""The REST API as methods. Every method may raise ClientError in one of its families."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import quote

from sandbox.client import event_stream
from sandbox.client.answers import ArtifactList, Cancellation, Frame, Release, Submitted, TaskPage, TaskStatus
from sandbox.client.connection import Connection
from sandbox.client.download import save
from sandbox.client.errors import ClientError, UnreachableError
from sandbox.client.patience import Patience
from sandbox.model.state import TERMINAL_STATES

WAIT_SECONDS = 60.0
"""How long one request for the end of a task waits; a longer wait is several of them."""

AGAIN_SECONDS = 0.1
"""Before waiting once more: a server that shuts down answers at once."""

RESUBMIT_SECONDS = 60.0
"""How long after the first try a submission whose answer was lost is tried again."""

SILENCE_SECONDS = 45.0
"""A stream that is silent for so long is dead: the server says something every 15 s."""


class Client:
    """One Sandbox server, spoken to over HTTP; a context manager.

    base_url: such as `http://localhost:8122`; timeout_seconds: for each answer, and for each read of a stream.
    """

    def __init__(self, base_url: str, token: str | None = None, *, timeout_seconds: float = 30.0) -> None:
        self._connection = Connection(base_url, token, timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the sockets back."""
        self._connection.close()

    def submit(
        self, manifest: bytes, content_type: str = "application/yaml", *, idempotency_key: str | None = None
    ) -> Submitted:
        """Ask for a task; when this returns the task is durable.

        With an `idempotency_key` (one of its own for each task) a connection that is lost before the answer is no
        loss: the same is asked again, within bounds, and makes no second task.
        """
        headers = {"Content-Type": content_type, **_given({"Idempotency-Key": idempotency_key})}
        deadline, patience, is_lost = time.monotonic() + RESUBMIT_SECONDS, Patience(), False
        while True:
            try:
                return cast("Submitted", self._connection.json("POST", "/tasks", content=manifest, headers=headers))
            except ClientError as error:
                is_lost = is_lost or (isinstance(error, UnreachableError) and error.may_have_arrived)
                if idempotency_key is None or not is_lost or time.monotonic() > deadline:
                    raise
                patience.pause(error)

    def tasks(
        self,
        *,
        states: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        limit: int | None = None,
        sort: str | None = None,
        order: str | None = None,
        cursor: str | None = None,
    ) -> TaskPage:
        """A page of tasks, in the server's order unless `sort` and `order` say otherwise."""
        plain = {"state": ",".join(states) or None, "limit": limit, "sort": sort, "order": order, "cursor": cursor}
        parameters = {**plain, **{f"label.{key}": value for key, value in (labels or {}).items()}}
        return cast("TaskPage", self._connection.json("GET", "/tasks", params=_given(parameters)))

    def status(self, task_id: str) -> TaskStatus:
        """The task as it is now."""
        return cast("TaskStatus", self._connection.json("GET", _path(task_id)))

    def wait(self, task_id: str, *, timeout_seconds: float | None = None) -> TaskStatus:
        """The task once it has ended, or as it is when the time is over (None: no limit).

        A server that is restarted meanwhile is waited for, within bounds.
        """
        deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
        status, patience = self.status(task_id), Patience()
        while status["state"] not in TERMINAL_STATES:
            left = WAIT_SECONDS if deadline is None else min(WAIT_SECONDS, deadline - time.monotonic())
            if left <= 0:
                break
            try:
                status = self._wait_once(task_id, left)
                patience.restore()
                time.sleep(AGAIN_SECONDS if status["state"] not in TERMINAL_STATES else 0)
            except ClientError as error:
                patience.pause(error)
        return status

    def cancel(self, task_id: str, *, reason: str | None = None, force: bool = False) -> Cancellation:
        """Record the wish to cancel; the end comes later. `force` leaves out the agent's grace."""
        parameters = _given({"reason": reason, "force": "true" if force else None})
        return cast("Cancellation", self._connection.json("DELETE", _path(task_id), params=parameters))

    def release(self, task_id: str) -> Release:
        """Remove the sandbox that was preserved after the task failed. Raises NotFoundError when there is none."""
        return cast("Release", self._connection.json("DELETE", _path(task_id, "vm")))

    def logs(
        self, task_id: str, *, stream: str = "all", since: str | None = None, tail: int | None = None
    ) -> Iterator[bytes]:
        """The lines that are there now, `[time] [STDOUT] …`, each with its newline."""
        parameters = _given({"stream": stream, "since": since, "tail": tail})
        with self._connection.stream("GET", _path(task_id, "logs"), params=parameters) as response:
            pending = b""
            for chunk in response.iter_bytes():
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    yield line + b"\n"
            if pending:
                yield pending + b"\n"

    def events(
        self,
        task_id: str,
        *,
        stream: str = "all",
        since: str | None = None,
        tail: int | None = None,
        after: int | None = None,
    ) -> Iterator[Frame]:
        """The frames of a task from its beginning (or `since`, `tail`, `after` a seq) to its end, as they happen.

        A broken connection is resumed where it broke, without loss or doubling, within bounds.
        """
        self.status(task_id)  # the first contact must succeed at once; only later ones are tried again
        parameters = _given({"since": since, "tail": tail, "after": after})
        patience = Patience()
        while True:
            try:
                for frame in self._connected_events(task_id, {"stream": stream, "follow": "true", **parameters}):
                    patience.restore()
                    parameters = {"after": frame["seq"]}
                    yield frame
                    if frame["type"] == "end":
                        return
                failure: ClientError = UnreachableError("The server closed the stream before the task's end.")
            except _EndedError:
                return
            except ClientError as error:
                failure = error
            patience.pause(failure)

    def artifacts(self, task_id: str) -> ArtifactList:
        """What was kept from the task."""
        return cast("ArtifactList", self._connection.json("GET", _path(task_id, "artifacts")))

    def download(self, task_id: str, name: str, target: Path) -> int:
        """Store an artifact (by its name, else its path) as the file `target`; give its size in bytes.

        The file appears whole and verified or not at all. Raises ChecksumError, and OSError as files do.
        """
        # Not compressed on the way: the checksum is that of the stored bytes.
        headers = {"Accept-Encoding": "identity"}
        with self._connection.stream("GET", _path(task_id, "artifacts", name), headers=headers) as response:
            return save(response.iter_bytes(), response.headers.get("X-Checksum-SHA256", ""), target)

    def _wait_once(self, task_id: str, seconds: float) -> TaskStatus:
        path, parameters = _path(task_id, "wait"), {"timeout": f"{seconds:.3f}"}
        return cast("TaskStatus", self._connection.json("GET", path, params=parameters, read_seconds=seconds + 15))

    def _connected_events(self, task_id: str, parameters: dict[str, Any]) -> Iterator[Frame]:
        headers = {"Accept": "text/event-stream"}
        if "after" in parameters:
            headers["Last-Event-ID"] = str(parameters["after"])
        path = _path(task_id, "logs")
        with self._connection.stream(
            "GET", path, params=parameters, headers=headers, read_seconds=SILENCE_SECONDS
        ) as response:
            if response.status_code == 204:
                raise _EndedError
            yield from event_stream.frames(response.iter_bytes())


class _EndedError(Exception):
    """Nothing comes after the place that was asked for."""


def _path(task_id: str, *rest: str) -> str:
    return "/".join(["/tasks", *(quote(part, safe="") for part in (task_id, *rest))])


def _given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if value is not None}
