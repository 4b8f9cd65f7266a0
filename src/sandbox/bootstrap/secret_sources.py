"""The sources of secrets: tasks' secrets, the server's key for the model API, and the cluster's host key."""

import binascii
import errno
import os
import shlex
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sandbox.bootstrap.settings.load import ConfigurationError
from sandbox.bootstrap.settings.schema import SecretsSection
from sandbox.gateway.model_api.upstream import parse_upstream
from sandbox.interfaces.agent import Agent
from sandbox.interfaces.auth import TokenStore
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.secrets import SecretSource
from sandbox.model.errors import SandboxError
from sandbox.model.manifest.schema import Secret
from sandbox.secrets.hashicorp_vault import VaultSettings, VaultSource
from sandbox.secrets.sources import EnvironmentSource, FileSource, SecretResolver

_SERVER_PREFIXES = ("SANDBOX_", "VAULT_TOKEN")


class ServerSecretResolver:
    """Resolves secrets from the configured sources.

    Once access tokens exist, only the environment variables that the configuration lists are accessible.

    agents: the agents whose variables for the model API are never accessible.
    """

    def __init__(
        self,
        settings: SecretsSection,
        environment: Mapping[str, str],
        token_store: TokenStore,
        agents: Iterable[Agent],
    ) -> None:
        self._settings = settings
        self._private_prefixes = (*_SERVER_PREFIXES, *(agent.server_variable_prefix for agent in agents))
        self._environment = environment
        self._token_store = token_store
        self._sources: dict[str, SecretSource] = {}
        if settings.directory is not None:
            self._sources["file"] = FileSource(settings.directory)
        vault = _vault_settings(settings, environment)
        if vault is not None:
            self._sources["vault"] = VaultSource(vault)

    async def resolve(self, secrets: Sequence[Secret]) -> Mapping[str, str]:
        """Return the values, keyed by name. Raises SecretUnavailableError."""
        allowed = self._settings.environment if self._token_store.has_tokens else None
        variables = EnvironmentSource(self._environment, allowed, self._private_prefixes)
        return await SecretResolver({**self._sources, "env": variables}).resolve(secrets)


def _vault_settings(settings: SecretsSection, environment: Mapping[str, str]) -> VaultSettings | None:
    """Return the Vault settings from the configuration and the environment variables of Vault's own CLI."""
    address, token = settings.vault.address, environment.get("VAULT_TOKEN")
    if address is None or not token:
        return None
    return VaultSettings(
        address=address.removesuffix("/"),
        token=token,
        mount=settings.vault.mount,
        namespace=environment.get("VAULT_NAMESPACE"),
        ca_file=environment.get("VAULT_CACERT"),
    )


def upstream_from_environment(agent: Agent, environment: Mapping[str, str]) -> ModelUpstream | None:
    """Return the base URL and the key of the agent's model API; None if there is no key.

    Raises ConfigurationError if the gateway cannot use them.
    """
    upstream = agent.upstream_from_environment(environment)
    if upstream is None:
        return None
    try:
        parse_upstream(upstream, agent.create_dialect())
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    return upstream


class ClusterKeyError(SandboxError):
    """The settings name no file with the cluster's host key, or it is unreadable, damaged or open to other users."""

    code = "host_key_unusable"


CLUSTER_KEY_BYTES = 32
_CLUSTER_KEY_FILE_BYTES_MAX = 4096
_UNREADABLE_REMEDY = "create or copy it, and make the user of this process its owner."


def read_cluster_key(path: Path | None) -> bytes:
    """Return the cluster's host key. path: None if the settings name no file.

    Raises ClusterKeyError.
    """
    if path is None:
        raise ClusterKeyError("cluster.host_key_file is not set.")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            content = os.read(descriptor, _CLUSTER_KEY_FILE_BYTES_MAX)
        finally:
            os.close(descriptor)
    except OSError as error:
        message = f"The cluster's host key, {path}, cannot be read: {error.strerror}"
        raise ClusterKeyError(f"{message}; {_UNREADABLE_REMEDY}") from error
    if status.st_uid not in {0, os.geteuid()}:
        message = f"{path} contains the cluster's host key, so root or the user of this process must own it"
        raise ClusterKeyError(f"{message}; fix it with: chown {os.geteuid()} {shlex.quote(str(path))}")
    if status.st_mode & 0o077:
        message = f"{path} contains the cluster's host key, but other users have access to it"
        raise ClusterKeyError(f"{message}; fix it with: chmod 600 {shlex.quote(str(path))}")
    try:
        key = binascii.a2b_base64(content.strip(), strict_mode=True)
    except binascii.Error:
        key = b""
    if len(key) != CLUSTER_KEY_BYTES:
        raise ClusterKeyError(
            f"{path} does not contain {CLUSTER_KEY_BYTES} bytes in base64; copy the complete key file again."
        )
    return key
