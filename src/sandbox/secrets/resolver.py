"""Resolves the secrets of a task from their sources, and validates the values."""

import asyncio
from collections.abc import Mapping, Sequence

from sandbox.interfaces.secrets import SecretSource, SecretUnavailableError
from sandbox.model.failure import missing_secrets_message
from sandbox.model.manifest.schema import Secret
from sandbox.secrets.errors import unavailable_error
from sandbox.secrets.limits import SECRET_VALUE_BYTES_MAX, TASK_SECRETS_BYTES_MAX

_SOURCE_REMEDIES = {
    "file": "this server has no secrets directory; its operator sets secrets.directory (SANDBOX_SECRETS_DIRECTORY).",
    "vault": "this server has no access to Vault; its operator sets secrets.vault.address "
    "(SANDBOX_SECRETS_VAULT_ADDRESS) and VAULT_TOKEN.",
}


class SecretResolver:
    """Resolves secrets from their sources. sources: the sources, keyed by the names that manifests use."""

    def __init__(self, sources: Mapping[str, SecretSource]) -> None:
        self._sources = sources

    async def resolve(self, secrets: Sequence[Secret]) -> dict[str, str]:
        """Resolve the secrets concurrently and return the values, keyed by name.

        Raises a single SecretUnavailableError that lists all failures.
        """
        results = await asyncio.gather(*map(self._resolve, secrets), return_exceptions=True)
        values: dict[str, str] = {}
        missing: dict[str, str] = {}
        for secret, result in zip(secrets, results, strict=True):
            if isinstance(result, str):
                values[secret.name] = result
            elif isinstance(result, SecretUnavailableError):
                missing[secret.name] = result.detail
            else:
                raise result
        if missing:
            raise SecretUnavailableError(missing_secrets_message(missing), " ".join(missing.values()))
        if sum(len(value.encode()) for value in values.values()) > TASK_SECRETS_BYTES_MAX:
            raise SecretUnavailableError(
                f"The secrets of the task are larger than {TASK_SECRETS_BYTES_MAX // 1024} KiB in total; use fewer."
            )
        return values

    async def _resolve(self, secret: Secret) -> str:
        source = self._sources.get(secret.source)
        if source is None:
            raise unavailable_error(
                secret, _SOURCE_REMEDIES.get(secret.source, "this server does not offer the source.")
            )
        return _validated(secret, await source.resolve(secret))


def _validated(secret: Secret, value: str) -> str:
    """Return the value if it can be an environment variable and be redacted; if not, raise SecretUnavailableError."""
    if not value:
        raise unavailable_error(secret, "the value is empty; set one.")
    if "\0" in value:
        raise unavailable_error(
            secret, "the value contains a NUL, which is not allowed in environment variables; remove it."
        )
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise unavailable_error(secret, "the value is not UTF-8 text; encode it, for example in base64.")
    if len(value.encode()) > SECRET_VALUE_BYTES_MAX:
        raise unavailable_error(secret, f"the value is larger than {SECRET_VALUE_BYTES_MAX // 1024} KiB; shorten it.")
    return value
