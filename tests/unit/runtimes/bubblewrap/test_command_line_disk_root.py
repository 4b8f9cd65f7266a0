"""The mount points and links in the root directory of a disk."""

import os
from pathlib import Path

import pytest

from sandbox.interfaces.runtime import SandboxSpec
from sandbox.runtimes.bubblewrap.command_line import DiskRoot, create_entries, find_disk_root, prepare_disk_root
from sandbox.runtimes.sandbox_filesystem import create_disk_directories

ROOT = DiskRoot(
    tmpfs_mounts=["/etc"],
    image_paths=[],
    directories=["/etc", "/usr", "/home/user"],
    files=["/file"],
    links={"/bin": "usr/bin"},
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    create_disk_directories(tmp_path)
    return tmp_path


def content(disk: Path) -> dict[str, str]:
    """Return the kind of each entry in the root directory and in /home or, for a link, its target."""
    kinds = {}
    for path in (*disk.iterdir(), *(disk / "home").iterdir()):
        kind = os.readlink(path) if path.is_symlink() else "directory" if path.is_dir() else "file"  # noqa: PTH115
        kinds[f"/{path.relative_to(disk)}"] = kind
    return kinds


PREPARED = {
    **dict.fromkeys(("/workspace", "/home", "/home/agent", "/tmp", "/etc", "/usr", "/home/user"), "directory"),
    "/file": "file",
    "/bin": "usr/bin",
}


def test_mount_points_and_links_are_created_once(disk: Path):
    create_entries(disk, ROOT)
    inodes = {path: path.lstat().st_ino for path in disk.iterdir()}
    create_entries(disk, ROOT)
    assert content(disk) == PREPARED
    assert {path: path.lstat().st_ino for path in disk.iterdir()} == inodes


def test_entries_of_an_earlier_sandbox_are_replaced(disk: Path):
    for name in ("bin", "file", "old", "home/old"):
        (disk / name).mkdir()
    (disk / "usr").symlink_to("/")
    (disk / "etc").touch()
    (disk / "dangling").symlink_to("nowhere")
    create_entries(disk, ROOT)
    assert content(disk) == PREPARED


def test_link_with_another_target_is_replaced(disk: Path):
    (disk / "bin").symlink_to("elsewhere")
    create_entries(disk, ROOT)
    assert content(disk) == PREPARED


def test_files_of_the_agent_and_of_a_file_system_check_are_kept(disk: Path):
    for name in ("lost+found", "workspace", "home/agent", "tmp"):
        (disk / name).mkdir(exist_ok=True)
        (disk / name / "kept").touch()
    create_entries(disk, ROOT)
    assert content(disk) == {**PREPARED, "/lost+found": "directory"}
    assert all((disk / name / "kept").exists() for name in ("lost+found", "workspace", "home/agent", "tmp"))


def test_directory_disk_is_not_used_as_root(disk: Path):
    spec = SandboxSpec("attemptattem", disk, 2, 1 << 30, 64)
    before = content(disk)
    prepare_disk_root(spec)
    assert content(disk) == before
    assert find_disk_root(spec) is None
