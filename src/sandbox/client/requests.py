"""Typed descriptions of API requests and their URLs. Building one performs no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar
from urllib.parse import quote, urlsplit

from sandbox.client.errors import HostNotFoundError, InvalidParameterError, TaskNotFoundError
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
from sandbox.model.default_server_address import DEFAULT_SERVER

_LOOPBACK = re.compile(
    r"((?:[a-z0-9-]+\.)*localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?=[:/]|\Z)", re.ASCII | re.IGNORECASE
)


def validate_base_url(address: str) -> str:
    """Return the normalized base URL: ASCII, no trailing slash. Raises InvalidParameterError.

    For an address on this machine, the scheme may be omitted: `localhost:8122`. Any other address needs a scheme, so
    that no token is sent unencrypted by mistake.
    """
    import httpx2

    if "@" in address:  # not included in the message: it may contain a password
        message = "The server's address must not contain credentials or an @."
        raise InvalidParameterError(f"{message} Give a token with --token or SANDBOX_TOKEN.")
    full_address = f"http://{address}" if _LOOPBACK.match(address) else address
    try:
        url = httpx2.URL(full_address)
        is_address = url.scheme in {"http", "https"} and bool(url.host) and urlsplit(full_address).port != 0
        # Convert the host name as a connection would: the conversion raises an error if a label is invalid.
        url.raw_host.decode().encode("idna")
        url.raw_host.decode("idna")
    except (httpx2.InvalidURL, ValueError):
        is_address = False
    if not is_address or "?" in address or "#" in address:
        message = f"The server's address must look like {DEFAULT_SERVER}, not {address!r}."
        advice = "" if "://" in full_address else " Only localhost needs no https:// or http://."
        raise InvalidParameterError(message + advice)
    return str(url).rstrip("/")


def is_loopback_url(url: str) -> bool:
    """Return whether a base URL points to this machine."""
    return _LOOPBACK.match(url.partition("://")[2]) is not None


def task_page_url(server: str, task_id: str) -> str:
    """Return the address of a task's page in the dashboard. Raises InvalidParameterError or TaskNotFoundError."""
    return validate_base_url(server) + task_path(task_id)


def task_path(task_id: str, *rest: str) -> str:
    """Return the path of a task or of one of its resources. Raises InvalidParameterError or TaskNotFoundError."""
    if not task_id:
        raise InvalidParameterError("The id of a task must not be empty.")
    if "/" in task_id:  # a proxy may decode an encoded slash, and `a/vm` is a different path than `a`
        raise TaskNotFoundError(f"There is no task {task_id!r}; ids contain no slashes.")
    with translate_url_errors():
        return "/".join(["/tasks", *map(_quote_segment, (task_id, *rest))])


def host_path(host: str, *rest: str) -> str:
    """Return the path of a host or of one of its resources. Raises InvalidParameterError or HostNotFoundError."""
    if not host:
        raise InvalidParameterError("The name of a host must not be empty.")
    if "/" in host:
        raise HostNotFoundError(f"There is no host {host!r}; names contain no slashes.")
    with translate_url_errors():
        return "/".join(["/hosts", *map(_quote_segment, (host, *rest))])


def _quote_segment(part: str) -> str:
    """Quote a path segment, including `.` and `..`, which URL normalization would remove with the preceding segment."""
    return part.replace(".", "%2E") if part in {".", ".."} else quote(part, safe="")


@contextmanager
def translate_url_errors() -> Iterator[None]:
    """Raise InvalidParameterError for a URL that is too long or cannot be encoded."""
    import httpx2

    try:
        yield
    except httpx2.InvalidURL as error:
        raise InvalidParameterError("The request cannot be sent; it is too long.") from error
    except UnicodeEncodeError as error:
        raise InvalidParameterError("The request cannot be sent; it is not UTF-8.") from error


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
    read_timeout_seconds: read timeout, if it differs from the client's.
    response_bytes_max: size limit of the decompressed JSON response.
    """

    method: str
    path: str
    response_type: type[ResponseT]
    required_keys: tuple[str, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    read_timeout_seconds: float | None = None
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
    from sandbox.model.manifest.parsed_document import write_json

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
        read_timeout_seconds=seconds + WAIT_RESPONSE_TIMEOUT_SECONDS,
    )


def cancel(task_id: str, reason: str | None, *, force: bool) -> Request[Cancellation]:
    """Request cancellation of a task."""
    parameters = drop_none({"reason": reason, "force": "true" if force else None})
    return Request("DELETE", task_path(task_id), Cancellation, ("task_id",), parameters)


def release(task_id: str) -> Request[Release]:
    """Remove a preserved sandbox."""
    return Request(
        "DELETE", task_path(task_id, "vm"), Release, ("task_id",), read_timeout_seconds=RELEASE_TIMEOUT_SECONDS
    )


def delete(task_id: str) -> Request[Deletion]:
    """Delete a task that has ended."""
    return Request(
        "DELETE", task_path(task_id, "data"), Deletion, ("task_id",), read_timeout_seconds=DELETE_TIMEOUT_SECONDS
    )


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


def follow(task_id: str, read_timeout_seconds: float, **filters: str | int | None) -> Request[StreamedBody]:
    """Follow a task's events."""
    headers = {"Accept": "text/event-stream"}
    if filters.get("after") is not None:
        headers["Last-Event-ID"] = str(filters["after"])
    parameters = {**drop_none(filters), "follow": "true"}
    return Request(
        "GET",
        task_path(task_id, "logs"),
        StreamedBody,
        (),
        parameters,
        headers,
        read_timeout_seconds=read_timeout_seconds,
    )


def follow_states(read_timeout_seconds: float, after: str) -> Request[StreamedBody]:
    """Follow the states of all tasks."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
    parameters = {"follow": "true"}
    return Request("GET", "/events", StreamedBody, (), parameters, headers, read_timeout_seconds=read_timeout_seconds)


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
        read_timeout_seconds=PRUNE_TIMEOUT_SECONDS,
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
    from sandbox.model.manifest.parsed_document import write_json

    return write_json(manifest), "application/json"
