"""Bundle of results: a tar with patch, metadata, transcript, their checksums and the manifest."""

import tarfile
from collections.abc import AsyncIterator, Sequence
from datetime import datetime

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sandbox.api.app_context import AppContext
from sandbox.api.middleware.authentication import get_caller
from sandbox.api.routes.artifacts import content_disposition
from sandbox.interfaces.server_services import StoredArtifact
from sandbox.model.manifest.writer import manifest_yaml
from sandbox.model.task import Task
from sandbox.primitives import fair_client_shares

_CHUNK_BYTES = 64 * 1024


async def send_results_bundle(request: Request, context: AppContext) -> Response:
    """Send the tar. `sha256sum -c SHA256SUMS` verifies its files; `metadata.json` describes them."""
    sees_all = get_caller(request).is_operator
    async with fair_client_shares.thread_slot():
        task = await context.services.tasks.status(request.path_params["task_id"])
        stored = [
            one
            for one in await context.services.artifacts.list_artifacts(task.id)
            if one.artifact.is_generated and (sees_all or not one.artifact.contains_secret)
        ]
        manifest = await fair_client_shares.to_thread(
            manifest_yaml, task.manifest, context.settings.agents, with_id=True, with_sources=sees_all
        )
    headers = {"content-disposition": content_disposition(f"{task.id}.proof.tar")}
    return StreamingResponse(_tar(task, manifest, stored), media_type="application/x-tar", headers=headers)


async def _tar(task: Task, manifest: str, stored: Sequence[StoredArtifact]) -> AsyncIterator[bytes]:
    sums = "".join(f"{one.artifact.checksum.removeprefix('sha256:')}  {one.artifact.name}\n" for one in stored)
    texts = {"SHA256SUMS": sums, "manifest.yaml": manifest}
    for name, text in texts.items():
        content = text.encode()
        yield _tar_header(task, name, len(content), task.state_changed_at) + content + _padding(len(content))
    for one in stored:
        yield _tar_header(task, one.artifact.name, one.artifact.size_bytes, one.created_at)
        async for chunk in _read_artifact(one):
            yield chunk
        yield _padding(one.artifact.size_bytes)
    yield bytes(2 * tarfile.BLOCKSIZE)


async def _read_artifact(stored: StoredArtifact) -> AsyncIterator[bytes]:
    """Yield the recorded number of bytes. Raises OSError if the file is shorter; the error aborts the download."""
    left = stored.artifact.size_bytes
    with await fair_client_shares.to_thread(stored.file.open, "rb") as file:
        while left > 0:
            chunk = await fair_client_shares.to_thread(file.read, min(left, _CHUNK_BYTES))
            if not chunk:
                raise OSError(f"{stored.artifact.name} is smaller than recorded.")
            left -= len(chunk)
            yield chunk


def _tar_header(task: Task, name: str, size_bytes: int, at: datetime) -> bytes:
    entry = tarfile.TarInfo(f"{task.id}/{name}")
    entry.size, entry.mtime, entry.mode = size_bytes, int(at.timestamp()), 0o644
    return entry.tobuf(tarfile.PAX_FORMAT)


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % tarfile.BLOCKSIZE)
