"""Secrets from the server's own environment."""

from collections.abc import Collection, Mapping

from sandbox.model.manifest import Secret
from sandbox.secrets.unavailable import unavailable

OWN_PREFIXES = ("SANDBOX_", "ANTHROPIC_", "VAULT_TOKEN")
"""The server's own variables. They never enter a sandbox, whatever the configuration says."""


class EnvironmentSource:
    """`key` is the name of a variable. `allowed`: the names that may be given away; None means all but the server's."""

    def __init__(self, variables: Mapping[str, str], allowed: Collection[str] | None) -> None:
        self._variables = variables
        self._allowed = allowed

    async def resolve(self, secret: Secret) -> str:
        """The variable's value. Raises SecretUnavailableError."""
        if secret.key.upper().startswith(OWN_PREFIXES):
            raise unavailable(secret, "the server's own variables are not given away; choose another one.")
        if self._allowed is not None and secret.key not in self._allowed:
            raise unavailable(
                secret, "this variable is not among those that the server's configuration gives away; ask its operator."
            )
        value = self._variables.get(secret.key)
        if value is None:
            raise unavailable(
                secret, "this variable is not set where the server runs; set it and start the server again."
            )
        return value
