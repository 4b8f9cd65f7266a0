"""Checking the agent's directories against ignore rules uses a limited amount of space on the host."""

import os
import stat
from io import RawIOBase

import pytest

from sandbox.workspace.diff.base_tree import GitIgnoreMatcher
from sandbox.workspace.rooted_files import Entry


class FakeGit(RawIOBase):
    """A fake git process. It ignores paths that end in an odd digit, and checks that each queried directory exists."""

    def __init__(self, directory, responses_max=10**9):
        self.directory = directory
        self.responses = b""
        self.responses_max = responses_max
        self.entries_max = 0
        self.missing = []

    def write(self, questions):
        paths = bytes(questions).split(b"\0")[:-1]
        self.entries_max = max(self.entries_max, sum(len(names) for _, names, _ in os.walk(self.directory)))
        self.missing += [path for path in paths if not (self.directory / os.fsdecode(path)).is_dir()]
        for path in paths[: self.responses_max]:
            pattern = b"*[13579]" if path[-1] % 2 else b""
            self.responses += b"\0".join((b"", b"", pattern, path)) + b"\0"
        return len(questions)

    def read(self, _size=-1):
        responses, self.responses = self.responses, b""
        return responses


def directories(*paths):
    return [Entry(path, stat.S_IFDIR | 0o755) for path in paths]


MANY = directories(*(b"deep/down/here/%06d" % number for number in range(1500)))


def test_only_queried_directories_exist_and_none_remain(tmp_path):
    fake_git = FakeGit(tmp_path)
    with GitIgnoreMatcher(tmp_path, fake_git, fake_git) as matcher:
        ignored = matcher.ignored_paths(MANY)
    assert len(ignored) == len(MANY) // 2
    assert fake_git.missing == []
    assert fake_git.entries_max < 500
    assert list(tmp_path.iterdir()) == []


def test_no_directories_remain_when_git_ends_early(tmp_path):
    fake_git = FakeGit(tmp_path, responses_max=3)
    with pytest.raises(BrokenPipeError), GitIgnoreMatcher(tmp_path, fake_git, fake_git) as matcher:
        matcher.ignored_paths(MANY)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_preserved(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".gitignore").write_text("*.o\n")
    fake_git = FakeGit(tmp_path)
    with GitIgnoreMatcher(tmp_path, fake_git, fake_git) as matcher:
        matcher.ignored_paths([*MANY, *directories(b"deep/.gitignore/x")])
    assert (tmp_path / "deep" / ".gitignore").read_text() == "*.o\n"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [".gitignore"]


def test_directories_of_a_deep_tree_are_created_once(tmp_path, monkeypatch):
    created = []
    real_mkdir = os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, *mode: (created.append(path), real_mkdir(path, *mode)))
    fake_git = FakeGit(tmp_path)
    parent_directories = [b"/".join([b"d"] * depth) for depth in range(1, 250)]
    with GitIgnoreMatcher(tmp_path, fake_git, fake_git) as matcher:
        for path in parent_directories:
            matcher.ignored_paths(directories(path))
        for child in (b"a", b"b"):
            matcher.ignored_paths(directories(parent_directories[-1] + b"/" + child))
            matcher.ignored_paths(directories(parent_directories[-1] + b"/" + child + b"/leaf"))
        matcher.ignored_paths(directories(parent_directories[9] + b"/other/leaf"))
    assert fake_git.missing == []
    assert len(created) < 3 * len(parent_directories)
    assert list(tmp_path.iterdir()) == []
