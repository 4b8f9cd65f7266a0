"""The token file: private, durable, and modified by the CLI while a server reads it."""

import fcntl
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from sandbox.access_tokens.token_file import InvalidTokenNameError, TokenFile, TokenFileError, TokenNotFoundError
from sandbox.bootstrap.private_directories import lock_data_dir
from sandbox.interfaces.auth import Role


@pytest.fixture
def tokens(tmp_path):
    return TokenFile(tmp_path)


def test_without_a_file_no_tokens_exist_and_all_tokens_are_rejected(tokens):
    assert not tokens.has_tokens
    assert tokens.list() == ()
    assert tokens.authenticate("sbx_aaaaaaaa_" + "0" * 64) is None
    assert tokens.authenticate(None) is None


def test_valid_token_authenticates_its_principal(tokens):
    token, record = tokens.create(Role.VIEWER, "dashboard")
    assert tokens.has_tokens
    principal = tokens.authenticate(token)
    assert (principal.id, principal.name, principal.role) == (record.id, "dashboard", Role.VIEWER)
    assert tokens.find_principal(record.id) == principal
    assert tokens.authenticate(token[:-1] + ("0" if token[-1] != "0" else "1")) is None


def test_file_is_private_and_contains_no_secret(tokens):
    token, _ = tokens.create(Role.OPERATOR)
    assert stat.S_IMODE(tokens.path.stat().st_mode) == 0o600
    assert token.rpartition("_")[2] not in tokens.path.read_text()
    assert sorted(path.name for path in tokens.path.parent.iterdir()) == ["tokens.json", "tokens.lock"]


def test_running_server_reloads_created_and_revoked_tokens(tokens, tmp_path):
    server = TokenFile(tmp_path)
    first, first_record = tokens.create(Role.OPERATOR)
    assert server.authenticate(first)
    second, _ = tokens.create(Role.VIEWER)
    assert server.authenticate(second).role is Role.VIEWER
    tokens.revoke(first_record.id)
    assert server.authenticate(first) is None
    assert server.find_principal(first_record.id) is None
    assert server.authenticate(second)


def test_expired_token_is_rejected_but_still_listed(tmp_path):
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


def test_revoking_the_last_token_keeps_authentication_required(tokens):
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
def test_damaged_file_is_not_overwritten_and_all_tokens_are_rejected(tokens, caplog, content):
    token, record = tokens.create(Role.OPERATOR)
    tokens.path.write_bytes(content)
    assert tokens.has_tokens
    assert tokens.authenticate(token) is None
    for change in (lambda: tokens.create(Role.OPERATOR), lambda: tokens.revoke(record.id), tokens.list_valid):
        with pytest.raises(TokenFileError, match="is damaged"):
            change()
    assert tokens.path.read_bytes() == content
    assert tokens.authenticate(token) is None
    assert caplog.text.count("All requests are denied") == 1


def test_revoking_an_unknown_token_raises_not_found(tokens):
    with pytest.raises(TokenNotFoundError, match="aaaaaaaa"):
        tokens.revoke("aaaaaaaa")


@pytest.mark.parametrize("name", ["x" * 65, "two\nlines", "\x1b[31m"])
def test_unprintable_or_long_name_is_rejected(tokens, name):
    with pytest.raises(InvalidTokenNameError):
        tokens.create(Role.VIEWER, name)
    assert not tokens.has_tokens


def test_concurrently_created_tokens_are_all_stored(tmp_path):
    program = (
        "import sys; from pathlib import Path; from sandbox.access_tokens.token_file import TokenFile;"
        "from sandbox.interfaces.auth import Role;"
        "[TokenFile(Path(sys.argv[1])).create(Role.VIEWER, sys.argv[2]) for _ in range(5)]"
    )
    creators = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(number)]) for number in range(3)]
    assert [creator.wait(60) for creator in creators] == [0, 0, 0]
    names = [record.name for record in TokenFile(tmp_path).list()]
    assert sorted(names) == sorted("012" * 5)


def test_tokens_can_be_changed_while_a_server_holds_the_directory_lock(tokens, tmp_path):
    with lock_data_dir(tmp_path):
        _, record = tokens.create(Role.VIEWER, "wall")
        tokens.revoke(record.id)
    assert tokens.list() == ()


def test_lock_timeout_raises_timeout_error(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.access_tokens.token_file.LOCK_TIMEOUT_SECONDS", 0.05)
    tokens.create(Role.VIEWER, "wall")
    with (tmp_path / "tokens.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="try again"):
            tokens.create(Role.VIEWER, "late")
