"""Roles, principals and tokens."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Role(StrEnum):
    """A viewer may read, except files with secrets, and manifests with sources of secrets. An operator may do all."""

    VIEWER = "viewer"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller. id: the token's id; name: the token's display name."""

    id: str
    name: str
    role: Role


class TokenStore(Protocol):
    """The current tokens of a server. No method raises an error or waits long for a disk."""

    @property
    def has_tokens(self) -> bool:
        """Whether tokens were ever configured, even if all of them are now revoked, expired or unreadable."""
        ...

    def authenticate(self, token: str | None) -> Principal | None:
        """Return the holder of a token; None if the token is missing, unknown, revoked or expired."""
        ...

    def find_principal(self, principal_id: str) -> Principal | None:
        """Return a caller that authenticated earlier; None if the caller's token is no longer valid."""
        ...
