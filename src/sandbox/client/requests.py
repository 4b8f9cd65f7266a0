"""What is asked of the API, call by call, without asking: whoever sends one gives the answer of its type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

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
)
from sandbox.client.url import task_path

AnswerT = TypeVar("AnswerT")

Manifest = Mapping[str, Any] | str | bytes | Path
"""A manifest as data; as YAML or JSON text; or the file that it is in."""

PRUNE_SECONDS = 600.0
"""For the removal of finished tasks."""

RELEASE_SECONDS = 90.0
"""For the removal of a preserved sandbox, which waits for shells in it to end."""

ANSWER_SECONDS = 15.0
"""For the answer to a long wait, once its time is over."""

_OF_A_TASK = ("id", "state")


@dataclass(frozen=True)
class Call(Generic[AnswerT]):
    """One request.

    answers: the type of the answer; keys: those without which it is none.
    read_seconds: how long the answer may be silent, where that is known to be long.
    """

    method: str
    path: str
    answers: type[AnswerT]
    keys: tuple[str, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    read_seconds: float | None = None


class Stream:
    """The type of an answer whose body is read piece by piece."""


def submit(manifest: Manifest, content_type: str | None, idempotency_key: str) -> Call[Submitted]:
    """Raises OSError where the manifest is a file that cannot be read."""
    body, own_type = _body(manifest)
    headers = {"Content-Type": content_type or own_type, "Idempotency-Key": idempotency_key}
    return Call("POST", "/tasks", Submitted, ("task_id",), headers=headers, content=body)


def check(manifest: Manifest, content_type: str | None) -> Call[Checked]:
    """Raises OSError where the manifest is a file that cannot be read."""
    body, own_type = _body(manifest)
    headers = {"Content-Type": content_type or own_type}
    return Call("POST", "/tasks", Checked, ("definition",), {"dry_run": "true"}, headers, body)


def tasks(states: Iterable[str], labels: Mapping[str, str] | None, **plain: str | int | None) -> Call[TaskPage]:
    """A page of the list."""
    parameters = {"state": ",".join(states) or None, **plain}
    wanted = {**given(parameters), **{f"label.{key}": value for key, value in (labels or {}).items()}}
    return Call("GET", "/tasks", TaskPage, ("tasks",), wanted)


def status(task_id: str) -> Call[Task]:
    """The task as it is now."""
    return Call("GET", task_path(task_id), Task, _OF_A_TASK)


def wait(task_id: str, seconds: float) -> Call[Task]:
    """The task once it has ended, or after so many seconds."""
    parameters = {"timeout": f"{seconds:.3f}"}
    return Call("GET", task_path(task_id, "wait"), Task, _OF_A_TASK, parameters, read_seconds=seconds + ANSWER_SECONDS)


def cancel(task_id: str, reason: str | None, *, force: bool) -> Call[Cancellation]:
    """The wish to cancel."""
    parameters = given({"reason": reason, "force": "true" if force else None})
    return Call("DELETE", task_path(task_id), Cancellation, ("task_id",), parameters)


def release(task_id: str) -> Call[Release]:
    """The end of a preserved sandbox."""
    return Call("DELETE", task_path(task_id, "vm"), Release, ("task_id",), read_seconds=RELEASE_SECONDS)


def artifacts(task_id: str) -> Call[ArtifactList]:
    """What was kept."""
    return Call("GET", task_path(task_id, "artifacts"), ArtifactList, ("artifacts",))


def artifact(task_id: str, name: str) -> Call[Stream]:
    """The bytes of an artifact."""
    # Not compressed on the way: the checksum is that of the stored bytes.
    return Call("GET", task_path(task_id, "artifacts", name), Stream, (), headers={"Accept-Encoding": "identity"})


def logs(task_id: str, **wanted: str | int | None) -> Call[Stream]:
    """Lines that are there now."""
    return Call("GET", task_path(task_id, "logs"), Stream, (), given(wanted))


def follow(task_id: str, read_seconds: float, **wanted: str | int | None) -> Call[Stream]:
    """Events as they happen."""
    headers = {"Accept": "text/event-stream"}
    if wanted.get("after") is not None:
        headers["Last-Event-ID"] = str(wanted["after"])
    parameters = {**given(wanted), "follow": "true"}
    return Call("GET", task_path(task_id, "logs"), Stream, (), parameters, headers, read_seconds=read_seconds)


def health() -> Call[Health]:
    """How the server is."""
    return Call("GET", "/health", Health, ("status",))


def prune(*, older_than_seconds: float | None, keep: int | None, max_bytes: int | None, dry_run: bool) -> Call[Pruned]:
    """The end of finished tasks."""
    bounds = given({"older_than_seconds": older_than_seconds, "keep": keep, "max_bytes": max_bytes})
    parameters = bounds | ({"dry_run": "true"} if dry_run else {})
    return Call("POST", "/admin/prune", Pruned, ("tasks",), params=parameters, read_seconds=PRUNE_SECONDS)


def drain() -> Call[Draining]:
    """Take and begin no tasks."""
    return Call("POST", "/admin/drain", Draining, ("draining",))


def undo_drain() -> Call[Draining]:
    """Take and begin tasks again."""
    return Call("DELETE", "/admin/drain", Draining, ("draining",))


def draining() -> Call[Draining]:
    """How far a drain is."""
    return Call("GET", "/admin/drain", Draining, ("draining",))


def given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that were left out."""
    return {key: value for key, value in parameters.items() if value is not None}


def _body(manifest: Manifest) -> tuple[bytes, str]:
    match manifest:
        case Path():
            return manifest.read_bytes(), "application/json" if manifest.suffix == ".json" else "application/yaml"
        case str():
            return manifest.encode(errors="surrogatepass"), "application/yaml"
        case bytes():
            return manifest, "application/yaml"
    from sandbox.model.manifest.document import write_json

    return write_json(manifest), "application/json"
