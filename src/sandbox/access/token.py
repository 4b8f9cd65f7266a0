"""A token: what its holder keeps, and what the server keeps of it."""

import base64
import hashlib
import hmac
import re
import secrets
from datetime import datetime

import msgspec

from sandbox.contracts.access import Principal, Role

_ID_BYTES = 5
_SECRET_BYTES = 32
_FORM = re.compile(r"sbx_(?P<id>[a-z2-7]{8})_(?P<secret>[0-9a-f]{64})")


class TokenRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token as it is stored.

    sha256: of the secret, in hex. A fast hash is right here: the secret is 256 random bits, so nobody guesses it.
    """

    id: str
    role: Role
    name: str
    created_at: datetime
    sha256: str
    expires_at: datetime | None = None

    @property
    def principal(self) -> Principal:
        """Its holder."""
        return Principal(self.id, self.name, self.role)

    def is_good(self, now: datetime) -> bool:
        """Whether it has not expired."""
        return self.expires_at is None or now < self.expires_at


def make_token(role: Role, name: str, now: datetime, expires_at: datetime | None) -> tuple[str, TokenRecord]:
    """A new token, and the record of it."""
    identity = base64.b32encode(secrets.token_bytes(_ID_BYTES)).decode().lower()
    secret = secrets.token_hex(_SECRET_BYTES)
    return f"sbx_{identity}_{secret}", TokenRecord(identity, role, name, now, _digest(secret), expires_at)


def id_of(token: str) -> str | None:
    """The id in a token; None for what is no token at all."""
    match = _FORM.fullmatch(token)
    return match["id"] if match else None


def matches(token: str, record: TokenRecord) -> bool:
    """Whether the record is this token's. Takes the same time for every secret."""
    match = _FORM.fullmatch(token)
    return match is not None and hmac.compare_digest(_digest(match["secret"]), record.sha256)


def _digest(secret: str) -> str:
    return hashlib.sha256(bytes.fromhex(secret)).hexdigest()
