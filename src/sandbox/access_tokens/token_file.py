"""The token file of a server. Every change replaces the whole file, and a running server reads the new file."""

import base64
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from sandbox.interfaces.auth import Principal, Role
from sandbox.model.display_text import is_printable
from sandbox.model.errors import DECODE_ERRORS, SandboxError

_ID_BYTES = 5
_SECRET_BYTES = 32
_TOKEN_FORMAT = re.compile(r"sbx_(?P<id>[a-z2-7]{8})_(?P<secret>[0-9a-f]{64})")


class StoredToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stored token.

    sha256: digest of the secret, in hex. A fast hash is sufficient, because the secret has 256 random bits and cannot
    be guessed.
    """

    id: str
    role: Role
    name: str
    created_at: datetime
    sha256: str
    expires_at: datetime | None = None

    @property
    def principal(self) -> Principal:
        """The principal that the token authenticates."""
        return Principal(self.id, self.name, self.role)

    def is_valid(self, now: datetime) -> bool:
        """Return whether the token is still valid at `now`."""
        return self.expires_at is None or now < self.expires_at


def generate_token(role: Role, name: str, now: datetime, expires_at: datetime | None) -> tuple[str, StoredToken]:
    """Generate a token. Returns its text and its record."""
    token_id = base64.b32encode(secrets.token_bytes(_ID_BYTES)).decode().lower()
    secret = secrets.token_hex(_SECRET_BYTES)
    return f"sbx_{token_id}_{secret}", StoredToken(token_id, role, name, now, _digest(secret), expires_at)


def parse_token_id(token: str) -> str | None:
    """Return the id of a token, or None if the text is not a token."""
    match = _TOKEN_FORMAT.fullmatch(token)
    return match["id"] if match else None


def verify_token(token: str, record: StoredToken) -> bool:
    """Return whether the token matches the record. The comparison takes constant time."""
    match = _TOKEN_FORMAT.fullmatch(token)
    return match is not None and hmac.compare_digest(_digest(match["secret"]), record.sha256)


def _digest(secret: str) -> str:
    return hashlib.sha256(bytes.fromhex(secret)).hexdigest()


NAME_CHARACTERS_MAX = 64
"""Maximum length of a token's name; a longer one is rejected."""

LOCK_TIMEOUT_SECONDS = 5.0
"""How long a change waits for a concurrent change to finish before it fails."""

_LOCK_POLL_SECONDS = 0.02
_log = logging.getLogger(__name__)


class TokenFileError(SandboxError):
    """The token file is damaged."""

    code = "tokens_unreadable"


class TokenNotFoundError(SandboxError):
    """No token has this id."""

    code = "token_not_found"


class InvalidTokenNameError(SandboxError):
    """The name is not allowed for a token."""

    code = "invalid_token_name"


class _TokenDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tokens: tuple[StoredToken, ...] = ()
    version: int = 1


FileStamp = tuple[int, int, int]
"""Identifies a version of a file by its inode, modification time in nanoseconds and size."""


class TokenFile:
    """Implements `interfaces.auth.TokenStore`. Also creates and revokes tokens.

    Once a token has been created, the server never returns to open access on its own. The file remains when the last
    token is revoked. While the file is unreadable, every request is rejected.
    """

    def __init__(self, data_dir: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path = data_dir / "tokens.json"
        self._now = now
        self._stamp: FileStamp | None = None
        self._records: dict[str, StoredToken] = {}

    @property
    def has_tokens(self) -> bool:
        """See `TokenStore.has_tokens`."""
        try:
            return self._read_stamp() is not None
        except OSError:
            return True

    def authenticate(self, token: str | None) -> Principal | None:
        """See `TokenStore.authenticate`."""
        token_id = parse_token_id(token) if token is not None else None
        record = self._find_valid(token_id) if token_id is not None else None
        return record.principal if record is not None and token is not None and verify_token(token, record) else None

    def find_principal(self, principal_id: str) -> Principal | None:
        """See `TokenStore.find_principal`."""
        record = self._find_valid(principal_id)
        return record.principal if record is not None else None

    def create(self, role: Role, name: str = "", expires_at: datetime | None = None) -> tuple[str, StoredToken]:
        """Create a token. It is durable on return, and only its hash is stored.

        Raises OSError, TokenFileError, InvalidTokenNameError.
        """
        if len(name) > NAME_CHARACTERS_MAX or not is_printable(name):
            raise InvalidTokenNameError(
                f"A token's name must have at most {NAME_CHARACTERS_MAX} characters, all printable."
            )
        token, record = generate_token(role, name, self._now(), expires_at)
        with self._change_lock():
            self._write((*self.list(), record))
        return token, record

    def list(self) -> Sequence[StoredToken]:
        """Return all tokens, including expired ones, oldest first. Raises OSError, TokenFileError."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return ()
        try:
            return msgspec.json.decode(content, type=_TokenDocument).tokens
        except DECODE_ERRORS as error:
            advice = "restore it, or remove it and create new tokens"
            raise TokenFileError(f"{self.path} is damaged ({error}); {advice}.") from None

    def list_valid(self) -> Sequence[StoredToken]:
        """Return the tokens that have not expired. Raises the same errors as `list`."""
        now = self._now()
        return [record for record in self.list() if record.is_valid(now)]

    def revoke(self, token_id: str) -> StoredToken:
        """Revoke a token and end the sessions opened with it.

        Raises TokenNotFoundError, and the same errors as `list`.
        """
        with self._change_lock():
            records = self.list()
            found = next((record for record in records if record.id == token_id), None)
            if found is None:
                raise TokenNotFoundError(f"There is no token {token_id!r}; see: sandbox token list")
            self._write(tuple(record for record in records if record is not found))
        return found

    def _find_valid(self, token_id: str) -> StoredToken | None:
        try:
            self._refresh()
        except OSError as error:
            _log.error("All requests are denied: %s", error)
            return None
        record = self._records.get(token_id)
        return record if record is not None and record.is_valid(self._now()) else None

    def _refresh(self) -> None:
        """Read the file again if it has changed."""
        stamp = self._read_stamp()
        if stamp == self._stamp:
            return
        self._records = {}
        try:
            self._records = {record.id: record for record in self.list()}
        except TokenFileError as error:
            _log.error("All requests are denied: %s", error)
        # The stamp was read before the content. If the file is replaced in between, the next stamp differs and the file
        # is read again.
        self._stamp = stamp

    def _read_stamp(self) -> FileStamp | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    @contextmanager
    def _change_lock(self) -> Iterator[None]:
        """Hold the lock that serializes changes by several processes.

        This lock is separate from the data directory's lock.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(self.path.with_suffix(".lock"), flags, 0o600)
        try:
            _lock(lock)
            yield
            self._fsync_directory()
        finally:
            os.close(lock)

    def _fsync_directory(self) -> None:
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _write(self, records: Sequence[StoredToken]) -> None:
        new = self.path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(new, flags, 0o600), "wb") as opened:
            opened.write(msgspec.json.format(msgspec.json.encode(_TokenDocument(tuple(records)))) + b"\n")
            opened.flush()
            os.fsync(opened.fileno())
        new.replace(self.path)


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError("Another process is changing the tokens; try again.") from None
            time.sleep(_LOCK_POLL_SECONDS)
        else:
            return
