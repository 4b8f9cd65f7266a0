"""Files are backed up before git writes to them, and can be restored."""

import signal

import pytest

from sandbox.cli.checkout.patch_application import backed_up


@pytest.fixture
def root(tmp_path):
    """A checkout with a git directory."""
    (tmp_path / "root" / ".git").mkdir(parents=True)
    return tmp_path / "root"


def change_and_restore(root, paths, change):
    """Back up the paths, call `change` and restore them. Return the files that `restore` moved aside."""
    with backed_up(root, root / ".git", paths) as backup:
        change()
        assert backup.restore() == []
        backup.discard()
    assert not backup.copies.exists()
    return sorted(str(file.relative_to(backup.replaced)) for file in backup.replaced.rglob("*") if not file.is_dir())


def test_file_replaced_by_directory_is_restored(root):
    (root / "a").write_text("mine")

    def change():
        (root / "a").unlink()
        (root / "a").mkdir()
        (root / "a" / "b").write_text("new")

    assert change_and_restore(root, ["a", "a/b"], change) == ["a/b"]
    assert (root / "a").read_text() == "mine"


def test_directory_replaced_by_file_is_restored(root):
    (root / "a").mkdir()
    (root / "a" / "b").write_text("mine")

    def change():
        (root / "a" / "b").unlink()
        (root / "a").rmdir()
        (root / "a").write_text("new")

    assert change_and_restore(root, ["a", "a/b"], change) == ["a"]
    assert (root / "a" / "b").read_text() == "mine"


def test_symlink_is_restored_and_its_target_is_unchanged(root):
    (root / "target").write_text("named")
    (root / "link").symlink_to("target")

    def change():
        (root / "link").unlink()
        (root / "link").write_text("new")

    assert change_and_restore(root, ["link"], change) == ["link"]
    assert ((root / "link").readlink().name, (root / "target").read_text()) == ("target", "named")


def test_unchanged_file_is_not_touched(root):
    (root / "a").write_text("mine")
    before = (root / "a").stat()
    assert change_and_restore(root, ["a", "b"], lambda: None) == []
    assert (root / "a").stat() == before


def test_new_directory_with_another_file_is_not_removed(root):
    (root / "a").write_text("mine")

    def change():
        (root / "a").unlink()
        (root / "new").mkdir()
        (root / "new" / "other").write_text("theirs")

    assert change_and_restore(root, ["a", "new/b"], change) == []
    assert ((root / "a").read_text(), (root / "new" / "other").read_text()) == ("mine", "theirs")


@pytest.mark.parametrize("path", ["../outside", "through/outside", ".git/config"])
def test_paths_outside_the_checkout_are_not_removed(root, path):
    (root / "through").symlink_to(root.parent)
    with backed_up(root, root / ".git", [path]) as backup:
        (root / path).write_text("theirs")
        assert backup.restore() == []
        assert not backup.replaced.exists()
    assert (root / path).read_text() == "theirs"


def test_file_that_cannot_be_restored_is_reported_and_the_rest_is_restored(root):
    for name in ("a", "b"):
        (root / name).write_text(f"mine {name}")
    with backed_up(root, root / ".git", ["a", "b"]) as backup:
        for name in ("a", "b"):
            (root / name).unlink()
        (root / "a" / "full").mkdir(parents=True)
        assert backup.restore() == ["a"]
    assert ((backup.copies / "a").read_text(), (root / "b").read_text()) == ("mine a", "mine b")


def test_symlink_replaced_by_directory_is_restored(root, tmp_path):
    (root / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("outside")

    def change():
        (root / "link").unlink()
        (root / "link").mkdir()
        (root / "link" / "file").write_text("new")

    assert change_and_restore(root, ["link", "link/file"], change) == ["link/file"]
    assert ((root / "link").readlink(), (tmp_path / "file").read_text()) == (tmp_path, "outside")


def test_concurrently_written_files_are_moved_aside(root):
    (root / "a").write_text("mine")

    def change():
        (root / "a").unlink()
        (root / "a").write_text("saved by an editor")
        (root / "b").write_text("new")

    with backed_up(root, root / ".git", ["a", "b"]) as backup:
        change()
        assert backup.restore() == []
        backup.discard()
    assert ((root / "a").read_text(), (root / "b").exists()) == ("mine", False)
    assert [(backup.replaced / name).read_text() for name in ("a", "b")] == ["saved by an editor", "new"]


@pytest.fixture
def interruptible():
    """Handle SIGINT as in a terminal, because a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_signal_is_delivered_after_the_backup_block(root):
    done = []

    def interrupt_and_continue():
        signal.raise_signal(signal.SIGINT)
        done.append("all")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(KeyboardInterrupt):
        change_and_restore(root, [], interrupt_and_continue)
    assert done == ["all"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
