"""What proves a task's work is taken home in one file, and can be checked there."""

import hashlib
import io
import tarfile

import pytest

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.model.events import Artifact


@pytest.fixture
def keep(tmp_path):
    def keep(tasks, name, content, path=None, *, contains_secret=False):
        file = tmp_path / name
        file.write_bytes(content)
        checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
        tasks.keep(
            "task-001",
            Artifact(name, path or f".sandbox/{name}", len(content), "text/plain", checksum, contains_secret),
            file,
        )

    return keep


def unpacked(answer):
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def test_patch_metadata_and_transcript_come_with_their_checksums(pages, keep):
    pages.tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    keep(pages.tasks, "task-001.patch", b"diff" * 1000)
    keep(pages.tasks, "metadata.json", b"{}")
    keep(pages.tasks, "report.md", b"# Report", path="report.md")
    answer = pages.get("/tasks/task-001/proof")
    assert "task-001.proof.tar" in answer.headers["content-disposition"]
    files = unpacked(answer)
    assert set(files) == {
        f"task-001/{name}" for name in ("SHA256SUMS", "manifest.yaml", "task-001.patch", "metadata.json")
    }
    for line in files["task-001/SHA256SUMS"].decode().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256(files[f"task-001/{name}"]).hexdigest() == digest


def test_what_contains_a_secret_is_for_operators(guarded_pages, keep):
    pages = guarded_pages(FakeAccess(ann="operator", bob="viewer"))
    pages.tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    keep(pages.tasks, "task-001.patch", b"hunter2", contains_secret=True)
    for name, is_there in (("ann", True), ("bob", False)):
        files = unpacked(pages.get("/tasks/task-001/proof", authorization=f"Bearer {name}"))
        assert ("task-001/task-001.patch" in files) == is_there
        assert (b"hunter2" in b"".join(files.values())) == is_there
