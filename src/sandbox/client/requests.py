"""Typed descriptions of API requests. Building one performs no I/O, except to read a manifest file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

from sandbox.client.response_types import (
    ArtifactList,
    Cancellation,
    Checked,
    Deletion,
    Draining,
    Health,
    Host,
    HostList,
    Pruned,
    Release,
    Submitted,
    Task,
    TaskPage,
)
from sandbox.client.url import host_path, task_path

ResponseT = TypeVar("ResponseT")

Manifest = Mapping[str, Any] | str | bytes | Path
"""A manifest as data, as YAML or JSON text, or as the path of a file."""

RESPONSE_BYTES_MAX = 16 * 1024 * 1024
"""Size limit of a decompressed JSON response.

A parsed response takes up to 35 times as much memory. A task's status is far smaller.
"""

LIST_BYTES_MAX = 512 * 1024 * 1024
"""Size limit of a decompressed JSON list. The largest possible page of the task list is half this size."""

PAGE_TASKS_MAX = 1000
"""Page size for listing all tasks."""

PRUNE_TIMEOUT_SECONDS = 600.0
"""Timeout for removing finished tasks."""

RELEASE_TIMEOUT_SECONDS = 90.0
"""Timeout for removing a preserved sandbox: the server waits until the sandbox's shells have ended."""

DELETE_TIMEOUT_SECONDS = 180.0
"""Timeout for deleting a task: the server first removes the task's preserved sandbox."""

WAIT_RESPONSE_TIMEOUT_SECONDS = 15.0
"""How much longer than a long poll's own timeout the client waits for the response."""

_TASK_KEYS = ("id", "state")


@dataclass(frozen=True)
class Request(Generic[ResponseT]):
    """One request.

    response_type: the type of the response.
    required_keys: keys without which a response is invalid.
    read_seconds: read timeout, if it differs from the client's.
    response_bytes_max: size limit of the decompressed JSON response.
    """

    method: str
    path: str
    response_type: type[ResponseT]
    required_keys: tuple[str, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    read_seconds: float | None = None
    response_bytes_max: int = RESPONSE_BYTES_MAX


class StreamedBody:
    """Marks a response whose body is streamed."""


class TaskFilters(TypedDict, total=False):
    """Filters for a list of tasks; see `Client.tasks`."""

    states: Iterable[str]
    outcomes: Iterable[str]
    labels: Mapping[str, str] | None
    search: str | None
    repository: str | None
    parent: str | None
    rerun_of: str | None
    created_after: str | None
    created_before: str | None


def submit(manifest: Manifest, content_type: str | None, idempotency_key: str) -> Request[Submitted]:
    """Submit a manifest. Raises OSError if its file cannot be read."""
    body, own_type = _encode_manifest(manifest)
    headers = {"Content-Type": content_type or own_type, "Idempotency-Key": idempotency_key}
    return Request("POST", "/tasks", Submitted, ("task_id",), headers=headers, content=body)


def rerun(task_id: str, overrides: Iterable[str], prompt: str | None, idempotency_key: str) -> Request[Submitted]:
    """Submit a task again."""
    fields = {"overrides": list(overrides)} | drop_none({"prompt": prompt})
    return _derive_task(task_id, "rerun", fields, idempotency_key)


def continue_task(
    task_id: str, prompt: str | None, overrides: Iterable[str], idempotency_key: str
) -> Request[Submitted]:
    """Submit a task that starts from the result of another one."""
    return _derive_task(task_id, "continue", {"prompt": prompt, "overrides": list(overrides)}, idempotency_key)


def _derive_task(task_id: str, action: str, fields: Mapping[str, Any], idempotency_key: str) -> Request[Submitted]:
    from sandbox.model.manifest.json import write_json

    headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key}
    return Request(
        "POST", task_path(task_id, action), Submitted, ("task_id",), headers=headers, content=write_json(fields)
    )


def check(manifest: Manifest, content_type: str | None) -> Request[Checked]:
    """Validate a manifest. Raises OSError if its file cannot be read."""
    body, own_type = _encode_manifest(manifest)
    headers = {"Content-Type": content_type or own_type}
    return Request("POST", "/tasks", Checked, ("definition",), {"dry_run": "true"}, headers, body)


def tasks(
    *,
    states: Iterable[str] = (),
    outcomes: Iterable[str] = (),
    labels: Mapping[str, str] | None = None,
    search: str | None = None,
    **others: str | int | None,
) -> Request[TaskPage]:
    """List a page of tasks. others: further parameters, named as in the API."""
    parameters = {
        "state": ",".join(states) or None,
        "outcome": ",".join(outcomes) or None,
        "q": search,
        **others,
    }
    params = {**drop_none(parameters), **{f"label.{key}": value for key, value in (labels or {}).items()}}
    return Request("GET", "/tasks", TaskPage, ("tasks",), params, response_bytes_max=LIST_BYTES_MAX)


def status(task_id: str) -> Request[Task]:
    """Read the current status of a task."""
    return Request("GET", task_path(task_id), Task, _TASK_KEYS)


def manifest(task_id: str) -> Request[dict[str, Any]]:
    """Read the manifest of a task."""
    return Request("GET", task_path(task_id, "manifest"), dict[str, Any], ("repository",))


def wait(task_id: str, seconds: float) -> Request[Task]:
    """Wait until the task has ended, for at most this many seconds."""
    parameters = {"timeout": f"{seconds:.3f}"}
    return Request(
        "GET",
        task_path(task_id, "wait"),
        Task,
        _TASK_KEYS,
        parameters,
        read_seconds=seconds + WAIT_RESPONSE_TIMEOUT_SECONDS,
    )


def cancel(task_id: str, reason: str | None, *, force: bool) -> Request[Cancellation]:
    """Request cancellation of a task."""
    parameters = drop_none({"reason": reason, "force": "true" if force else None})
    return Request("DELETE", task_path(task_id), Cancellation, ("task_id",), parameters)


def release(task_id: str) -> Request[Release]:
    """Remove a preserved sandbox."""
    return Request("DELETE", task_path(task_id, "vm"), Release, ("task_id",), read_seconds=RELEASE_TIMEOUT_SECONDS)


def delete(task_id: str) -> Request[Deletion]:
    """Delete a task that has ended."""
    return Request("DELETE", task_path(task_id, "data"), Deletion, ("task_id",), read_seconds=DELETE_TIMEOUT_SECONDS)


def artifacts(task_id: str) -> Request[ArtifactList]:
    """List a task's artifacts."""
    path = task_path(task_id, "artifacts")
    return Request("GET", path, ArtifactList, ("artifacts",), response_bytes_max=LIST_BYTES_MAX)


def artifact(task_id: str, name: str) -> Request[StreamedBody]:
    """Download an artifact."""
    # No content encoding: the checksum covers the stored bytes.
    return Request(
        "GET", task_path(task_id, "artifacts", name), StreamedBody, (), headers={"Accept-Encoding": "identity"}
    )


def logs(task_id: str, **filters: str | int | None) -> Request[StreamedBody]:
    """Read the log lines available now."""
    return Request("GET", task_path(task_id, "logs"), StreamedBody, (), drop_none(filters))


def follow(task_id: str, read_seconds: float, **filters: str | int | None) -> Request[StreamedBody]:
    """Follow a task's events."""
    headers = {"Accept": "text/event-stream"}
    if filters.get("after") is not None:
        headers["Last-Event-ID"] = str(filters["after"])
    parameters = {**drop_none(filters), "follow": "true"}
    return Request("GET", task_path(task_id, "logs"), StreamedBody, (), parameters, headers, read_seconds=read_seconds)


def follow_states(read_seconds: float, after: str) -> Request[StreamedBody]:
    """Follow the states of all tasks."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
    parameters = {"follow": "true"}
    return Request("GET", "/events", StreamedBody, (), parameters, headers, read_seconds=read_seconds)


def health() -> Request[Health]:
    """Read the server's health."""
    return Request("GET", "/health", Health, ("status",))


def prune(
    *, older_than_seconds: float | None, keep: int | None, max_bytes: int | None, dry_run: bool
) -> Request[Pruned]:
    """Remove finished tasks."""
    bounds = drop_none({"older_than_seconds": older_than_seconds, "keep": keep, "max_bytes": max_bytes})
    parameters = bounds | ({"dry_run": "true"} if dry_run else {})
    return Request(
        "POST",
        "/admin/prune",
        Pruned,
        ("tasks",),
        parameters,
        read_seconds=PRUNE_TIMEOUT_SECONDS,
        response_bytes_max=LIST_BYTES_MAX,
    )


def hosts() -> Request[HostList]:
    """List the hosts that run tasks."""
    return Request("GET", "/hosts", HostList, ("hosts",), response_bytes_max=LIST_BYTES_MAX)


def drain_host(host: str) -> Request[Host]:
    """Drain a host of the cluster."""
    return Request("POST", host_path(host, "drain"), Host, ("draining_since",))


def undo_host_drain(host: str) -> Request[Host]:
    """Undo the drain of a host of the cluster."""
    return Request("DELETE", host_path(host, "drain"), Host, ("draining_since",))


def drain() -> Request[Draining]:
    """Start draining the server."""
    return Request("POST", "/admin/drain", Draining, ("draining",))


def undo_drain() -> Request[Draining]:
    """Stop draining the server."""
    return Request("DELETE", "/admin/drain", Draining, ("draining",))


def drain_status() -> Request[Draining]:
    """Read the progress of a drain."""
    return Request("GET", "/admin/drain", Draining, ("draining",))


def drop_none(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Remove entries whose value is None."""
    return {key: value for key, value in parameters.items() if value is not None}


def _encode_manifest(manifest: Manifest) -> tuple[bytes, str]:
    match manifest:
        case Path():
            return manifest.read_bytes(), "application/json" if manifest.suffix == ".json" else "application/yaml"
        case str():
            return manifest.encode(errors="surrogatepass"), "application/yaml"
        case bytes():
            return manifest, "application/yaml"
    from sandbox.model.manifest.json import write_json

    return write_json(manifest), "application/json"
