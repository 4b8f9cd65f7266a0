"""Neither a hostile repository nor a hostile agent can make git on the host eat the host's memory."""

import re

import pytest

from sandbox.model.errors import AttemptError
from sandbox.runtimes.limits.cgroups import find_hierarchies
from sandbox.workspace.clone import staging
from sandbox.workspace.git import command

MEMORY_BYTES_MAX = 24 * 1024**2


def taking_more_than(memory_bytes):
    """What git holds in one piece, and the disk in a few pages."""
    return bytes(memory_bytes + 8 * 1024**2)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(command, "MEMORY_BYTES_MAX", MEMORY_BYTES_MAX)


def test_an_object_of_a_repository_that_takes_too_much(house, small):
    house.upstream.commit({"zeros": taking_more_than(MEMORY_BYTES_MAX)})
    with pytest.raises(AttemptError, match="not enough memory") as raised:
        house.stage()
    assert raised.value.code == "clone_failed"


def test_lines_of_the_agents_that_take_too_much(house, small):
    base = house.stage()
    (house.workspace / "lines").write_bytes(b"\n" * (MEMORY_BYTES_MAX // 16))
    made, reason = house.patch_and_reason(base)
    assert re.search(r"comparing the files takes git more.*\.gitignore", reason)
    assert made == f"# truncated: {reason}\n".encode()


def test_large_files_without_so_many_lines_are_in_the_patch(house, small):
    """The twin: the same size is no trouble by itself."""
    base = house.stage()
    (house.workspace / "line").write_bytes(b"x" * (MEMORY_BYTES_MAX // 16))
    assert len(house.patch(base)) > MEMORY_BYTES_MAX // 16


@pytest.fixture(params=["git gives up", "the kernel ends git"])
def little(house, request, monkeypatch):
    """The house with a task of little memory, of which git is told what it may have or is not."""
    if not find_hierarchies().roots:
        pytest.skip("no control group can be written to")
    house.memory_bytes = 32 * 1024**2
    if request.param == "the kernel ends git":
        monkeypatch.setattr(command, "_MEMORY_SHARE", 10)
    return house


def test_a_repository_that_takes_more_than_the_tasks_memory(little):
    little.upstream.commit({"zeros": taking_more_than(little.memory_bytes)})
    with pytest.raises(AttemptError, match=r"raise vm\.memory") as raised:
        little.stage()
    assert raised.value.code == "clone_failed"
    assert not raised.value.failure.is_transient


def test_work_of_the_agents_that_takes_more_than_the_tasks_memory(little):
    base = little.stage()
    (little.workspace / "lines").write_bytes(b"\n" * (little.memory_bytes // 16))

    made, reason = little.patch_and_reason(base)

    assert "raise vm.memory" in reason
    assert made == f"# truncated: {reason}\n".encode()


def test_ordinary_work_with_little_memory(little):
    """The twin: there is enough for it."""
    base = little.stage()
    (little.workspace / "README.md").write_text("# Edited\n" * 10_000)
    little.patch_applies_whole(base)


def test_paths_that_are_too_long_together(house, monkeypatch):
    monkeypatch.setattr(staging, "PATHS_BYTES_MAX", 100)
    house.upstream.commit({f"{'directory/' * 3}{number}": b"" for number in range(2)})
    house.stage()
    house.upstream.commit({f"{'directory/' * 3}{number}": b"" for number in range(4)})
    with pytest.raises(AttemptError, match="paths of the commit are longer"):
        house.stage()
