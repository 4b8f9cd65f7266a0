"""Files that are kept while git writes them."""

import signal

import pytest

from sandbox.cli.checkout.file_backup import backed_up


@pytest.fixture
def root(tmp_path):
    """A checkout with a git directory."""
    (tmp_path / "root" / ".git").mkdir(parents=True)
    return tmp_path / "root"


def put_back(root, paths, change):
    """Gives what git had written, which is kept aside."""
    with backed_up(root, root / ".git", paths) as kept:
        change()
        assert kept.restore() == []
        kept.discard()
    assert not kept.copies.exists()
    return sorted(str(file.relative_to(kept.replaced)) for file in kept.replaced.rglob("*") if not file.is_dir())


def test_a_file_that_became_a_directory_is_a_file_again(root):
    (root / "a").write_text("mine")

    def change():
        (root / "a").unlink()
        (root / "a").mkdir()
        (root / "a" / "b").write_text("new")

    assert put_back(root, ["a", "a/b"], change) == ["a/b"]
    assert (root / "a").read_text() == "mine"


def test_a_directory_that_became_a_file_is_a_directory_again(root):
    (root / "a").mkdir()
    (root / "a" / "b").write_text("mine")

    def change():
        (root / "a" / "b").unlink()
        (root / "a").rmdir()
        (root / "a").write_text("new")

    assert put_back(root, ["a", "a/b"], change) == ["a"]
    assert (root / "a" / "b").read_text() == "mine"


def test_a_link_comes_back_as_a_link_and_what_it_names_is_let_alone(root):
    (root / "target").write_text("named")
    (root / "link").symlink_to("target")

    def change():
        (root / "link").unlink()
        (root / "link").write_text("new")

    assert put_back(root, ["link"], change) == ["link"]
    assert ((root / "link").readlink().name, (root / "target").read_text()) == ("target", "named")


def test_what_was_not_changed_is_not_touched(root):
    (root / "a").write_text("mine")
    before = (root / "a").stat()
    assert put_back(root, ["a", "b"], lambda: None) == []
    assert (root / "a").stat() == before


def test_a_new_directory_with_a_file_of_somebody_else_stays(root):
    (root / "a").write_text("mine")

    def change():
        (root / "a").unlink()
        (root / "new").mkdir()
        (root / "new" / "other").write_text("theirs")

    assert put_back(root, ["a", "new/b"], change) == []
    assert ((root / "a").read_text(), (root / "new" / "other").read_text()) == ("mine", "theirs")


@pytest.mark.parametrize("path", ["../outside", "through/outside", ".git/config"])
def test_nothing_is_removed_where_git_would_not_write(root, path):
    (root / "through").symlink_to(root.parent)
    with backed_up(root, root / ".git", [path]) as kept:
        (root / path).write_text("theirs")
        assert kept.restore() == []
        assert not kept.replaced.exists()
    assert (root / path).read_text() == "theirs"


def test_what_cannot_be_put_back_is_named_and_all_else_comes_back(root):
    for name in ("a", "b"):
        (root / name).write_text(f"mine {name}")
    with backed_up(root, root / ".git", ["a", "b"]) as kept:
        for name in ("a", "b"):
            (root / name).unlink()
        (root / "a" / "full").mkdir(parents=True)
        assert kept.restore() == ["a"]
    assert ((kept.copies / "a").read_text(), (root / "b").read_text()) == ("mine a", "mine b")


def test_a_link_that_became_a_directory_is_a_link_again(root, tmp_path):
    (root / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("outside")

    def change():
        (root / "link").unlink()
        (root / "link").mkdir()
        (root / "link" / "file").write_text("new")

    assert put_back(root, ["link", "link/file"], change) == ["link/file"]
    assert ((root / "link").readlink(), (tmp_path / "file").read_text()) == (tmp_path, "outside")


def test_what_was_written_meanwhile_is_moved_aside_and_never_lost(root):
    (root / "a").write_text("mine")

    def change():
        (root / "a").unlink()
        (root / "a").write_text("saved by an editor")
        (root / "b").write_text("new")

    with backed_up(root, root / ".git", ["a", "b"]) as kept:
        change()
        assert kept.restore() == []
        kept.discard()
    assert ((root / "a").read_text(), (root / "b").exists()) == ("mine", False)
    assert [(kept.replaced / name).read_text() for name in ("a", "b")] == ["saved by an editor", "new"]


def test_a_signal_comes_when_all_is_done(root):
    done = []

    def interrupt_and_go_on():
        signal.raise_signal(signal.SIGINT)
        done.append("all")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(KeyboardInterrupt):
        put_back(root, [], interrupt_and_go_on)
    assert done == ["all"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
