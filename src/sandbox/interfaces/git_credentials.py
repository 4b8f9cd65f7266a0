"""Credentials for clones: a runner on a host of a cluster asks its worker for them, and the worker asks the server."""

from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec

from sandbox.interfaces.file_layout import AttemptId

CREDENTIAL_REQUESTS_MAX = 8
"""Maximum number of requests per clone. Additional requests get no credentials."""

CREDENTIAL_BYTES_MAX = 16 * 1024
"""Maximum size of a user name, and of a password."""

CREDENTIAL_MESSAGE_BYTES_MAX = 3 * CREDENTIAL_BYTES_MAX
"""Maximum size of a message between a runner and its worker."""

CREDENTIAL_ANSWER_SECONDS = 120.0
"""How long a runner waits for an answer. A server may be restarted in this time."""


class NoCredentialsError(Exception):
    """There are no credentials. The message says why. is_transient: a later attempt may get them."""

    def __init__(self, reason: str, *, is_transient: bool = False) -> None:
        super().__init__(reason)
        self.is_transient = is_transient


class CredentialQuery(msgspec.Struct, frozen=True):
    """The protocol, and the host with the port, for which git needs credentials."""

    protocol: str
    host: str


class Credentials(msgspec.Struct, frozen=True):
    """A user name and a password, in the encoding of git's user."""

    username: Annotated[bytes, msgspec.Meta(max_length=CREDENTIAL_BYTES_MAX)]
    password: Annotated[bytes, msgspec.Meta(max_length=CREDENTIAL_BYTES_MAX)]

    def __repr__(self) -> str:
        """Omit the user name and the password."""
        return f"{type(self).__name__}()"


FindCredentials = Callable[[CredentialQuery], Awaitable[Credentials]]
"""Finds the credentials for a host. Raises NoCredentialsError."""


class CredentialRequest(msgspec.Struct, frozen=True, tag="credential_request"):
    """An attempt needs credentials for its clone. number: repeated in the `CredentialAnswer`."""

    number: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    attempt_id: AttemptId
    protocol: Annotated[str, msgspec.Meta(pattern=r"\Ahttps?\Z")]
    host: Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x20\x7f-\x9f]{1,300}\Z")]


class CredentialAnswer(msgspec.Struct, frozen=True, tag="credential_answer"):
    """The credentials, or the reason why there are none; see `NoCredentialsError`."""

    number: int
    credentials: Credentials | None = None
    reason: str = ""
    is_transient: bool = False
