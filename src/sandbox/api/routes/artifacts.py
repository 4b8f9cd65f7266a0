"""Routes that list and download artifacts."""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from fastapi import Request
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from sandbox.api import paths
from sandbox.api.app_context import ContextDep
from sandbox.api.authentication import get_caller
from sandbox.api.errors import RangeNotSatisfiableError, SecretArtifactError
from sandbox.api.responses import JsonResponse, is_head_request
from sandbox.api.route_declarations import (
    create_router,
    declare_parameters,
    header_parameter,
    problem_responses,
    raw_content,
)
from sandbox.interfaces.server_services import ArtifactNotFoundError, StoredArtifact
from sandbox.model.display_text import format_timestamp
from sandbox.model.wire.task_bodies import ArtifactBody, ArtifactListBody
from sandbox.primitives import fair_client_shares

_MEDIA_TYPE = re.compile(r"([\w.+-]{1,100}/[\w.+-]{1,100})(; ?charset=[\w-]{1,40})?", re.ASCII)
_PLAIN_TEXT = "text/plain; charset=utf-8"
_OCTET_STREAM = "application/octet-stream"
_IMAGE_TYPES = frozenset({"image/gif", "image/jpeg", "image/png", "image/webp"})
_TEXT_TYPES = frozenset(
    {
        "application/javascript",
        "application/json",
        "application/sarif+json",
        "application/toml",
        "application/x-ndjson",
        "application/xml",
        "application/yaml",
        "image/svg+xml",
    }
)
_CONTENT_SECURITY_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox"
_SINGLE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)
_BYTES = {"type": "string", "format": "binary"}
_MEDIA_TYPES = {kind.replace("/", "_"): _BYTES for kind in (_OCTET_STREAM, "text/plain", *sorted(_IMAGE_TYPES))}

router = create_router("Artifacts")


@router.get(paths.ARTIFACTS, responses=problem_responses("task_not_found", "service_unavailable"))
async def list_artifacts(context: ContextDep, task_id: paths.TaskId) -> JsonResponse[ArtifactListBody]:
    """List the artifacts of a task."""
    async with fair_client_shares.thread_slot():
        stored = await context.services.artifacts.list_artifacts(task_id)
        return await fair_client_shares.to_thread(_artifact_list_response, task_id, stored)


def _artifact_list_response(task_id: str, stored: Sequence[StoredArtifact]) -> JsonResponse[ArtifactListBody]:
    items = [_artifact_body(task_id, one) for one in stored]
    total = sum(one.artifact.size_bytes for one in stored)
    return JsonResponse({"task_id": task_id, "artifacts": items, "total_count": len(items), "total_size_bytes": total})


def _artifact_body(task_id: str, stored: StoredArtifact) -> ArtifactBody:
    artifact = stored.artifact
    return {
        "name": artifact.name,
        "path": artifact.path,
        "size_bytes": artifact.size_bytes,
        "content_type": artifact.content_type,
        "checksum": artifact.checksum,
        "created_at": format_timestamp(stored.created_at),
        "download_url": paths.artifact_path(task_id, artifact.name),
        "contains_secret": artifact.contains_secret,
    }


@router.get(
    paths.ARTIFACT,
    response_class=Response,
    responses={
        200: raw_content("The content, as `text/plain`, a raster image or `application/octet-stream`", **_MEDIA_TYPES),
        206: raw_content("The requested range", **_MEDIA_TYPES),
        304: {"description": "Not modified"},
        **problem_responses(
            "task_not_found",
            "artifact_not_found",
            "artifact_contains_secret",
            "range_not_satisfiable",
            "service_unavailable",
        ),
    },
    openapi_extra=declare_parameters(
        header_parameter("Range", "One range of bytes, such as `bytes=0-1023`"),
        header_parameter("If-Range", "ETag of the artifact that the range refers to"),
        header_parameter("If-None-Match", "ETags of the client's cached copies"),
    ),
)
async def download_artifact(
    request: Request, context: ContextDep, task_id: paths.TaskId, name: paths.ArtifactName
) -> Response:
    """Download an artifact by its name, or by its path if no artifact has that name.

    Artifacts that contain a secret require the operator role.
    """
    async with fair_client_shares.thread_slot():
        stored = await context.services.artifacts.find_artifact(task_id, name)
    if stored.artifact.contains_secret and not get_caller(request).is_operator:
        raise SecretArtifactError(stored.artifact.name)
    stat_result = await fair_client_shares.to_thread(_stat_regular_file, stored.file)
    if stat_result is None:
        raise ArtifactNotFoundError(task_id, name)
    etag = f'"{stored.artifact.checksum}"'
    headers = {"etag": etag, "cache-control": "private, no-cache", "content-security-policy": _CONTENT_SECURITY_POLICY}
    if _etags(request, "if-none-match") & {"*", etag, f"W/{etag}"}:
        return Response(status_code=304, headers=headers)
    headers |= {
        "content-type": download_content_type(stored.artifact.content_type),
        "content-disposition": content_disposition(stored.artifact.name),
        "x-checksum-sha256": stored.artifact.checksum.removeprefix("sha256:"),
    }
    byte_range = parse_range(request.headers, etag, stat_result.st_size)
    missing = ArtifactNotFoundError(task_id, name)
    return _ArtifactResponse(stored.file, headers, stat_result, byte_range, missing)


def _stat_regular_file(file: Path) -> os.stat_result | None:
    try:
        stat_result = file.lstat()
    except FileNotFoundError:
        return None
    return stat_result if stat.S_ISREG(stat_result.st_mode) else None


def _etags(request: Request, name: str) -> set[str]:
    """Return the ETags from all occurrences of a header, as written; `*` matches any."""
    return {tag.strip() for line in request.headers.getlist(name) for tag in line.split(",")} - {""}


def download_content_type(content_type: str) -> str:
    """Return a Content-Type that stops browsers from executing the content or using it as a style sheet or frame."""
    match = _MEDIA_TYPE.fullmatch(content_type)
    if match is None:
        return _OCTET_STREAM
    kind = match[1].lower()
    if kind in _IMAGE_TYPES:
        return kind
    return _PLAIN_TEXT if kind.startswith("text/") or kind in _TEXT_TYPES else _OCTET_STREAM


def content_disposition(name: str) -> str:
    """Return a Content-Disposition (RFC 6266) with an ASCII fallback for old clients.

    Escapes `name`, so it cannot end the header or its quoted string.
    """
    plain = re.sub(r"[^A-Za-z0-9 ._+=@,-]", "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='', errors='replace')}"


def parse_range(headers: Mapping[str, str], etag: str, size_bytes: int) -> str | None:
    """Return the single range to serve, or None for the whole file: RFC 9110 allows a server to ignore any range.

    Raises RangeNotSatisfiableError if the range starts after the end.
    """
    match = _SINGLE_RANGE.fullmatch(headers.get("range", "").strip())
    if match is None or headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if (not first and not last) or (first and last and int(first) > int(last)):
        return None
    if int(first) >= size_bytes if first else int(last) == 0 or size_bytes == 0:
        raise RangeNotSatisfiableError(size_bytes)
    return match[0]


class _ArtifactResponse(FileResponse):
    """A file response with a validated range. It restores HEAD, which ResponseHeadersMiddleware replaced with GET.

    It sends no Last-Modified, because only the ETag identifies the content.

    missing: the error if the task is deleted before the file is opened.
    """

    def __init__(
        self,
        file: Path,
        headers: dict[str, str],
        stat_result: os.stat_result,
        byte_range: str | None,
        missing: ArtifactNotFoundError,
    ) -> None:
        super().__init__(file, headers=headers, stat_result=stat_result)
        del self.headers["last-modified"]
        self._byte_range = byte_range
        self._missing = missing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name not in {b"range", b"if-range"}]
        if self._byte_range is not None:
            headers.append((b"range", self._byte_range.encode()))
        method = "HEAD" if is_head_request(scope) else scope["method"]
        head: list[Message] = []

        async def send_with_body(message: Message) -> None:
            """Delay the head until the body's first part, because Starlette opens the file after it sends the head."""
            if message["type"] == "http.response.start":
                head.append(message)
                return
            while head:
                await send(head.pop())
            await send(message)

        try:
            await super().__call__({**scope, "headers": headers, "method": method}, receive, send_with_body)
        except FileNotFoundError:
            raise self._missing from None
