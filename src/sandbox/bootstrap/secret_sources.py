"""The sources of the secrets that the server provides to tasks."""

from collections.abc import Iterable, Mapping, Sequence

from sandbox.bootstrap.settings.schema import SecretsSection
from sandbox.interfaces.agent import Agent
from sandbox.interfaces.auth import TokenStore
from sandbox.interfaces.secrets import SecretSource
from sandbox.model.manifest.schema import Secret
from sandbox.secrets.file_and_environment_sources import EnvironmentSource, FileSource
from sandbox.secrets.hashicorp_vault import VaultSettings, VaultSource
from sandbox.secrets.resolver import SecretResolver

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
