"""Who may ask the server for what."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Role(StrEnum):
    """A viewer reads; an operator also submits, cancels and releases."""

    VIEWER = "viewer"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who proved who they are. id: of the token; name: the token's, for people."""

    id: str
    name: str
    role: Role


class TokenStore(Protocol):
    """The tokens of a server, as they are at this moment. No method raises or waits for a disk for long."""

    @property
    def has_tokens(self) -> bool:
        """Whether tokens were ever configured here, also when all of them are revoked, expired or unreadable."""
        ...

    def authenticate(self, token: str | None) -> Principal | None:
        """Whose token this is; None for none, an unknown, a revoked or an expired one."""
        ...

    def find_principal(self, principal_id: str) -> Principal | None:
        """The holder of a token that is still good, for those who proved themselves before."""
        ...
