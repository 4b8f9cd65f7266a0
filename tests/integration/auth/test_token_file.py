"""Tokens in a file: private, durable, changed by the command line while a server reads them."""

import fcntl
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from sandbox.auth.token_file import InvalidTokenNameError, TokenFile, TokenFileError, TokenNotFoundError
from sandbox.bootstrap.data_dir_lock import lock_data_dir
from sandbox.interfaces.auth import Role


@pytest.fixture
def tokens(tmp_path):
    return TokenFile(tmp_path)


def test_without_a_file_there_are_no_tokens_and_nobody_is_known(tokens):
    assert not tokens.has_tokens
    assert tokens.list() == ()
    assert tokens.authenticate("sbx_aaaaaaaa_" + "0" * 64) is None
    assert tokens.authenticate(None) is None


def test_a_token_lets_its_holder_in(tokens):
    token, record = tokens.create(Role.VIEWER, "dashboard")
    assert tokens.has_tokens
    holder = tokens.authenticate(token)
    assert (holder.id, holder.name, holder.role) == (record.id, "dashboard", Role.VIEWER)
    assert tokens.find_principal(record.id) == holder
    assert tokens.authenticate(token[:-1] + ("0" if token[-1] != "0" else "1")) is None


def test_the_file_is_private_and_holds_no_secret(tokens):
    token, _ = tokens.create(Role.OPERATOR)
    assert stat.S_IMODE(tokens.path.stat().st_mode) == 0o600
    assert token.rpartition("_")[2] not in tokens.path.read_text()
    assert sorted(path.name for path in tokens.path.parent.iterdir()) == ["tokens.json", "tokens.lock"]


def test_a_running_server_notices_new_and_revoked_tokens(tokens, tmp_path):
    server = TokenFile(tmp_path)
    first, first_record = tokens.create(Role.OPERATOR)
    assert server.authenticate(first)
    second, _ = tokens.create(Role.VIEWER)
    assert server.authenticate(second).role is Role.VIEWER
    tokens.revoke(first_record.id)
    assert server.authenticate(first) is None
    assert server.find_principal(first_record.id) is None
    assert server.authenticate(second)


def test_an_expired_token_lets_nobody_in_and_still_counts_as_one(tmp_path):
    now = [datetime(2026, 1, 29, tzinfo=UTC)]
    tokens = TokenFile(tmp_path, now=lambda: now[0])
    token, record = tokens.create(Role.OPERATOR, expires_at=now[0] + timedelta(hours=1))
    assert tokens.authenticate(token)
    assert tokens.list_valid()
    now[0] += timedelta(hours=2)
    assert tokens.authenticate(token) is None
    assert tokens.find_principal(record.id) is None
    assert tokens.list_valid() == []
    assert tokens.has_tokens


def test_revoking_the_last_token_does_not_open_the_door(tokens):
    token, record = tokens.create(Role.OPERATOR)
    tokens.revoke(record.id)
    assert tokens.has_tokens
    assert tokens.authenticate(token) is None
    tokens.path.unlink()
    assert not tokens.has_tokens


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}x",
        b'{"tokens": [{"id": 1}]}',
        b'{"tokens": [], "more": 1}',
        b"\xff",
        b'{"tokens": [{"id": "\xff"}]}',
        b'{"\xff": 1}',
    ],
)
def test_a_damaged_file_lets_nobody_in_and_is_never_overwritten(tokens, caplog, content):
    token, record = tokens.create(Role.OPERATOR)
    tokens.path.write_bytes(content)
    assert tokens.has_tokens
    assert tokens.authenticate(token) is None
    for change in (lambda: tokens.create(Role.OPERATOR), lambda: tokens.revoke(record.id), tokens.list_valid):
        with pytest.raises(TokenFileError, match="is damaged"):
            change()
    assert tokens.path.read_bytes() == content
    assert tokens.authenticate(token) is None
    assert caplog.text.count("Nobody is let in") == 1


def test_what_is_not_there_cannot_be_revoked(tokens):
    with pytest.raises(TokenNotFoundError, match="aaaaaaaa"):
        tokens.revoke("aaaaaaaa")


@pytest.mark.parametrize("name", ["x" * 65, "two\nlines", "\x1b[31m"])
def test_a_name_that_cannot_be_shown_is_refused(tokens, name):
    with pytest.raises(InvalidTokenNameError):
        tokens.create(Role.VIEWER, name)
    assert not tokens.has_tokens


def test_tokens_made_at_the_same_time_are_all_kept(tmp_path):
    program = (
        "import sys; from pathlib import Path; from sandbox.auth.token_file import TokenFile;"
        "from sandbox.interfaces.auth import Role;"
        "[TokenFile(Path(sys.argv[1])).create(Role.VIEWER, sys.argv[2]) for _ in range(5)]"
    )
    makers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(number)]) for number in range(3)]
    assert [maker.wait(60) for maker in makers] == [0, 0, 0]
    names = [record.name for record in TokenFile(tmp_path).list()]
    assert sorted(names) == sorted("012" * 5)


def test_tokens_are_made_and_revoked_while_a_server_works_on_the_directory(tokens, tmp_path):
    with lock_data_dir(tmp_path):
        _, record = tokens.create(Role.VIEWER, "wall")
        tokens.revoke(record.id)
    assert tokens.list() == ()


def test_a_change_that_waits_too_long_for_another_says_so(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.auth.token_file.LOCK_SECONDS", 0.05)
    tokens.create(Role.VIEWER, "wall")
    with (tmp_path / "tokens.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="try again"):
            tokens.create(Role.VIEWER, "late")
