"""Removed files do not take up disk space."""

import asyncio
import os
from pathlib import Path

from sandbox.disks.commands import remove_trees


def test_space_of_a_file_in_use_becomes_free(tmp_path: Path):
    """A file that a sandbox sent over a socket can keep its disk, and thereby the disk's file, in use forever."""
    image = tmp_path / "-disk.img"
    image.write_bytes(bytes(1024 * 1024))
    with image.open("rb") as used:
        asyncio.run(remove_trees([image]))
        assert not image.exists()
        assert os.fstat(used.fileno()).st_blocks == 0


def test_linked_file_keeps_its_content(tmp_path: Path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("content")
    link.symlink_to(target)
    (tmp_path / "tree" / "nested").mkdir(parents=True)
    asyncio.run(remove_trees([link, tmp_path / "tree", tmp_path / "missing"]))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert target.read_text() == "content"
