"""Which of the server's secrets its tasks may have, by what the operator configured."""

import asyncio
import re
from contextlib import contextmanager

import pytest

from doubles.fake_access import FakeAccess
from sandbox.bootstrap.machine import read_memory_available_bytes
from sandbox.bootstrap.secrets import ServerSecretResolver
from sandbox.bootstrap.settings.schema import SecretsSection, VaultSection
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.model.manifest.schema import Secret

ENVIRONMENT = {"MINE": "my-value", "NAMED": "named-value", "ANTHROPIC_API_KEY": "sk", "SANDBOX_X": "x"}


def resolve(secrets, *asked):
    return asyncio.run(secrets.resolve([Secret(name="S", source=source, key=key) for source, key in asked]))


@contextmanager
def refused(what):
    """What is done inside fails, and operators are told this."""
    with pytest.raises(SecretUnavailableError) as caught:
        yield
    assert re.search(what, caught.value.detail)


def test_a_single_user_may_use_every_variable_but_the_servers_own():
    secrets = ServerSecretResolver(SecretsSection(), ENVIRONMENT, FakeAccess())
    assert resolve(secrets, ("env", "MINE")) == {"S": "my-value"}
    for own in ("ANTHROPIC_API_KEY", "SANDBOX_X"):
        with refused("own variables"):
            resolve(secrets, ("env", own))


def test_with_tokens_only_named_variables_are_given_away_from_then_on():
    access = FakeAccess()
    secrets = ServerSecretResolver(SecretsSection(environment=("NAMED", "ANTHROPIC_API_KEY")), ENVIRONMENT, access)
    assert resolve(secrets, ("env", "MINE")) == {"S": "my-value"}
    access.has_tokens = True
    assert resolve(secrets, ("env", "NAMED")) == {"S": "named-value"}
    for refused in ("MINE", "ANTHROPIC_API_KEY"):
        with pytest.raises(SecretUnavailableError):
            resolve(secrets, ("env", refused))


def test_files_and_vault_are_there_where_they_are_configured(tmp_path):
    (tmp_path / "token").write_text("file-value\n")
    secrets = ServerSecretResolver(SecretsSection(directory=tmp_path), {}, FakeAccess())
    assert resolve(secrets, ("file", "token")) == {"S": "file-value"}
    with refused("no access to Vault"):
        resolve(secrets, ("vault", "a#b"))
    without_token = SecretsSection(vault=VaultSection(address="http://127.0.0.1:1/"))
    with refused("no access to Vault"):
        resolve(ServerSecretResolver(without_token, {}, FakeAccess()), ("vault", "a#b"))
    with refused(r"Vault at http://127\.0\.0\.1:1 is not reachable"):
        resolve(ServerSecretResolver(without_token, {"VAULT_TOKEN": "t"}, FakeAccess()), ("vault", "a#b"))
    with refused("no secrets directory"):
        resolve(ServerSecretResolver(SecretsSection(), {}, FakeAccess()), ("file", "token"))


def test_vault_is_reached_as_its_own_command_line_would(monkeypatch):
    made = []
    monkeypatch.setattr("sandbox.bootstrap.secrets.VaultSource", made.append)
    section = SecretsSection(vault=VaultSection(address="https://vault.example/", mount="kv"))
    ServerSecretResolver(section, {"VAULT_TOKEN": "t", "VAULT_NAMESPACE": "n", "VAULT_CACERT": "/ca.pem"}, FakeAccess())
    ServerSecretResolver(section, {"VAULT_TOKEN": "t"}, FakeAccess())
    full, plain = made
    assert (full.address, full.token, full.mount) == ("https://vault.example", "t", "kv")
    assert (full.namespace, full.ca_file) == ("n", "/ca.pem")
    assert (plain.namespace, plain.ca_file) == (None, None)


def test_this_machine_tells_its_memory():
    assert 2**20 < read_memory_available_bytes() < 2**50
