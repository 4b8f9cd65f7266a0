"""The configuration decides which of the server's secrets tasks may use."""

import asyncio
import re
from contextlib import contextmanager

import pytest

from doubles.fake_token_store import FakeTokenStore
from sandbox.agents import registered_agents
from sandbox.bootstrap.secret_sources import ServerSecretResolver
from sandbox.bootstrap.settings.schema import SecretsSection, VaultSection
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.model.manifest.schema import Secret

AGENTS = registered_agents().values()
ENVIRONMENT = {"MINE": "my-value", "NAMED": "named-value", "ANTHROPIC_API_KEY": "sk", "SANDBOX_X": "x"}


def resolve(secrets, *references):
    return asyncio.run(secrets.resolve([Secret(name="S", source=source, key=key) for source, key in references]))


@contextmanager
def raises_unavailable(detail):
    """Expect the block to fail with this detail for operators."""
    with pytest.raises(SecretUnavailableError) as caught:
        yield
    assert re.search(detail, caught.value.detail)


def test_single_user_may_use_all_variables_except_those_of_the_server():
    secrets = ServerSecretResolver(SecretsSection(), ENVIRONMENT, FakeTokenStore(), AGENTS)
    assert resolve(secrets, ("env", "MINE")) == {"S": "my-value"}
    for server_variable in ("ANTHROPIC_API_KEY", "SANDBOX_X"):
        with raises_unavailable("own variables"):
            resolve(secrets, ("env", server_variable))


def test_only_listed_variables_are_available_on_a_server_with_tokens():
    access = FakeTokenStore()
    secrets = ServerSecretResolver(
        SecretsSection(environment=("NAMED", "ANTHROPIC_API_KEY")), ENVIRONMENT, access, AGENTS
    )
    assert resolve(secrets, ("env", "MINE")) == {"S": "my-value"}
    access.has_tokens = True
    assert resolve(secrets, ("env", "NAMED")) == {"S": "named-value"}
    for variable in ("MINE", "ANTHROPIC_API_KEY"):
        with pytest.raises(SecretUnavailableError):
            resolve(secrets, ("env", variable))


def test_files_and_vault_need_configuration(tmp_path):
    (tmp_path / "token").write_text("file-value\n")
    secrets = ServerSecretResolver(SecretsSection(directory=tmp_path), {}, FakeTokenStore(), AGENTS)
    assert resolve(secrets, ("file", "token")) == {"S": "file-value"}
    with raises_unavailable("no access to Vault"):
        resolve(secrets, ("vault", "a#b"))
    without_token = SecretsSection(vault=VaultSection(address="http://127.0.0.1:1/"))
    with raises_unavailable("no access to Vault"):
        resolve(ServerSecretResolver(without_token, {}, FakeTokenStore(), AGENTS), ("vault", "a#b"))
    with raises_unavailable(r"Vault at http://127\.0\.0\.1:1 is not reachable"):
        resolve(ServerSecretResolver(without_token, {"VAULT_TOKEN": "t"}, FakeTokenStore(), AGENTS), ("vault", "a#b"))
    with raises_unavailable("no secrets directory"):
        resolve(ServerSecretResolver(SecretsSection(), {}, FakeTokenStore(), AGENTS), ("file", "token"))


def test_vault_uses_the_variables_of_the_vault_cli(monkeypatch):
    sources = []
    monkeypatch.setattr("sandbox.bootstrap.secret_sources.VaultSource", sources.append)
    section = SecretsSection(vault=VaultSection(address="https://vault.example/", mount="kv"))
    ServerSecretResolver(
        section, {"VAULT_TOKEN": "t", "VAULT_NAMESPACE": "n", "VAULT_CACERT": "/ca.pem"}, FakeTokenStore(), AGENTS
    )
    ServerSecretResolver(section, {"VAULT_TOKEN": "t"}, FakeTokenStore(), AGENTS)
    full, plain = sources
    assert (full.address, full.token, full.mount) == ("https://vault.example", "t", "kv")
    assert (full.namespace, full.ca_file) == ("n", "/ca.pem")
    assert (plain.namespace, plain.ca_file) == (None, None)
