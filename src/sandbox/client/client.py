"""The client for programs without an event loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from uuid import uuid4

from sandbox.client import operations, requests
from sandbox.client.connection import ERROR_BYTES_MAX, TIMEOUT_SECONDS, resolve_connection
from sandbox.client.download import Download, MemoryDownload
from sandbox.client.errors import ClientError
from sandbox.client.events import Event
from sandbox.client.operations import Operation, OperationSteps, ResumableStream, Sleep
from sandbox.client.requests import Manifest, Request, StreamBody
from sandbox.client.responses import (
    ArtifactList,
    Cancellation,
    Checked,
    Draining,
    Health,
    Pruned,
    Release,
    Submitted,
    Task,
    TaskPage,
    TaskSummary,
)
from sandbox.client.sse import LineBuffer

if TYPE_CHECKING:
    import httpx

ResponseT = TypeVar("ResponseT")

READ_BYTES_MAX = 16 * 1024 * 1024
"""What an artifact that is read into memory may have unless the caller says otherwise."""

PAGE_TASKS_MAX = 1000
"""Of a list that is asked for whole."""


class Client:
    """One Sandbox server, spoken to over HTTP; a context manager. Every method may raise ClientError in its families.

    server: such as `http://localhost:8122`; token: what it wants to be shown. None: as SANDBOX_SERVER and
    SANDBOX_TOKEN say. timeout_seconds: for each answer, and for each read of a stream.
    """

    def __init__(
        self, server: str | None = None, token: str | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        import httpx

        self._connection = resolve_connection(server, token, timeout_seconds)
        self._http = httpx.Client(**self._connection.client_arguments())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the sockets back."""
        self._http.close()

    def submit(
        self, manifest: Manifest, content_type: str | None = None, *, idempotency_key: str | None = None
    ) -> Submitted:
        """Ask for a task; when this returns the task is durable.

        manifest: data, YAML or JSON text, or the path of a file. A connection that is lost before the answer is no
        loss: the same is asked again, within bounds, and makes no second task. idempotency_key: one of its own for
        each task, for programs that may ask again after they have ended; without, one is made.
        """
        return self._run_operation(
            operations.submit(requests.submit(manifest, content_type, idempotency_key or str(uuid4())))
        )

    def check(self, manifest: Manifest, content_type: str | None = None) -> Checked:
        """Whether a manifest would be taken, with the defaults filled in; nothing is submitted.

        Raises InvalidManifestError with all its mistakes.
        """
        return self._request(requests.check(manifest, content_type))

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
        return self._request(requests.tasks(states, labels, limit=limit, sort=sort, order=order, cursor=cursor))

    def all_tasks(
        self, *, states: Iterable[str] = (), labels: Mapping[str, str] | None = None
    ) -> Iterator[TaskSummary]:
        """Every task, page after page; none skipped and none twice whatever happens in between."""
        state_names, cursor = tuple(states), None
        while True:
            page = self.tasks(states=state_names, labels=labels, limit=PAGE_TASKS_MAX, cursor=cursor)
            yield from page["tasks"]
            cursor = page["next_cursor"]
            if cursor is None or not page["tasks"]:
                return

    def status(self, task_id: str) -> Task:
        """The task as it is now."""
        return self._request(requests.status(task_id))

    def wait(self, task_id: str, *, timeout_seconds: float | None = None) -> Task:
        """The task once it has ended, or as it is when the time is over (None: no limit).

        A server that is restarted meanwhile is waited for, within bounds.
        """
        return self._run_operation(operations.wait(task_id, timeout_seconds))

    def cancel(self, task_id: str, *, reason: str | None = None, force: bool = False) -> Cancellation:
        """Record the wish to cancel; the end comes later. `force` leaves out the agent's grace."""
        return self._request(requests.cancel(task_id, reason, force=force))

    def release(self, task_id: str) -> Release:
        """Remove the sandbox that was preserved after the task failed. Raises NotFoundError when there is none."""
        return self._request(requests.release(task_id))

    def health(self) -> Health:
        """How the server is."""
        return self._request(requests.health())

    def drain(self) -> Draining:
        """Have the server take and begin no tasks until it is undone; those that run go on."""
        return self._request(requests.drain())

    def undo_drain(self) -> Draining:
        """Have the server take and begin tasks again."""
        return self._request(requests.undo_drain())

    def draining(self) -> Draining:
        """Whether the server is being drained, and how far that is."""
        return self._request(requests.draining())

    def prune(
        self,
        *,
        older_than_seconds: float | None = None,
        keep: int | None = None,
        max_bytes: int | None = None,
        dry_run: bool = False,
    ) -> Pruned:
        """Remove finished tasks, by the server's own bounds where none is given; gives those that are gone."""
        return self._request(
            requests.prune(older_than_seconds=older_than_seconds, keep=keep, max_bytes=max_bytes, dry_run=dry_run)
        )

    def logs(
        self, task_id: str, *, stream: str = "all", since: str | None = None, tail: int | None = None
    ) -> Iterator[bytes]:
        """The lines that are there now, `[time] [STDOUT] …`, each with its newline."""
        lines = LineBuffer()
        with self._stream(requests.logs(task_id, stream=stream, since=since, tail=tail)) as response:
            for chunk in response.iter_bytes():
                yield from lines.feed(chunk)
        yield from lines.flush()

    def events(
        self,
        task_id: str,
        *,
        stream: str = "all",
        since: str | None = None,
        tail: int | None = None,
        after: int | None = None,
    ) -> Iterator[Event]:
        """What happens to a task, from its beginning (or `since`, `tail`, `after` a seq) to its end.

        A broken connection is resumed where it broke, without loss or doubling, within bounds.
        """
        self.status(task_id)  # the first contact must succeed at once; only later ones are tried again
        stream_state = ResumableStream(task_id, stream, since=since, tail=tail, after=after)
        while not stream_state.is_finished:
            failure = None
            try:
                with self._stream(stream_state.next_request()) as response:
                    if response.status_code == 204:
                        return
                    for chunk in response.iter_bytes():
                        yield from stream_state.feed(chunk)
            except ClientError as error:
                failure = error
            if not stream_state.is_finished:
                time.sleep(stream_state.next_delay_seconds(failure))

    def artifacts(self, task_id: str) -> ArtifactList:
        """What was kept from the task."""
        return self._request(requests.artifacts(task_id))

    def download(self, task_id: str, name: str, target: Path) -> int:
        """Store an artifact (by its name, else its path) as the file `target`; give its size in bytes.

        The file appears whole and verified or not at all. Raises ChecksumError, and OSError as files do.
        """
        with (
            self._stream(requests.artifact(task_id, name)) as response,
            Download(target, response.headers.get("X-Checksum-SHA256", "")) as download,
        ):
            for chunk in response.iter_bytes():
                download.write(chunk)
            return download.finish()

    def read(self, task_id: str, name: str, *, bytes_max: int = READ_BYTES_MAX) -> bytes:
        """The verified bytes of a small artifact. Raises ChecksumError, and TooLargeError for a large one."""
        with self._stream(requests.artifact(task_id, name)) as response:
            reading = MemoryDownload(name, response.headers.get("X-Checksum-SHA256", ""), bytes_max)
            for chunk in response.iter_bytes():
                reading.write(chunk)
            return reading.finish()

    def _run_operation(self, conversation: OperationSteps[ResponseT]) -> ResponseT:
        operation = Operation(conversation)
        while operation.step is not None:
            if isinstance(operation.step, Sleep):
                time.sleep(operation.step.seconds)
                operation.send(None)
                continue
            try:
                answer = self._request(operation.step)
            except ClientError as error:
                operation.throw(error)
            else:
                operation.send(answer)
        return operation.result

    def _request(self, call: Request[ResponseT]) -> ResponseT:
        with self._stream(call) as response:
            body = response.read()
        return self._connection.parse_response(call, response.status_code, body)

    @contextmanager
    def _stream(self, call: Request[Any] | Request[StreamBody]) -> Iterator[httpx.Response]:
        """A successful answer whose body is read by the caller."""
        with (
            self._connection.translate_errors(),
            self._http.stream(**self._connection.request_arguments(call)) as response,
        ):
            if not response.is_success:
                raise self._connection.parse_error(response, _read_error_body(response))
            yield response


def _read_error_body(response: httpx.Response) -> bytes:
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > ERROR_BYTES_MAX:
            break
    return bytes(body)
