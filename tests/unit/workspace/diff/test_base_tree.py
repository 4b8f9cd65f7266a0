"""The tree of a base commit uses a limited amount of memory, even if a compromised git lists the tree."""

from pathlib import Path

import pytest

from sandbox.workspace.diff import base_tree
from sandbox.workspace.diff.base_tree import BaseTree, BaseTreeEntry, write_ignore_files
from sandbox.workspace.git_command import GitError


def listing(*paths):
    return [BaseTreeEntry(path, b"100644", b"0" * 40, 1) for path in paths]


def nested_paths(number_of_files, depth, name=b"file"):
    """Return the paths of files that share no directories."""
    return [b"%05d/" % number + b"a/" * (depth - 1) + name for number in range(number_of_files)]


def test_tree_with_too_many_directories_is_refused(monkeypatch):
    monkeypatch.setattr(base_tree, "ENTRIES_MAX", 1000)

    with pytest.raises(GitError, match="git exited"):
        BaseTree(iter(listing(*nested_paths(number_of_files=5, depth=250))))


def test_tree_with_shared_directories_is_read_completely(monkeypatch):
    monkeypatch.setattr(base_tree, "ENTRIES_MAX", 1000)
    shared = b"a/" * 250

    tree = BaseTree(iter(listing(*(shared + b"%d" % number for number in range(700)))))

    assert (len(tree.entries), len(tree.directories)) == (700, 250)


def test_tree_with_directory_paths_that_are_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(base_tree, "PATHS_BYTES_MAX", 100_000)

    with pytest.raises(GitError, match="git exited"):
        BaseTree(iter(listing(b"a/" * 1000 + b"file")))


def test_tree_with_long_file_names_is_read_completely(monkeypatch):
    monkeypatch.setattr(base_tree, "PATHS_BYTES_MAX", 100_000)

    assert len(BaseTree(iter(listing(*(b"a/%0200d" % number for number in range(400))))).entries) == 400


async def test_gitignore_files_in_too_many_directories_are_not_written(monkeypatch, tmp_path):
    monkeypatch.setattr(base_tree, "IGNORE_ENTRIES_MAX", 1000)
    entries = listing(*nested_paths(number_of_files=5, depth=250, name=b".gitignore"))

    with pytest.raises(GitError) as error:
        await write_ignore_files(None, Path(), entries, tmp_path)

    assert "too many .gitignore files" in error.value.stderr
    assert list(tmp_path.iterdir()) == []


def test_gitignore_files_in_shared_directories_are_within_the_bound():
    shared = b"a/" * 100
    paths = [b".gitignore", *(shared + b"%03d/.gitignore" % number for number in range(300)), b"b/.gitignore"]

    assert base_tree.count_created_entries(listing(*paths)) == 302 + 100 + 300 + 1
