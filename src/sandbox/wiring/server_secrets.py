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
        token = environment.get("VAULT_TOKEN")
        if settings.vault.address is not None and token:
            address = settings.vault.address.removesuffix("/")
            self._sources["vault"] = VaultSource(
                VaultSettings(address=address, token=token, mount=settings.vault.mount)
            )

    async def resolve(self, secrets: Sequence[Secret]) -> Mapping[str, str]:
        """The values by name. Raises SecretUnavailableError."""
        allowed = self._settings.environment if self._access.has_tokens else None
        variables = EnvironmentSource(self._environment, allowed)
        return await Secrets({**self._sources, "env": variables}).resolve(secrets)
