"""A worker fetches the image of its task from a real server for workers in the same process."""

import asyncio
import contextlib
import errno
import itertools
import os
import random
import socket
import ssl
from types import SimpleNamespace

import msgspec
import pytest

from doubles.cluster_server import ClusterServer, wait_until
from doubles.image_archives import entry, layer, minimal_root, oci_archive
from sandbox.images.image_builder import import_image
from sandbox.images.image_transfer import HostImageCopies, StoredImageContent
from sandbox.images.profiles import ProfileCatalog
from sandbox.interfaces.images import Image, ImageReference, ImageUnusableError
from sandbox.interfaces.worker_messages import (
    CallResult,
    Claimed,
    FetchImage,
    ImageNotSent,
    ImagePart,
    ImagePreparationStatus,
    PreparedImage,
    PrepareImage,
    ServerCall,
)
from sandbox.model.errors import SandboxError
from sandbox.placements.cluster import file_transfers
from sandbox.placements.cluster.hosts import prepare_image
from sandbox.worker import task_image
from sandbox.worker.task_image import TaskImage

OTHER_DIGEST = f"sha256:{'0' * 64}"


@pytest.fixture(scope="module")
def root_layer():
    return minimal_root(is_truncated=True)


@pytest.fixture
async def server(tmp_path):
    server = ClusterServer(tmp_path)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def add(server, root_layer, tmp_path):
    """Return a function that imports an image on the server, and returns its reference."""

    def add(content=b"1" * 600_000):
        archive = oci_archive(tmp_path / "image.tar", root_layer, layer(entry("content", content)))
        import_image(server.images.image_store("tools"), archive)
        return server.images.find_reference("tools")

    return add


class FakeWorker:
    """Answers the requests of the server for images, as a worker does. Implements `OpenImage` as `open`."""

    def __init__(self, server, client, claimed, data_dir):
        self.server, self.client, self.claimed = server, client, claimed
        self.image = TaskImage(HostImageCopies(data_dir), "namespaces")
        self.connections = contextlib.AsyncExitStack()
        self.fetches, self.change = 0, lambda preparation: preparation
        self.serving = asyncio.create_task(self._serve())

    async def _serve(self):
        while isinstance(message := await self.client.read(), ServerCall):
            try:
                answer = self.change(await self.image.prepare(message.request, self.open))
                result = CallResult(message.call_id, msgspec.json.encode(answer))
            except (SandboxError, OSError) as error:
                result = CallResult(message.call_id, error=type(error).__name__, message=str(error))
            await self.client.send(result)

    async def open(self, digest):
        self.fetches += 1
        request = FetchImage(self.claimed.session_key, digest)
        connection = await self.connections.enter_async_context(self.server.connect(request))
        return connection.reader, connection.writer


@pytest.fixture
async def job(server):
    return await server.submit()


@contextlib.asynccontextmanager
async def running_worker(server, job, data_dir):
    async with server.connect(server.claim(job)) as client:
        claimed = await client.read()
        assert isinstance(claimed, Claimed)
        worker = FakeWorker(server, client, claimed, data_dir)
        yield worker
        worker.serving.cancel()
        await asyncio.gather(worker.serving, return_exceptions=True)
        await worker.connections.aclose()


@pytest.fixture
async def worker(server, job, tmp_path):
    async with running_worker(server, job, tmp_path / "host") as worker:
        yield worker


async def prepare(job, image):
    return await prepare_image(job.session, "tools", image, 10)


async def prepare_until_ready(job, image):
    async with asyncio.timeout(20):
        while not (preparation := await prepare(job, image)).is_ready:
            await asyncio.sleep(0.02)
    return preparation.image


async def prepare_until_problem(job, image):
    async with asyncio.timeout(20):
        while not (preparation := await prepare(job, image)).problem:
            await asyncio.sleep(0.02)
    return preparation.problem


async def test_worker_fetches_the_image_once(worker, job, add, tmp_path):
    image = add()
    first = await prepare(job, image)
    assert (first.is_ready, first.image) == (False, None)
    prepared = await prepare_until_ready(job, image)
    assert prepared.digest == image.digest
    assert prepared.directory == f"{tmp_path}/host/profiles/tools/{image.digest[7:]}/root"
    assert (await prepare(job, image)).image == prepared
    assert (worker.fetches, worker.image.find("tools")) == (1, prepared)
    with pytest.raises(ImageUnusableError, match="has prepared no image of the profile basic"):
        worker.image.find("basic")


async def test_host_that_has_the_image_fetches_nothing(worker, job, add, tmp_path):
    image = add()
    HostImageCopies(tmp_path / "host").receive(image, worker.server.images.open(image).read)
    assert (await prepare(job, image)).is_ready
    assert worker.fetches == 0


async def test_newer_image_of_the_profile_is_fetched(worker, job, add):
    older = await prepare_until_ready(job, add())
    newer = await prepare_until_ready(job, add(b"2"))
    assert (worker.fetches, newer.digest != older.digest) == (2, True)


async def test_image_that_is_removed_while_it_is_requested_is_replaced_by_the_next(worker, job, add, monkeypatch):
    monkeypatch.setattr(task_image, "_RETRY_SECONDS", 0.0)
    removed = add()
    worker.server.images.image_store("tools").remove_images()
    problem = await prepare_until_problem(job, removed)
    expected = f"It was not fetched: The server cannot read the image {removed.name}; its log has the reason"
    assert problem == f"{expected} and the remedy."
    assert await prepare_until_ready(job, add(b"2"))


async def test_damaged_image_of_the_server_is_refused(worker, job, add):
    image = add()
    root = worker.server.images.image_store("tools").rootfs_path(image.digest)
    (root / "content").write_bytes(b"2" * 600_000)
    with pytest.raises(ImageUnusableError, match=r"Its content does not match its digest\. Build or import it again"):
        await prepare_until_ready(job, image)


async def test_disk_error_of_the_host_is_reported(worker, job, add, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    image = add()
    monkeypatch.setattr(worker.image._copies, "receive", fail)
    with pytest.raises(OSError, match="No space left on device"):
        await prepare_until_ready(job, image)


async def test_host_with_its_own_image_of_a_profile_without_one_is_refused(worker, job, root_layer, tmp_path):
    assert await prepare(job, None) == ImagePreparationStatus(is_ready=True)
    archive = oci_archive(tmp_path / "own.tar", root_layer)
    import_image(ProfileCatalog(tmp_path / "host").image_store("tools"), archive)
    with pytest.raises(ImageUnusableError, match="The server has no image of the profile tools, but this host has one"):
        await prepare(job, None)


@pytest.mark.parametrize(
    "answer",
    [
        ImagePreparationStatus(is_ready=True),
        ImagePreparationStatus(is_ready=True, image=PreparedImage(OTHER_DIGEST, "/")),
    ],
)
async def test_worker_that_claims_to_have_another_image_is_refused(worker, job, add, answer):
    image = add()
    worker.change = lambda _: answer
    with pytest.raises(ImageUnusableError, match=f"has prepared another image instead of {image.name}"):
        await prepare(job, image)


@pytest.mark.parametrize(
    "answer",
    [
        ImagePreparationStatus(is_ready=False),
        ImagePreparationStatus(is_ready=True, image=PreparedImage(OTHER_DIGEST, "/")),
    ],
)
async def test_worker_must_not_use_an_image_if_the_server_has_none(worker, job, answer):
    worker.change = lambda _: answer
    with pytest.raises(ImageUnusableError, match="has prepared another image instead of the host's own /usr"):
        await prepare(job, None)


@pytest.mark.parametrize(
    "changes",
    [{"image": PreparedImage("sha256:1", "/")}, {"received_bytes": -1}, {"problem": "x" * 4097}],
    ids=["digest", "size", "problem"],
)
async def test_invalid_answer_is_refused(worker, job, add, changes):
    image = add()
    worker.change = lambda _: msgspec.structs.replace(ImagePreparationStatus(is_ready=True), **changes)
    with pytest.raises(OSError, match="is not responding"):
        await prepare(job, image)


class TestFetches:
    """Which image a worker may fetch."""

    async def fetch(self, worker, key, digest):
        """Return the number of bytes that the server sends."""
        size = 0
        async with worker.server.connect(FetchImage(key, digest)) as client:
            while isinstance(part := await client.read(), ImagePart) and part.data:
                size += len(part.data)
        return size

    async def test_only_the_requested_image_is_sent(self, worker, job, add):
        requested, other = add(), add(b"2")
        key = worker.claimed.session_key
        assert await self.fetch(worker, key, requested.digest) == 0
        await prepare_until_ready(job, requested)
        assert await self.fetch(worker, key, requested.digest) == 0
        job.session.image_offer.replace(requested)
        assert await self.fetch(worker, key, other.digest) == 0
        assert await self.fetch(worker, os.urandom(32), requested.digest) == 0
        assert await self.fetch(worker, key, requested.digest) > 600_000
        assert await self.fetch(worker, key, requested.digest) == 0  # each offer allows one transfer

    @pytest.mark.parametrize("digest", ["", "sha256:../../etc", "sha256:" + "0" * 63, "x" * 71])
    async def test_text_that_is_not_a_digest_is_malformed(self, worker, job, add, digest):
        await prepare_until_ready(job, add())
        assert await self.fetch(worker, worker.claimed.session_key, digest) == 0

    async def test_a_worker_gets_one_image_at_a_time_and_a_slow_worker_is_disconnected(
        self, worker, job, add, monkeypatch
    ):
        monkeypatch.setattr(file_transfers, "_PART_TIMEOUT_SECONDS", 2.0)
        image = add(os.urandom(1000) * 20_000)
        job.session.image_offer.replace(image)
        key = worker.claimed.session_key
        async with worker.server.connect(FetchImage(key, image.digest)) as slow:
            await wait_until(lambda: job.session.image_offer._is_taken)
            job.session.image_offer.replace(image)
            assert await self.fetch(worker, key, image.digest) == 0
            await wait_until(lambda: not job.session.image_offer._is_taken)
            assert slow is not None
        assert await self.fetch(worker, key, image.digest) > 20_000_000

    async def test_transfer_ends_with_the_session(self, worker, job, add):
        image = add(os.urandom(1000) * 20_000)
        session = job.session
        session.image_offer.replace(image)
        async with worker.server.connect(FetchImage(worker.claimed.session_key, image.digest)):
            await wait_until(lambda: session.image_offer._is_taken)
            session.close()
            await wait_until(lambda: not session.image_offer._is_taken)


@pytest.mark.parametrize(
    "error",
    [socket.gaierror("Name or service not known"), OSError("Multiple exceptions: refused"), ssl.SSLError("bad record")],
    ids=lambda error: type(error).__name__,
)
async def test_network_error_is_not_reported_as_a_host_error(worker, job, add, monkeypatch, error):
    monkeypatch.setattr(task_image, "_RETRY_SECONDS", 0.0)
    image, open_image, failures = add(), worker.open, [error]

    async def fail_once(digest):
        if failures:
            raise failures.pop()
        return await open_image(digest)

    worker.open = fail_once
    assert (await prepare_until_ready(job, image)).digest == image.digest


async def test_fetch_is_repeated_after_an_error_of_the_host(worker, job, add, monkeypatch):
    monkeypatch.setattr(task_image, "_RETRY_SECONDS", 0.0)
    image, receive, failures = add(), HostImageCopies.receive, [OSError(28, "No space left on device")]

    def fail_once(images, reference, read):
        if failures:
            raise failures.pop()
        receive(images, reference, read)

    monkeypatch.setattr(HostImageCopies, "receive", fail_once)
    with pytest.raises(OSError, match="No space left"):
        await prepare_until_ready(job, image)
    assert (await prepare_until_ready(job, image)).digest == image.digest


async def test_worker_waits_while_the_server_sends_the_maximum_number_of_images(server, worker, job, add, monkeypatch):
    monkeypatch.setattr(task_image, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(file_transfers, "TRANSFERS_MAX", 1)
    image, other_job = add(os.urandom(1000) * 20_000), await server.submit("task-2")
    async with running_worker(server, other_job, server.data_dir.with_name("other")) as other:
        other_job.session.image_offer.replace(image)
        async with server.connect(FetchImage(other.claimed.session_key, image.digest)):
            await wait_until(lambda: other_job.session.image_offer._is_taken)
            problem = await prepare_until_problem(job, image)
            assert problem == "The server is sending 1 images, the maximum; the worker retries later."
            job.session.image_offer.replace(image)
            async with server.connect(FetchImage(worker.claimed.session_key, image.digest)) as refused:
                assert await refused.read() == ImageNotSent("image_transfers_busy", problem)
            assert not (await prepare(job, image)).is_ready
        assert (await prepare_until_ready(job, image)).digest == image.digest


async def test_maximum_number_of_images_is_sent_concurrently(server, worker, job, add, monkeypatch):
    monkeypatch.setattr(file_transfers, "TRANSFERS_MAX", 2)
    image, other_job = add(os.urandom(1000) * 20_000), await server.submit("task-2")
    async with running_worker(server, other_job, server.data_dir.with_name("other")) as other:
        other_job.session.image_offer.replace(image)
        async with server.connect(FetchImage(other.claimed.session_key, image.digest)):
            await wait_until(lambda: other_job.session.image_offer._is_taken)
            await prepare_until_ready(job, image)
            assert other_job.session.image_offer._is_taken
    assert worker.fetches == 1


async def test_pause_between_failed_fetches_grows_to_a_limit_and_ends_with_success(monkeypatch):
    now, opened_at, is_stored = 1000.0, [], False
    monkeypatch.setattr(task_image, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(random, "uniform", lambda _, highest: highest)
    image = ImageReference("tools", OTHER_DIGEST, 1)
    copies = SimpleNamespace(find=lambda *_: Image("tools", OTHER_DIGEST, "/") if is_stored else None)
    tested = TaskImage(copies, "namespaces")

    async def refuse(_):
        opened_at.append(now)
        raise ConnectionRefusedError

    async def prepare_for(seconds):
        nonlocal now
        for _ in range(seconds):
            preparation = await tested.prepare(PrepareImage("tools", image), refuse)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            now += 1
        return preparation

    await prepare_for(400)
    gaps = [later - earlier for earlier, later in itertools.pairwise(opened_at)]
    assert gaps[:6] == [6, 11, 21, 41, 61, 61]
    is_stored = True
    assert (await prepare_for(1)).is_ready
    is_stored = False
    opened_at.clear()
    await prepare_for(10)
    assert opened_at[1] - opened_at[0] == 6


class TestUnreadableImage:
    """The server cannot read its image."""

    @pytest.fixture
    def break_disk(self, monkeypatch):
        def break_disk():
            read, counter = StoredImageContent.read, itertools.count()

            def fail(content):
                if next(counter):
                    raise OSError(errno.EIO, "Input/output error", "/data/profiles/tools/x")
                return read(content)

            monkeypatch.setattr(StoredImageContent, "read", fail)

        return break_disk

    async def test_server_logs_the_reason_and_the_worker_gets_a_code(self, worker, job, add, break_disk, caplog):
        image = add()
        break_disk()
        job.session.image_offer.replace(image)
        async with worker.server.connect(FetchImage(worker.claimed.session_key, image.digest)) as client:
            assert isinstance(await client.read(), ImagePart)
            answer = await client.read()
        assert (answer.code, "/data" in answer.message) == ("image_unreadable", False)
        [record] = [record for record in caplog.records if record.levelname == "WARNING"]
        assert f"The image {image.name} is not sent to a worker: [Errno 5]" in record.getMessage()
        assert "build or import the image again (sandbox profile build tools)." in record.getMessage()

    async def test_task_waits_and_the_fetch_is_repeated(self, worker, job, add, break_disk, monkeypatch):
        monkeypatch.setattr(task_image, "_RETRY_SECONDS", 0.0)
        image = add()
        with monkeypatch.context():
            break_disk()
            assert "The server cannot read the image" in await prepare_until_problem(job, image)
        monkeypatch.undo()
        monkeypatch.setattr(task_image, "_RETRY_SECONDS", 0.0)
        assert (await prepare_until_ready(job, image)).digest == image.digest
