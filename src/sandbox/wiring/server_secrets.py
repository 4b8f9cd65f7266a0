"""What tasks may have of this server's secrets."""

from collections.abc import Mapping, Sequence

from sandbox.contracts.access import Access
from sandbox.contracts.secret_source import SecretSource
from sandbox.model.manifest import Secret
from sandbox.secrets.environment import EnvironmentSource
from sandbox.secrets.files import FileSource
from sandbox.secrets.resolution import Secrets
from sandbox.secrets.vault import VaultSettings, VaultSource
from sandbox.wiring.settings import SecretsSection


class ServerSecrets:
    """The sources that the operator configured. As soon as there are tokens, only named variables are given away."""

    def __init__(self, settings: SecretsSection, environment: Mapping[str, str], access: Access) -> None:
        self._settings = settings
        self._environment = environment
        self._access = access
        self._sources: dict[str, SecretSource] = {}
        if settings.directory is not None:
            self._sources["file"] = FileSource(settings.directory)
        vault = _vault(settings, environment)
        if vault is not None:
            self._sources["vault"] = VaultSource(vault)

    async def resolve(self, secrets: Sequence[Secret]) -> Mapping[str, str]:
        """The values by name. Raises SecretUnavailableError."""
        allowed = self._settings.environment if self._access.has_tokens else None
        variables = EnvironmentSource(self._environment, allowed)
        return await Secrets({**self._sources, "env": variables}).resolve(secrets)


def _vault(settings: SecretsSection, environment: Mapping[str, str]) -> VaultSettings | None:
    """The address is configured, the rest are the variables that Vault's own command line takes."""
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
