"""Neither a hostile repository nor a hostile agent can make git on the host eat the host's memory."""

import re

import pytest

from sandbox.model.errors import AttemptError
from sandbox.workspace import git, staging

MEMORY_BYTES_MAX = 128 * 1024**2


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(git, "MEMORY_BYTES_MAX", MEMORY_BYTES_MAX)


def test_an_object_of_a_repository_that_takes_too_much(house, small):
    house.upstream.commit({"zeros": bytes(2 * MEMORY_BYTES_MAX)})
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


def test_paths_that_are_too_long_together(house, monkeypatch):
    monkeypatch.setattr(staging, "PATHS_BYTES_MAX", 100)
    house.upstream.commit({f"{'directory/' * 3}{number}": b"" for number in range(2)})
    house.stage()
    house.upstream.commit({f"{'directory/' * 3}{number}": b"" for number in range(4)})
    with pytest.raises(AttemptError, match="paths of the commit are longer"):
        house.stage()
