"""The bundle of results: its checksums prove that the patch and the metadata were not changed afterwards."""

import hashlib
import io
import tarfile

import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from sandbox.model.artifacts import Artifact


@pytest.fixture
def add_artifact(tmp_path):
    def add_artifact(tasks, name, content, path=None, *, contains_secret=False):
        file = tmp_path / name
        file.write_bytes(content)
        checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
        tasks.add_artifact(
            "task-001",
            Artifact(name, path or f".sandbox/{name}", len(content), "text/plain", checksum, contains_secret),
            file,
        )

    return add_artifact


def unpack(response):
    with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def test_bundle_has_files_and_checksums(pages, add_artifact):
    pages.tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    add_artifact(pages.tasks, "task-001.patch", b"diff" * 1000)
    add_artifact(pages.tasks, "metadata.json", b"{}")
    add_artifact(pages.tasks, "report.md", b"# Report", path="report.md")
    response = pages.get("/tasks/task-001/proof")
    assert "task-001.proof.tar" in response.headers["content-disposition"]
    files = unpack(response)
    assert set(files) == {
        f"task-001/{name}" for name in ("SHA256SUMS", "manifest.yaml", "task-001.patch", "metadata.json")
    }
    for line in files["task-001/SHA256SUMS"].decode().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256(files[f"task-001/{name}"]).hexdigest() == digest


def test_artifact_with_a_secret_is_available_to_operators_only(pages_with_tokens, add_artifact):
    pages = pages_with_tokens(FakeTokenStore(ann="operator", bob="viewer"))
    pages.tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    add_artifact(pages.tasks, "task-001.patch", b"hunter2", contains_secret=True)
    for name, is_included in (("ann", True), ("bob", False)):
        files = unpack(pages.get("/tasks/task-001/proof", authorization=f"Bearer {name}"))
        assert ("task-001/task-001.patch" in files) == is_included
        assert (b"hunter2" in b"".join(files.values())) == is_included
