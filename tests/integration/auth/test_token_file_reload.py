"""A change of the tokens is one at a time and on disk before it is told; a server never goes on with an older file."""

import fcntl
import os
import stat
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from sandbox.auth.token_file import LOCK_SECONDS, NAME_CHARACTERS_MAX, InvalidTokenNameError, TokenFile
from sandbox.interfaces.auth import Role

AT = datetime(2026, 1, 29, tzinfo=UTC)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path, now=lambda: AT)


@pytest.fixture
def server(tmp_path: Path) -> TokenFile:
    """The same file, as a running server reads it."""
    return TokenFile(tmp_path, now=lambda: AT)


# What a running server does when the file changes


@pytest.mark.parametrize("content", [b"", b"{", b'{"tokens": [{"id": 1}]}', b"\xff"])
def test_a_file_that_was_damaged_meanwhile_ends_tokens_that_were_known(tokens, server, content, caplog):
    token, record = tokens.create(Role.OPERATOR)
    assert server.authenticate(token)
    whole = tokens.path.read_bytes()
    tokens.path.write_bytes(content)
    assert server.authenticate(token) is None
    assert server.find_principal(record.id) is None
    assert server.has_tokens
    assert caplog.text.count("Nobody is let in") == 1
    tokens.path.write_bytes(whole)
    assert server.authenticate(token), "restored, it is good again"


def test_a_file_that_is_gone_ends_tokens_that_were_known(tokens, server):
    token, _ = tokens.create(Role.OPERATOR)
    assert server.authenticate(token)
    tokens.path.unlink()
    assert server.authenticate(token) is None
    assert not server.has_tokens


def test_a_file_that_cannot_be_looked_at_lets_nobody_in_and_is_not_taken_for_none(tokens, server, caplog):
    token, record = tokens.create(Role.OPERATOR)
    assert server.authenticate(token)
    tokens.path.unlink()
    tokens.path.symlink_to(tokens.path)
    assert server.has_tokens is True
    assert server.authenticate(token) is None
    assert server.find_principal(record.id) is None
    assert "Nobody is let in" in caplog.text


def test_a_file_that_cannot_be_read_lets_nobody_in(tokens, server, monkeypatch):
    token, _ = tokens.create(Role.OPERATOR)
    assert server.authenticate(token)
    tokens.create(Role.VIEWER)

    def broken(_):
        raise OSError("Input/output error")

    with monkeypatch.context() as failing:
        failing.setattr(Path, "read_bytes", broken)
        assert server.authenticate(token) is None
    assert server.authenticate(token), "readable, it is good again"


def stamped(path: Path, content: bytes, nanoseconds: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(nanoseconds, nanoseconds))


def test_another_file_is_noticed_by_its_number_its_time_or_its_size(tokens, server):
    first, _ = tokens.create(Role.OPERATOR, "one")
    of_first = tokens.path.read_bytes()
    tokens.path.unlink()
    second, _ = tokens.create(Role.OPERATOR, "two")
    of_second = tokens.path.read_bytes()
    assert len(of_first) == len(of_second)

    def known() -> tuple[bool, bool]:
        return server.authenticate(first) is not None, server.authenticate(second) is not None

    stamped(tokens.path, of_first, 10**18)
    assert known() == (True, False)
    stamped(tokens.path, of_second, 10**18 + 1)
    assert known() == (False, True), "another time"
    stamped(tokens.path, of_first + b" ", 10**18 + 1)
    assert known() == (True, False), "another size"
    other = tokens.path.with_name("other")
    stamped(other, of_second + b" ", 10**18 + 1)
    other.replace(tokens.path)
    assert known() == (False, True), "another file"


def test_a_file_that_stays_the_same_is_read_once(tokens, server, monkeypatch):
    token, record = tokens.create(Role.OPERATOR)
    read, times = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: times.append(path) or read(path))
    for _ in range(3):
        assert server.authenticate(token)
        assert server.find_principal(record.id)
    assert times == [tokens.path]


# How a change is written


class Disk:
    """Notes each step of a change, with what is on the disk by then, and whether somebody else could make another."""

    def __init__(self, tokens: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[str, str]] = []
        self.contents: list[bytes] = []
        self.is_locked: list[bool] = []
        self._lock = tokens.path.with_suffix(".lock")
        fsync, replace = os.fsync, Path.replace

        def watched_fsync(descriptor: int) -> None:
            place = Path(f"/proc/self/fd/{descriptor}").readlink()
            self.note("fsync", place.name if place != tokens.path.parent else "directory")
            self.contents.append(place.read_bytes() if place.is_file() else b"")
            fsync(descriptor)

        def watched_replace(path: Path, target: Path) -> Path:
            self.note("replace", f"{path.name} -> {Path(target).name}")
            return replace(path, target)

        monkeypatch.setattr(os, "fsync", watched_fsync)
        monkeypatch.setattr(Path, "replace", watched_replace)

    def note(self, step: str, of: str) -> None:
        self.steps.append((step, of))
        self.is_locked.append(self.locked())

    def locked(self) -> bool:
        with self._lock.open() as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def test_a_change_is_flushed_before_it_counts_and_its_name_before_it_is_told(tokens, monkeypatch):
    disk = Disk(tokens, monkeypatch)
    _, record = tokens.create(Role.OPERATOR, "first")
    tokens.revoke(record.id)
    steps = [("fsync", "tokens.new"), ("replace", "tokens.new -> tokens.json"), ("fsync", "directory")]
    assert disk.steps == steps * 2
    assert disk.is_locked == [True] * 6
    assert not disk.locked()
    assert [name.encode() in disk.contents[0] for name in ("first", record.id)] == [True, True]
    assert disk.contents[2] == tokens.path.read_bytes(), "all of it had been written when it was flushed"


def test_the_file_is_json_for_people_with_its_version(tokens):
    _, record = tokens.create(Role.VIEWER, "wall")
    text = tokens.path.read_text()
    assert text.endswith("\n}\n")
    assert msgspec.json.decode(text) == {"tokens": [msgspec.to_builtins(record)], "version": 1}
    assert text.count("\n") > 5
    assert tokens.list() == (record,)


def test_a_change_that_fails_lets_the_next_one_go_on(tokens, monkeypatch):
    kept, record = tokens.create(Role.OPERATOR)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            tokens.create(Role.OPERATOR, "lost")
    assert [one.id for one in tokens.list()] == [record.id]
    assert tokens.authenticate(kept)
    tokens.create(Role.OPERATOR, "x")
    assert [one.name for one in tokens.list()] == ["", "x"]


def test_the_token_that_was_revoked_is_told(tokens):
    _, record = tokens.create(Role.OPERATOR, "gone")
    _, kept = tokens.create(Role.OPERATOR, "kept")
    assert tokens.revoke(record.id) == record
    assert tokens.list() == (kept,)


def test_what_a_change_that_broke_off_left_is_written_over(tokens):
    tokens.path.with_suffix(".new").write_bytes(b"x" * 100_000)
    tokens.create(Role.VIEWER, "wall")
    assert [record.name for record in tokens.list()] == ["wall"]


def test_both_files_are_private_whatever_the_mask_is(tokens):
    before = os.umask(0)
    try:
        tokens.create(Role.OPERATOR)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tokens.path.parent.iterdir()}
    assert modes == {"tokens.json": 0o600, "tokens.lock": 0o600}


@pytest.mark.parametrize("name", ["tokens.new", "tokens.lock"])
def test_no_link_that_stands_there_is_followed(tokens, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"kept")
    (tmp_path / name).symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links"):
        tokens.create(Role.OPERATOR)
    assert elsewhere.read_bytes() == b"kept"
    assert not tokens.has_tokens


def test_no_descriptor_is_left_open(tokens):
    tokens.create(Role.VIEWER)
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(5):
        _, record = tokens.create(Role.VIEWER)
        tokens.revoke(record.id)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


# Waiting for another change


class Clock:
    """Time goes by while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.slept = 1000.0, []
        self.at = {}
        monkeypatch.setattr(time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds
        for moment in list(self.at):
            if self.seconds - 1000.0 >= moment:
                self.at.pop(moment)()


def test_a_change_waits_for_another_one_and_looks_often_without_spinning(tokens, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with (tmp_path / "tokens.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        clock.at[LOCK_SECONDS - 0.1] = lambda: fcntl.flock(other, fcntl.LOCK_UN)
        tokens.create(Role.VIEWER, "late")
    assert set(clock.slept) == {0.02}
    assert LOCK_SECONDS - 0.2 < sum(clock.slept) < LOCK_SECONDS
    assert [record.name for record in tokens.list()] == ["late"]


def test_a_change_that_waits_too_long_is_given_up_and_leaves_nothing(tokens, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with (tmp_path / "tokens.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="try again"):
            tokens.create(Role.VIEWER, "late")
        assert LOCK_SECONDS <= sum(clock.slept) <= LOCK_SECONDS + 0.1
    assert not tokens.has_tokens
    tokens.create(Role.VIEWER)


def test_changes_in_one_process_wait_for_each_other_too(tmp_path):
    makers = [threading.Thread(target=TokenFile(tmp_path).create, args=(Role.VIEWER, str(n))) for n in range(8)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(30)
    assert sorted(record.name for record in TokenFile(tmp_path).list()) == sorted("01234567")


# Names


def test_a_name_at_the_bound_is_one_and_a_longer_one_is_not(tokens):
    _, record = tokens.create(Role.VIEWER, "n" * NAME_CHARACTERS_MAX)
    assert (record.name, record.created_at, record.expires_at) == ("n" * NAME_CHARACTERS_MAX, AT, None)
    for name in ("n" * (NAME_CHARACTERS_MAX + 1), "a\tb", "\u202e"):
        with pytest.raises(InvalidTokenNameError):
            tokens.create(Role.VIEWER, name)
    assert [one.name for one in tokens.list()] == ["n" * NAME_CHARACTERS_MAX]


def test_a_token_without_a_name_has_an_empty_one_and_the_clock_of_the_machine(tmp_path):
    _, record = TokenFile(tmp_path).create(Role.VIEWER)
    assert record.name == ""
    assert abs((datetime.now(UTC) - record.created_at).total_seconds()) < 60
