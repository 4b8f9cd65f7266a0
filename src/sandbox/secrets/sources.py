"""Resolves the secrets of a task, and validates the values. The sources here are files and environment variables."""

import asyncio
import errno
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from sandbox.interfaces.secrets import SecretSource, SecretUnavailableError
from sandbox.model.failure import missing_secrets_message
from sandbox.model.manifest.schema import Secret
from sandbox.secrets.limits import SECRET_VALUE_BYTES_MAX, TASK_SECRETS_BYTES_MAX


def unavailable_error(secret: Secret, reason: str) -> SecretUnavailableError:
    """Build the error for a secret whose value cannot be used.

    reason: the problem and its fix, for operators. It must not contain the value.
    """
    detail = f"Secret {secret.name} (source {secret.source}, key {secret.key}): {reason}"
    return SecretUnavailableError(missing_secrets_message([secret.name]), detail)


_DIRECTORY_TEXT = "the server's secrets directory (secrets.directory, SANDBOX_SECRETS_DIRECTORY)"
_REASONS = {
    errno.ENOENT: "there is no such file under the server's secrets directory; put it there.",
    errno.ENOTDIR: "there is no such file under the server's secrets directory; put it there.",
    errno.EACCES: f"the server's user cannot read this file or enter {_DIRECTORY_TEXT}; grant the permission.",
    errno.ELOOP: "the symbolic links of this file form a loop; fix them.",
}


class FileSource:
    """Reads files. A secret's `key` is a path relative to the directory; a symbolic link must not lead out of it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def resolve(self, secret: Secret) -> str:
        """Return the file's content, minus one trailing newline. Raises SecretUnavailableError."""
        return await asyncio.to_thread(self._read, secret)

    def _read(self, secret: Secret) -> str:
        if secret.key.startswith("/") or not {"", ".", ".."}.isdisjoint(secret.key.split("/")):
            raise unavailable_error(
                secret, "the key must be a path relative to the secrets directory, without . or .. components."
            )
        try:
            content = self._read_content(secret)
        except OSError as error:
            reason = _REASONS.get(error.errno or 0, f"the file cannot be read ({error.strerror}).")
            raise unavailable_error(secret, reason) from None
        try:
            return content.removesuffix(b"\n").decode()
        except UnicodeDecodeError:
            raise unavailable_error(secret, "the file is not UTF-8 text; encode it, for example in base64.") from None

    def _read_content(self, secret: Secret) -> bytes:
        """Check the file type before opening the file for reading: opening a FIFO or a device has side effects."""
        try:
            directory = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            reason = (
                f"{_DIRECTORY_TEXT} cannot be opened ({error.strerror}); the server's user must be able to enter it."
            )
            raise unavailable_error(secret, reason) from None
        try:
            node = os.open(secret.key, os.O_PATH | os.O_CLOEXEC, dir_fd=directory)
            try:
                if not _real_path(node).is_relative_to(_real_path(directory)):
                    raise unavailable_error(
                        secret,
                        "this is a symbolic link to a target outside the secrets directory; replace it with a copy.",
                    )
                if not stat.S_ISREG(os.fstat(node).st_mode):
                    raise unavailable_error(secret, "this is not a regular file; replace it with one.")
                with Path(f"/proc/self/fd/{node}").open("rb") as file:
                    content = file.read(SECRET_VALUE_BYTES_MAX + 2)
            finally:
                os.close(node)
        finally:
            os.close(directory)
        if len(content.removesuffix(b"\n")) > SECRET_VALUE_BYTES_MAX:
            raise unavailable_error(
                secret, f"the file is larger than {SECRET_VALUE_BYTES_MAX // 1024} KiB; shorten it."
            )
        return content


def _real_path(descriptor: int) -> Path:
    """Return the real path of an open file, with all links resolved."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()


class EnvironmentSource:
    """Reads environment variables. A secret's `key` is the variable's name.

    allowed: the names that tasks may use; None means all except the server's own.
    private_prefixes: prefixes of the server's own variables, in upper case. These variables never enter a sandbox, even
    if the configuration allows it.
    """

    def __init__(
        self, variables: Mapping[str, str], allowed: Collection[str] | None, private_prefixes: tuple[str, ...]
    ) -> None:
        self._variables = variables
        self._allowed = allowed
        self._private_prefixes = private_prefixes

    async def resolve(self, secret: Secret) -> str:
        """Return the variable's value. Raises SecretUnavailableError."""
        if secret.key.upper().startswith(self._private_prefixes):
            raise unavailable_error(secret, "the server's own variables are not available; choose another variable.")
        if self._allowed is not None and secret.key not in self._allowed:
            raise unavailable_error(
                secret, "the server's configuration does not allow this variable; ask its operator."
            )
        value = self._variables.get(secret.key)
        if value is None:
            raise unavailable_error(
                secret, "this variable is not set in the server's environment; set it and restart the server."
            )
        return value


_SOURCE_REMEDIES = {
    "file": "this server has no secrets directory; its operator must set secrets.directory "
    "(SANDBOX_SECRETS_DIRECTORY).",
    "vault": "this server has no access to Vault; its operator must set secrets.vault.address "
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
                secret, _SOURCE_REMEDIES.get(secret.source, "this server does not offer this source.")
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
