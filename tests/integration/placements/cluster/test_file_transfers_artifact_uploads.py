"""Artifacts that workers upload, including workers on a compromised host."""

import asyncio
import contextlib
import errno
import hashlib
import os
import subprocess
import sys

import msgspec
import pytest

from doubles.cluster_server import wait_until
from sandbox.interfaces.worker_messages import ArtifactPart, Heartbeat, HeartbeatAnswer, Upload, UploadReceived
from sandbox.model.artifacts import Artifact
from sandbox.placements.cluster import file_transfers

HEARTBEAT_WITH_FREE_LOCK = Heartbeat(1, "free", 0, 0, is_launching=False)
CONTENT = b"content" * 100_000
ARTIFACT = Artifact("a.txt", "a.txt", len(CONTENT), "text/plain", f"sha256:{hashlib.sha256(CONTENT).hexdigest()}")


async def upload(server, key, artifact, *parts):
    async with server.connect(Upload(key, artifact), *map(ArtifactPart, parts)) as client:
        return await client.read()


async def test_artifact_is_stored(server, job):
    parts = [CONTENT[at : at + 2**18] for at in range(0, len(CONTENT), 2**18)]
    async with server.connect(server.claim(job)) as client:
        key = (await client.read()).session_key
        assert await upload(server, key, ARTIFACT, *parts, b"") == UploadReceived(is_accepted=True)
    assert (server.data_dir / "tasks" / "task-1" / "artifacts" / "a.txt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("parts", "answer"),
    [
        ((CONTENT[:7], b""), UploadReceived(is_accepted=False)),
        ((b"x" * 2**18, b"x" * 2**18, b"x" * 2**18, b""), None),
        ((CONTENT[:7],), None),
    ],
)
async def test_wrong_or_incomplete_content_is_rejected(server, job, parts, answer):
    async with server.connect(server.claim(job)) as client:
        key = (await client.read()).session_key
        uploading = asyncio.create_task(upload_and_close(server, key, parts))
        assert await uploading == answer
        assert not (server.data_dir / "tasks" / "task-1" / "artifacts" / "a.txt").exists()
        await client.send(HEARTBEAT_WITH_FREE_LOCK)
        assert await client.read() == HeartbeatAnswer(1)


async def test_second_concurrent_upload_of_an_artifact_is_rejected(server, job):
    async with server.connect(server.claim(job)) as client:
        key = (await client.read()).session_key
        async with server.connect(Upload(key, ARTIFACT), ArtifactPart(CONTENT[: 2**18])) as first:
            await wait_until(lambda: incomplete_artifact_files(server))
            assert await upload(server, key, ARTIFACT, b"x") is None
            await finish_upload(first)
            assert await first.read() == UploadReceived(is_accepted=True)


def incomplete_artifact_files(server, task_id="task-1"):
    """Return the files of artifacts that are being stored."""
    return list((server.data_dir / "tasks" / task_id).glob("*.part"))


def stored_artifact_names(server, task_id="task-1"):
    """Return the names of the stored artifacts."""
    return {path.name for path in (server.data_dir / "tasks" / task_id).glob("artifacts/*")}


async def finish_upload(client):
    """Send everything after the first part of the artifact."""
    for at in range(2**18, len(CONTENT), 2**18):
        await client.send(ArtifactPart(CONTENT[at : at + 2**18]))
    await client.send(ArtifactPart(b""))


@contextlib.asynccontextmanager
async def open_upload(server, job):
    """Begin an upload in a session. Yield the connections of the session and the upload."""
    async with server.connect(server.claim(job)) as client:
        key = (await client.read()).session_key
        async with server.connect(Upload(key, ARTIFACT), ArtifactPart(CONTENT[: 2**18])) as uploading:
            await wait_until(lambda: incomplete_artifact_files(server, job.stored.task_id))
            yield client, uploading


async def test_slow_uploads_do_not_delay_other_workers(server):
    """More uploads are open than the server has threads for blocking work."""
    async with contextlib.AsyncExitStack() as stack:
        for number in range(min(32, (os.process_cpu_count() or 1) + 4) + 1):
            await stack.enter_async_context(open_upload(server, await server.submit(f"slow-{number}")))
        job = await server.submit()
        async with open_upload(server, job) as (_, uploading):
            await finish_upload(uploading)
            assert await uploading.read() == UploadReceived(is_accepted=True)


async def test_upload_ends_with_its_session(server, job):
    async with open_upload(server, job) as (client, uploading):
        client.writer.transport.abort()
        assert await uploading.read() is None
    await wait_until(lambda: not incomplete_artifact_files(server))
    assert stored_artifact_names(server) == set()


async def test_upload_ends_when_the_worker_connects_again(server, job):
    claim = server.claim(job)
    async with server.connect(claim) as first:
        key = (await first.read()).session_key
        async with server.connect(Upload(key, ARTIFACT), ArtifactPart(CONTENT[: 2**18])) as uploading:
            await wait_until(lambda: incomplete_artifact_files(server))
            async with server.connect(claim) as second:
                key = (await second.read()).session_key
                assert await uploading.read() is None
                parts = [CONTENT[at : at + 2**18] for at in range(0, len(CONTENT), 2**18)]
                assert await upload(server, key, ARTIFACT, *parts, b"") == UploadReceived(is_accepted=True)


async def test_upload_that_ends_after_a_takeover_does_not_replace_the_artifact(server, job, monkeypatch):
    """The worker is abandoned after the content is complete, and before the artifact gets its name."""
    created = server.replicas.create_artifact
    loop = asyncio.get_running_loop()

    def create_artifact(task_id, artifact):
        copy = created(task_id, artifact)
        flush = copy.flush

        async def abandon():
            server.jobs._abandon(job)

        def flush_and_lose_the_worker():
            flush()
            asyncio.run_coroutine_threadsafe(abandon(), loop).result()

        monkeypatch.setattr(copy, "flush", flush_and_lose_the_worker)
        return copy

    monkeypatch.setattr(server.replicas, "create_artifact", create_artifact)
    async with open_upload(server, job) as (_, uploading):
        await finish_upload(uploading)
        assert await uploading.read() is None
    assert job.stored.is_abandoned
    await wait_until(lambda: not incomplete_artifact_files(server))
    assert stored_artifact_names(server) == set()


async def test_stalled_upload_is_aborted(server, job, monkeypatch):
    monkeypatch.setattr(file_transfers, "_PART_TIMEOUT_SECONDS", 0.2)
    async with open_upload(server, job) as (client, uploading):
        assert await uploading.read() is None
        await client.send(HEARTBEAT_WITH_FREE_LOCK)
        assert await client.read() == HeartbeatAnswer(1)
    await wait_until(lambda: not incomplete_artifact_files(server))


async def test_upload_that_is_too_slow_is_aborted(server, job, monkeypatch):
    """Each part arrives in time, but the whole upload takes too long."""
    monkeypatch.setattr(file_transfers, "_UPLOAD_SECONDS", 0.5)
    monkeypatch.setattr(file_transfers, "_UPLOAD_BYTES_PER_SECOND", 2**40)
    async with open_upload(server, job) as (_, uploading):

        async def send():
            while True:
                await uploading.send(ArtifactPart(b"x"))
                await asyncio.sleep(0.05)

        sending = asyncio.create_task(send())
        assert await uploading.read() is None
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    await wait_until(lambda: not incomplete_artifact_files(server))


async def test_artifact_that_cannot_be_stored_is_requested_again(server, job, monkeypatch):
    monkeypatch.setattr(server.replicas, "create_artifact", raise_disk_full)
    async with server.connect(server.claim(job)) as client:
        key = (await client.read()).session_key
        parts = [CONTENT[at : at + 2**18] for at in range(0, len(CONTENT), 2**18)]
        for accepted in (False, False, True):
            if accepted:
                monkeypatch.undo()
            assert await upload(server, key, ARTIFACT, *parts, b"") == UploadReceived(accepted)
        await client.send(HEARTBEAT_WITH_FREE_LOCK)
        assert await client.read() == HeartbeatAnswer(1)


def raise_disk_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


async def upload_text(server, claim, name):
    """Upload a file in a separate session; return the server's answer."""
    async with server.connect(claim) as client:
        key = (await client.read()).session_key
        artifact = msgspec.structs.replace(ARTIFACT, name=name)
        parts = [CONTENT[at : at + 2**18] for at in range(0, len(CONTENT), 2**18)]
        return await upload(server, key, artifact, *parts, b"")


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("limit", [("ARTIFACTS_BYTES_MAX", 2_000_000), ("WORKER_ARTIFACTS_MAX", 2)])
async def test_limits_on_artifacts_apply_across_sessions(server, job, monkeypatch, limit, restarts):
    """An artifact that is sent several times counts once."""
    monkeypatch.setattr(file_transfers, *limit)
    claim = server.claim(job)
    for name in ("a.txt", "a.txt", "b.txt", "a.txt"):
        assert await upload_text(server, claim, name) == UploadReceived(is_accepted=True)
    if restarts:
        await server.restart()
    assert await upload_text(server, claim, "c.txt") is None
    await wait_until(lambda: server.jobs.of_task("task-1").stored.is_fenced)
    assert stored_artifact_names(server) == {"a.txt", "b.txt"}


END_WITH_UPLOAD_PROGRAM = """
import contextlib, sys
from pathlib import Path
from doubles.cluster_server import ClusterServer
from integration.placements.cluster.test_file_transfers_artifact_uploads import open_upload
from sandbox.placements.cluster.worker_session import LoopThread

async def begin():
    server = ClusterServer(Path(sys.argv[1]))
    await server.start()
    await stack.enter_async_context(open_upload(server, await server.submit()))

stack, thread = contextlib.AsyncExitStack(), LoopThread()
thread.run_blocking(begin())
thread.close()
print("closed", flush=True)
"""


def test_server_stops_despite_an_open_upload(tmp_path):
    """No thread waits for the rest of the file."""
    completed = subprocess.run(
        [sys.executable, "-c", END_WITH_UPLOAD_PROGRAM, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (completed.returncode, completed.stdout) == (0, "closed\n"), completed.stderr
    assert list(tmp_path.rglob("*.part")) == []


async def upload_and_close(server, key, parts):
    async with server.connect(Upload(key, ARTIFACT), *map(ArtifactPart, parts)) as client:
        if parts[-1]:
            client.writer.transport.abort()
        return await client.read()


@pytest.mark.parametrize("size", [-1, 2**40])
async def test_artifact_with_an_impossible_size_fences_the_worker(server, job, size):
    async with server.connect(server.claim(job)) as client:
        key = (await client.read()).session_key
        artifact = msgspec.structs.replace(ARTIFACT, size_bytes=size)
        assert await upload(server, key, artifact) is None
        await wait_until(lambda: job.stored.is_fenced)
        assert await client.read() is None
