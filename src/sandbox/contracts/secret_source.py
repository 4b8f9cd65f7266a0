"""Where the values of a manifest's secrets come from."""

from typing import Protocol

from sandbox.model.errors import SandboxError
from sandbox.model.manifest import Secret


class SecretUnavailableError(SandboxError):
    """A value cannot be had. The message is for everybody, `detail` for operators: source, key, what to do.

    Neither has a value in it.
    """

    code = "secret_unavailable"

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail or message


class SecretSource(Protocol):
    """One place that holds secrets. Lives in the server's process only."""

    async def resolve(self, secret: Secret) -> str:
        """The value: text without NUL. Raises SecretUnavailableError."""
        ...
