"""Neither a hostile repository nor a hostile agent can exhaust the host's memory through git."""

import re

import pytest

from sandbox.model.failure import AttemptError
from sandbox.runtimes.limits.cgroups import find_hierarchies
from sandbox.workspace import git_command
from sandbox.workspace.clone import clone_and_checkout

MEMORY_BYTES_MAX = 24 * 1024**2


def content_larger_than(memory_bytes):
    """Return content that git loads into memory as a whole, but that compresses to a few pages on disk."""
    return bytes(memory_bytes + 8 * 1024**2)


@pytest.fixture
def small_memory_limit(monkeypatch):
    monkeypatch.setattr(git_command, "MEMORY_BYTES_MAX", MEMORY_BYTES_MAX)


def test_large_object_in_a_repository_fails_the_clone(harness, small_memory_limit):
    harness.upstream.commit({"zeros": content_larger_than(MEMORY_BYTES_MAX)})
    with pytest.raises(AttemptError, match="too large for git's memory") as raised:
        harness.stage()
    assert raised.value.code == "clone_failed"


def test_file_with_many_lines_truncates_the_patch(harness, small_memory_limit):
    base = harness.stage()
    (harness.workspace / "lines").write_bytes(b"\n" * (MEMORY_BYTES_MAX // 16))
    patch, reason = harness.patch_and_reason(base)
    assert re.search(r"git needs over.*\.gitignore", reason)
    assert patch == f"# truncated: {reason}\n".encode()


def test_large_file_with_few_lines_is_in_the_patch(harness, small_memory_limit):
    """The control: the same size alone causes no failure."""
    base = harness.stage()
    (harness.workspace / "line").write_bytes(b"x" * (MEMORY_BYTES_MAX // 16))
    assert len(harness.patch(base)) > MEMORY_BYTES_MAX // 16


@pytest.fixture(params=["git aborts", "the kernel kills git"])
def low_memory_harness(harness, request, monkeypatch):
    """The harness of a task with little memory. Either git itself or only the kernel enforces the limit."""
    if not find_hierarchies().roots:
        pytest.skip("no control group can be written to")
    harness.memory_bytes = 32 * 1024**2
    if request.param == "the kernel kills git":
        monkeypatch.setattr(git_command, "_MEMORY_SHARE", 10)
    return harness


def test_repository_too_large_for_the_memory_of_the_task_fails_the_clone(low_memory_harness):
    low_memory_harness.upstream.commit({"zeros": content_larger_than(low_memory_harness.memory_bytes)})
    with pytest.raises(AttemptError, match=r"raise vm\.memory") as raised:
        low_memory_harness.stage()
    assert raised.value.code == "clone_failed"
    assert not raised.value.failure.is_transient


def test_changes_too_large_for_the_memory_of_the_task_truncate_the_patch(low_memory_harness):
    base = low_memory_harness.stage()
    (low_memory_harness.workspace / "lines").write_bytes(b"\n" * (low_memory_harness.memory_bytes // 16))

    patch, reason = low_memory_harness.patch_and_reason(base)

    assert "raise vm.memory" in reason
    assert patch == f"# truncated: {reason}\n".encode()


def test_ordinary_changes_need_little_memory(low_memory_harness):
    """The control: with the same memory, ordinary changes succeed."""
    base = low_memory_harness.stage()
    (low_memory_harness.workspace / "README.md").write_text("# Edited\n" * 10_000)
    low_memory_harness.verify_patch(base)


def test_total_length_of_the_paths_in_a_commit_is_limited(harness, monkeypatch):
    monkeypatch.setattr(clone_and_checkout, "PATHS_BYTES_MAX", 160)
    harness.upstream.commit({f"{'directory/' * 3}{number}": b"" for number in range(2)})
    harness.stage()
    harness.upstream.commit({f"{'directory/' * 3}{number}": b"" for number in range(4)})
    with pytest.raises(AttemptError, match="paths in the commit total more than"):
        harness.stage()
