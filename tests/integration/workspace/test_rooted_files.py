"""Opening a file that was replaced after its check neither follows a path out of the root directory nor blocks."""

import os
import threading
import tracemalloc
from contextlib import closing

import pytest

from sandbox.primitives.files import create_private_file
from sandbox.workspace.rooted_files import RootedFiles


@pytest.fixture
def root(tmp_path):
    """A directory `inside` with a file, and a secret file next to the directory."""
    inside = tmp_path / "inside"
    (inside / "directory").mkdir(parents=True)
    (inside / "directory" / "file").write_text("mine")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret")
    return inside


def read(root, path):
    with RootedFiles(root) as files, files.open_file(path) as (file, size):
        return os.read(file, size)


def test_file_is_read(root):
    assert read(root, b"directory/file") == b"mine"


def test_entry_names_are_stored_only_once(root):
    for number in range(2000):
        (root / "directory" / f"{number:0240}").touch()
    with RootedFiles(root) as files:
        tracemalloc.start()
        try:
            entries = files.entries(b"directory")
            traced_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert traced_bytes < 1.75 * sum(len(entry.path) for entry in entries)


def test_entries_are_sorted_by_name(root):
    for name in ("b", "a.b", "a", "a-b", "\u00e4"):
        (root / "directory" / name).mkdir()
    with RootedFiles(root) as files:
        entries = files.entries(b"directory")
    assert [entry.name for entry in entries] == [b"a", b"a-b", b"a.b", b"b", b"file", "\u00e4".encode()]
    assert {entry.path.rpartition(b"/")[0] for entry in entries} == {b"directory"}


def test_link_in_place_of_a_file_is_not_followed(root):
    (root / "directory" / "file").unlink()
    (root / "directory" / "file").symlink_to(root.parent / "outside" / "file")
    with pytest.raises(OSError, match="symbolic links"):
        read(root, b"directory/file")


def test_link_in_place_of_a_directory_is_not_followed(root):
    (root / "directory" / "file").unlink()
    (root / "directory").rmdir()
    (root / "directory").symlink_to(root.parent / "outside")
    with pytest.raises(OSError, match="Not a directory"):
        read(root, b"directory/file")
    with RootedFiles(root) as files, pytest.raises(OSError, match="Not a directory"):
        files.entries(b"directory")


def test_pipe_in_place_of_a_file_is_refused_without_blocking(root):
    (root / "directory" / "file").unlink()
    os.mkfifo(root / "directory" / "file")
    waited = []

    def release_reader():
        """Unblock a waiting reader, so that the test fails instead of hanging."""
        waited.append(True)
        os.close(os.open(root / "directory" / "file", os.O_RDWR | os.O_NONBLOCK))

    helper = threading.Timer(5, release_reader)
    helper.start()
    try:
        with pytest.raises(OSError, match="not a regular file"):
            read(root, b"directory/file")
        assert waited == []
    finally:
        helper.cancel()
        helper.join()


def test_file_is_not_created_through_a_link(root):
    (root / "new").symlink_to(root.parent / "outside" / "file")
    with pytest.raises(OSError, match="symbolic links"):
        create_private_file(root / "new")
    assert (root.parent / "outside" / "file").read_text() == "secret"
    with closing(create_private_file(root / "directory" / "file")) as file:
        file.write(b"new")
    assert read(root, b"directory/file") == b"new"
