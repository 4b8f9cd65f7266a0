"""Reads secrets from version 2 of HashiCorp Vault's key-value engine."""

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sandbox.model.manifest.schema import Secret
from sandbox.primitives.concurrency import run_in_daemon_thread
from sandbox.secrets.limits import CONCURRENT_VAULT_REQUESTS_MAX, VAULT_TIMEOUT_SECONDS
from sandbox.secrets.sources import unavailable_error

_STATUS_MESSAGES = {
    "Forbidden": "Vault denies the server access (403); give the server's token read access to this path.",
    "Unauthorized": "Vault rejects the server's token (401); set a valid one.",
    "InvalidPath": "Vault has no secret at this path (404) in the engine mounted at {mount}; check path and mount.",
    "RateLimitExceeded": "Vault's rate limit is exceeded (429); submit the task again later.",
    "VaultDown": "Vault is sealed or down (503); unseal it and submit the task again.",
    "VaultNotInitialized": "Vault is not initialized (501); initialize it and submit the task again.",
}


@dataclass(frozen=True, kw_only=True)
class VaultSettings:
    """The server's access to Vault.

    mount: path at which the key-value engine is mounted. ca_file: file with the certificates of the authority that
    signed Vault's certificate; None for the default authorities.
    """

    address: str
    token: str = field(repr=False)
    mount: str = "secret"
    namespace: str | None = None
    ca_file: str | None = None
    timeout_seconds: int = VAULT_TIMEOUT_SECONDS


class VaultSource:
    """Reads fields from Vault. A secret's `key` is `path#field`; the path does not include the mount."""

    def __init__(self, settings: VaultSettings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(CONCURRENT_VAULT_REQUESTS_MAX)

    async def resolve(self, secret: Secret) -> str:
        """Return the field of the latest version. Raises SecretUnavailableError."""
        path, _, name = secret.key.rpartition("#")
        # Dots could lead to other parts of Vault's API.
        if not path or not name or not {"", ".", ".."}.isdisjoint(path.split("/")):
            raise unavailable_error(secret, "the key must be path#field, without . or .. components in the path.")
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                await self._slots.acquire()
                value = await run_in_daemon_thread(partial(self._read_field, secret, path, name), self._slots.release)
        except TimeoutError:
            raise unavailable_error(secret, f"Vault at {self._settings.address} did not respond in time.") from None
        if value is None:
            raise unavailable_error(secret, f"the secret at this path has no field {name}.")
        if not isinstance(value, str):
            raise unavailable_error(secret, "the field's value is not a string; store it as a string.")
        return value

    def _read_field(self, secret: Secret, path: str, name: str) -> Any:
        """Read a field of a Vault secret.

        hvac is imported here, because it is slow to import and only needed if users have secrets in Vault.
        """
        import hvac
        import requests
        from hvac.exceptions import VaultError

        settings = self._settings
        try:
            # A redirect would send the token to its target.
            client = hvac.Client(
                url=settings.address,
                token=settings.token,
                namespace=settings.namespace,
                verify=settings.ca_file or True,
                timeout=settings.timeout_seconds,
                allow_redirects=False,
            )
            response = client.secrets.kv.v2.read_secret_version(
                path=path, mount_point=settings.mount, raise_on_deleted_version=True
            )
            return response["data"]["data"].get(name)
        except VaultError as error:
            reason = _STATUS_MESSAGES.get(type(error).__name__, "Vault responded with an error; check Vault's log.")
            raise unavailable_error(secret, reason.format(mount=settings.mount)) from None
        except requests.exceptions.SSLError:
            raise unavailable_error(
                secret,
                (
                    f"the certificate of Vault at {settings.address} is not trusted; set VAULT_CACERT in the server's "
                    "environment to the certificate file of Vault's certificate authority."
                ),
            ) from None
        except requests.exceptions.Timeout:
            raise unavailable_error(secret, f"Vault at {settings.address} did not respond in time.") from None
        except requests.exceptions.RequestException:
            raise unavailable_error(
                secret, f"Vault at {settings.address} is not reachable; check its address and whether it is running."
            ) from None
        except (AttributeError, KeyError, TypeError):
            raise unavailable_error(
                secret,
                f"{settings.address} does not serve a version 2 key-value engine; check the address.",
            ) from None
