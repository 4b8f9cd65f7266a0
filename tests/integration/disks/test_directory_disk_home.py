"""The home directory of new disks and of disks from earlier versions."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from doubles.syscall_faults import fill_file_system, small_file_system
from sandbox.disks.directory_disk import create_home
from sandbox.interfaces.task_file_layout import AttemptLayout


@pytest.fixture
def layout(tmp_path: Path) -> AttemptLayout:
    layout = AttemptLayout(tmp_path)
    layout.disk.mkdir()
    return layout


def make_earlier_disk(layout: AttemptLayout) -> None:
    """Create the directories as earlier versions did, with the agent's files."""
    for name in ("workspace", "home", "tmp"):
        (layout.disk / name).mkdir(mode=0o700)
    (layout.disk / "home" / "session").write_text("kept")
    (layout.disk / "home" / "agent").mkdir()  # the name of the new home directory


def assert_moved(layout: AttemptLayout) -> None:
    assert sorted(os.listdir(layout.home)) == ["agent", "session"]  # noqa: PTH208
    assert (layout.home / "session").read_text() == "kept"
    assert os.listdir(layout.home.parent) == ["agent"]  # noqa: PTH208


def test_new_disk_has_a_private_home_in_a_directory_that_everybody_can_enter(layout: AttemptLayout):
    umask = os.umask(0o077)
    try:
        create_home(layout)
    finally:
        os.umask(umask)
    (layout.home / "file").touch()
    create_home(layout)
    assert os.listdir(layout.home) == ["file"]  # noqa: PTH208
    assert [path.stat().st_mode & 0o777 for path in (layout.home.parent, layout.home)] == [0o755, 0o700]


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o000])
def test_home_of_an_earlier_version_is_moved_once(layout: AttemptLayout, mode: int):
    make_earlier_disk(layout)
    (layout.disk / "home").chmod(mode)
    create_home(layout)
    create_home(layout)
    assert_moved(layout)


@pytest.mark.parametrize("call_count", range(1, 8))
def test_interrupted_move_is_completed(layout: AttemptLayout, monkeypatch: pytest.MonkeyPatch, call_count: int):
    """In each run of the test, another call that changes the disk fails."""
    make_earlier_disk(layout)
    calls = []

    def failing(name):
        original = getattr(Path, name)

        def call(path, *arguments, **options):
            calls.append(name)
            if len(calls) == call_count:
                raise InterruptedError
            return original(path, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "chmod", "rename"):
            patch.setattr(Path, name, failing(name))
        with pytest.raises(InterruptedError):
            create_home(layout)
    create_home(layout)
    assert_moved(layout)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("tmp")])
def test_entry_of_an_image_is_not_mistaken_for_an_interrupted_move(
    layout: AttemptLayout, make: Callable[[Path], object]
):
    """The root directory of a disk contains a mount point or a link for each entry of an image's root directory."""
    create_home(layout)
    (layout.home / "session").write_text("kept")
    make(layout.disk / "home.new")
    create_home(layout)
    assert (layout.home / "session").read_text() == "kept"


def test_link_in_an_earlier_home_is_not_followed(layout: AttemptLayout, tmp_path: Path):
    (layout.disk / "home").mkdir(parents=True)
    (layout.disk / "home" / "agent").symlink_to(tmp_path)
    create_home(layout)
    assert not layout.home.is_symlink()
    assert (layout.home / "agent").is_symlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a disk")
def test_home_on_a_full_disk_is_moved(tmp_path: Path):
    layout = AttemptLayout(tmp_path)
    with small_file_system(layout.disk, 8 << 20):
        make_earlier_disk(layout)
        fill_file_system(layout.disk / "workspace")
        create_home(layout)
        assert_moved(layout)
