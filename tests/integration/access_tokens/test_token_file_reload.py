"""Changes to the token file are serialized and durable; a running server reloads the file."""

import fcntl
import os
import stat
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from sandbox.access_tokens.token_file import LOCK_TIMEOUT_SECONDS, NAME_CHARACTERS_MAX, InvalidTokenNameError, TokenFile
from sandbox.interfaces.auth import Role

TIMESTAMP = datetime(2026, 1, 29, tzinfo=UTC)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path, now=lambda: TIMESTAMP)


@pytest.fixture
def server(tmp_path: Path) -> TokenFile:
    """The same token file as opened by a running server."""
    return TokenFile(tmp_path, now=lambda: TIMESTAMP)


# Reload by a running server


@pytest.mark.parametrize("content", [b"", b"{", b'{"tokens": [{"id": 1}]}', b"\xff"])
def test_all_tokens_are_rejected_after_a_loaded_file_is_damaged(tokens, server, content, caplog):
    token, record = tokens.create(Role.OPERATOR)
    assert server.authenticate(token)
    original = tokens.path.read_bytes()
    tokens.path.write_bytes(content)
    assert server.authenticate(token) is None
    assert server.find_principal(record.id) is None
    assert server.has_tokens
    assert caplog.text.count("All requests are denied") == 1
    tokens.path.write_bytes(original)
    assert server.authenticate(token), "a restored file is valid again"


def test_known_tokens_are_rejected_after_the_file_is_deleted(tokens, server):
    token, _ = tokens.create(Role.OPERATOR)
    assert server.authenticate(token)
    tokens.path.unlink()
    assert server.authenticate(token) is None
    assert not server.has_tokens


def test_tokens_are_required_but_rejected_if_the_file_cannot_be_opened(tokens, server, caplog):
    token, record = tokens.create(Role.OPERATOR)
    assert server.authenticate(token)
    tokens.path.unlink()
    tokens.path.symlink_to(tokens.path)
    assert server.has_tokens is True
    assert server.authenticate(token) is None
    assert server.find_principal(record.id) is None
    assert "All requests are denied" in caplog.text


def test_all_tokens_are_rejected_while_the_file_is_unreadable(tokens, server, monkeypatch):
    token, _ = tokens.create(Role.OPERATOR)
    assert server.authenticate(token)
    tokens.create(Role.VIEWER)

    def raise_io_error(_):
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", raise_io_error)
        assert server.authenticate(token) is None
    assert server.authenticate(token), "a readable file is valid again"


def write_with_mtime(path: Path, content: bytes, nanoseconds: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(nanoseconds, nanoseconds))


def test_changed_file_is_detected_by_inode_mtime_or_size(tokens, server):
    first, _ = tokens.create(Role.OPERATOR, "one")
    first_content = tokens.path.read_bytes()
    tokens.path.unlink()
    second, _ = tokens.create(Role.OPERATOR, "two")
    second_content = tokens.path.read_bytes()
    assert len(first_content) == len(second_content)

    def authenticated() -> tuple[bool, bool]:
        return server.authenticate(first) is not None, server.authenticate(second) is not None

    write_with_mtime(tokens.path, first_content, 10**18)
    assert authenticated() == (True, False)
    write_with_mtime(tokens.path, second_content, 10**18 + 1)
    assert authenticated() == (False, True), "another mtime"
    write_with_mtime(tokens.path, first_content + b" ", 10**18 + 1)
    assert authenticated() == (True, False), "another size"
    other = tokens.path.with_name("other")
    write_with_mtime(other, second_content + b" ", 10**18 + 1)
    other.replace(tokens.path)
    assert authenticated() == (False, True), "another inode"


def test_unchanged_file_is_read_once(tokens, server, monkeypatch):
    token, record = tokens.create(Role.OPERATOR)
    read_bytes, reads = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read_bytes(path))
    for _ in range(3):
        assert server.authenticate(token)
        assert server.find_principal(record.id)
    assert reads == [tokens.path]


# Durable writes


class WriteRecorder:
    """Records each write step, the file contents at that point, and whether the lock is held."""

    def __init__(self, tokens: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[str, str]] = []
        self.contents: list[bytes] = []
        self.is_locked: list[bool] = []
        self._lock = tokens.path.with_suffix(".lock")
        fsync, replace = os.fsync, Path.replace

        def recording_fsync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self.record_step("fsync", path.name if path != tokens.path.parent else "directory")
            self.contents.append(path.read_bytes() if path.is_file() else b"")
            fsync(descriptor)

        def recording_replace(path: Path, target: Path) -> Path:
            self.record_step("replace", f"{path.name} -> {Path(target).name}")
            return replace(path, target)

        monkeypatch.setattr(os, "fsync", recording_fsync)
        monkeypatch.setattr(Path, "replace", recording_replace)

    def record_step(self, step: str, name: str) -> None:
        self.steps.append((step, name))
        self.is_locked.append(self.is_lock_held())

    def is_lock_held(self) -> bool:
        with self._lock.open() as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def test_change_is_flushed_before_and_after_the_rename(tokens, monkeypatch):
    recorder = WriteRecorder(tokens, monkeypatch)
    _, record = tokens.create(Role.OPERATOR, "first")
    tokens.revoke(record.id)
    steps = [("fsync", "tokens.new"), ("replace", "tokens.new -> tokens.json"), ("fsync", "directory")]
    assert recorder.steps == steps * 2
    assert recorder.is_locked == [True] * 6
    assert not recorder.is_lock_held()
    assert [name.encode() in recorder.contents[0] for name in ("first", record.id)] == [True, True]
    assert recorder.contents[2] == tokens.path.read_bytes(), "the content was complete before the flush"


def test_file_is_indented_json_with_a_version(tokens):
    _, record = tokens.create(Role.VIEWER, "wall")
    text = tokens.path.read_text()
    assert text.endswith("\n}\n")
    assert msgspec.json.decode(text) == {"tokens": [msgspec.to_builtins(record)], "version": 1}
    assert text.count("\n") > 5
    assert tokens.list() == (record,)


def test_failed_change_does_not_block_the_next_one(tokens, monkeypatch):
    token, record = tokens.create(Role.OPERATOR)

    def raise_disk_full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raise_disk_full)
        with pytest.raises(OSError, match="No space"):
            tokens.create(Role.OPERATOR, "lost")
    assert [one.id for one in tokens.list()] == [record.id]
    assert tokens.authenticate(token)
    tokens.create(Role.OPERATOR, "x")
    assert [one.name for one in tokens.list()] == ["", "x"]


def test_revoke_returns_the_revoked_token(tokens):
    _, record = tokens.create(Role.OPERATOR, "gone")
    _, remaining = tokens.create(Role.OPERATOR, "kept")
    assert tokens.revoke(record.id) == record
    assert tokens.list() == (remaining,)


def test_leftover_of_an_interrupted_change_is_overwritten(tokens):
    tokens.path.with_suffix(".new").write_bytes(b"x" * 100_000)
    tokens.create(Role.VIEWER, "wall")
    assert [record.name for record in tokens.list()] == ["wall"]


def test_files_are_private_with_any_umask(tokens):
    before = os.umask(0)
    try:
        tokens.create(Role.OPERATOR)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tokens.path.parent.iterdir()}
    assert modes == {"tokens.json": 0o600, "tokens.lock": 0o600}


@pytest.mark.parametrize("name", ["tokens.new", "tokens.lock"])
def test_symbolic_links_are_not_followed(tokens, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"kept")
    (tmp_path / name).symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links"):
        tokens.create(Role.OPERATOR)
    assert elsewhere.read_bytes() == b"kept"
    assert not tokens.has_tokens


def test_lock_file_is_opened_for_writing(tokens, monkeypatch):
    """NFS refuses an exclusive lock on a file that is open only for reading."""
    access_modes, flock = [], fcntl.flock

    def record_access_mode(descriptor: int, operation: int) -> None:
        access_modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", record_access_mode)
    tokens.create(Role.VIEWER)
    assert access_modes == [os.O_RDWR]


def test_changes_leak_no_descriptors(tokens):
    tokens.create(Role.VIEWER)
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(5):
        _, record = tokens.create(Role.VIEWER)
        tokens.revoke(record.id)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


# Waiting for the lock


class FakeClock:
    """A fake clock that only `sleep` advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.slept = 1000.0, []
        self.callbacks = {}
        monkeypatch.setattr(time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds
        for deadline in list(self.callbacks):
            if self.seconds - 1000.0 >= deadline:
                self.callbacks.pop(deadline)()


def test_change_waits_for_the_lock_without_busy_waiting(tokens, tmp_path, monkeypatch):
    clock = FakeClock(monkeypatch)
    with (tmp_path / "tokens.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        clock.callbacks[LOCK_TIMEOUT_SECONDS - 0.1] = lambda: fcntl.flock(other, fcntl.LOCK_UN)
        tokens.create(Role.VIEWER, "late")
    assert set(clock.slept) == {0.02}
    assert LOCK_TIMEOUT_SECONDS - 0.2 < sum(clock.slept) < LOCK_TIMEOUT_SECONDS
    assert [record.name for record in tokens.list()] == ["late"]


def test_lock_timeout_leaves_no_files(tokens, tmp_path, monkeypatch):
    clock = FakeClock(monkeypatch)
    with (tmp_path / "tokens.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="try again"):
            tokens.create(Role.VIEWER, "late")
        assert LOCK_TIMEOUT_SECONDS <= sum(clock.slept) <= LOCK_TIMEOUT_SECONDS + 0.1
    assert not tokens.has_tokens
    tokens.create(Role.VIEWER)


def test_changes_by_threads_of_one_process_are_serialized(tmp_path):
    threads = [threading.Thread(target=TokenFile(tmp_path).create, args=(Role.VIEWER, str(n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(record.name for record in TokenFile(tmp_path).list()) == sorted("01234567")


# Names


def test_name_is_accepted_up_to_the_length_limit(tokens):
    assert NAME_CHARACTERS_MAX == 64
    _, record = tokens.create(Role.VIEWER, "n" * NAME_CHARACTERS_MAX)
    assert (record.name, record.created_at, record.expires_at) == ("n" * NAME_CHARACTERS_MAX, TIMESTAMP, None)
    for name in ("n" * (NAME_CHARACTERS_MAX + 1), "a\tb", "\u202e"):
        with pytest.raises(InvalidTokenNameError):
            tokens.create(Role.VIEWER, name)
    assert [one.name for one in tokens.list()] == ["n" * NAME_CHARACTERS_MAX]


def test_token_has_an_empty_name_and_the_current_time_by_default(tmp_path):
    _, record = TokenFile(tmp_path).create(Role.VIEWER)
    assert record.name == ""
    assert abs((datetime.now(UTC) - record.created_at).total_seconds()) < 60
