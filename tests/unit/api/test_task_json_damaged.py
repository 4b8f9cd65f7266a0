"""The definition of a task whose journal was damaged or changed."""

import base64
import hashlib

import pytest

from doubles.manifests import manifest
from sandbox.api.task_json import resolved_manifest_body


@pytest.mark.parametrize(
    ("patch", "content"),
    [(base64.b64encode(b"diff").decode(), b"diff"), ("not base64!", b"not base64!"), ("é", "é".encode())],
)
def test_digest_of_a_patch_that_is_not_base64_is_the_digest_of_its_text(patch, content):
    task = manifest("task-1")
    task = task.replace(repository=type(task.repository)(url="https://h/r.git", branch="main", patch=patch))
    assert resolved_manifest_body(task)["repository"]["patch"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
