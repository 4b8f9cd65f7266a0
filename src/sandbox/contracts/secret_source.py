"""Where the values of a manifest's secrets come from."""

from typing import Protocol

from sandbox.model.errors import SandboxError
from sandbox.model.manifest import Secret


class SecretUnavailableError(SandboxError):
    """A value cannot be had. The message names the secret, its source and what to do; never a value."""

    code = "secret_unavailable"


class SecretSource(Protocol):
    """One place that holds secrets. Lives in the server's process only."""

    async def resolve(self, secret: Secret) -> str:
        """The value: text without NUL. Raises SecretUnavailableError."""
        ...
