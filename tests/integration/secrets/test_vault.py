"""Secrets from Vault: what the server is allowed to read arrives, everything else is told plainly."""

import asyncio
import socket
import ssl
import subprocess
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from doubles.fake_vault import TOKEN, KeyValueVault, serving
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.model.manifest.schema import Secret
from sandbox.secrets.limits import VAULT_REQUESTS_MAX
from sandbox.secrets.vault import VaultSettings, VaultSource

VALUE = "s3cr3t-value-of-the-database"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "VAULT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def vault() -> Iterator[KeyValueVault]:
    with serving(KeyValueVault()) as vault:
        vault.secrets["team/app"] = {"password": VALUE, "port": 5432, "#odd": "x"}
        yield vault


def ask(vault: KeyValueVault, key: str, **settings: Any) -> str:
    given = {"address": vault.address, "token": TOKEN, "mount": vault.mount, "timeout_seconds": 5, **settings}
    return asyncio.run(VaultSource(VaultSettings(**given)).resolve(Secret(name="DB", source="vault", key=key)))


def refusal(vault: KeyValueVault, key: str = "team/app#password", **settings: Any) -> str:
    with pytest.raises(SecretUnavailableError) as caught:
        ask(vault, key, **settings)
    assert caught.value.code == "secret_unavailable"
    assert caught.value.detail.startswith(f"Secret DB (source vault, key {key}): ")
    told = caught.value.message + caught.value.detail
    assert VALUE not in told
    assert TOKEN not in told
    assert "ault" not in caught.value.message
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    return caught.value.detail


def test_a_field_of_a_secret_arrives(vault: KeyValueVault):
    assert ask(vault, "team/app#password") == VALUE
    assert vault.asked == [("/v1/secret/data/team/app", None)]


def test_a_vault_that_hangs_is_never_asked_more_at_once_than_the_bound(monkeypatch: pytest.MonkeyPatch):
    asked, may_answer = [], threading.Event()

    def hang(*_: Any) -> str:
        asked.append(threading.current_thread())
        may_answer.wait(20)
        return VALUE

    monkeypatch.setattr(VaultSource, "_read_field", hang)
    secret = Secret(name="DB", source="vault", key="team/app#password")

    async def story() -> None:
        source = VaultSource(VaultSettings(address="http://127.0.0.1:1", token=TOKEN, timeout_seconds=1))
        for _ in range(2):
            many = [source.resolve(secret) for _ in range(VAULT_REQUESTS_MAX + 1)]
            told = await asyncio.gather(*many, return_exceptions=True)
            assert {type(one) for one in told} == {SecretUnavailableError}
            assert len(asked) == VAULT_REQUESTS_MAX
        may_answer.set()
        assert await source.resolve(secret) == VALUE

    asyncio.run(story())


def test_the_mount_and_the_namespace_are_the_servers(vault: KeyValueVault):
    vault.mount = "kv/prod"
    assert ask(vault, "team/app#password", namespace="team-a") == VALUE
    assert vault.asked == [("/v1/kv/prod/data/team/app", "team-a")]


def test_what_the_policy_does_not_allow(vault: KeyValueVault):
    vault.denied.add("team/app")
    assert "refuses to show it to the server (403)" in refusal(vault)


def test_what_is_not_there(vault: KeyValueVault):
    assert "nothing at this path (404) in the engine mounted at secret" in refusal(vault, "team/other#password")
    assert "has no field user" in refusal(vault, "team/app#user")
    assert "not a text" in refusal(vault, "team/app#port")


@pytest.mark.parametrize(
    "key",
    [
        "team/app",
        "#password",
        "team/app#",
        "../sys/mounts#type",
        "team/../../x#y",
        "team//app#x",
        "/team/app#x",
        "./a#b",
    ],
)
def test_keys_that_lead_elsewhere_are_not_asked_for(vault: KeyValueVault, key: str):
    assert "path#field" in refusal(vault, key)
    assert vault.asked == []


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (503, "sealed or down"),
        (500, "answers with an error"),
        (429, "asked too often"),
        (401, "does not take"),
        (501, "not initialised"),
    ],
)
def test_vaults_own_troubles_are_named(vault: KeyValueVault, status: int, told: str):
    vault.status = status
    assert told in refusal(vault)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": {"keys": []}}', b'{"data": null}', b"", b'"text"'])
def test_something_else_answers_there(vault: KeyValueVault, body: bytes):
    vault.body = body
    assert "no key-value engine of version 2" in refusal(vault)


def test_the_token_does_not_follow_a_redirection(vault: KeyValueVault):
    with serving(KeyValueVault()) as thief:
        thief.secrets["team/app"] = {"password": "from the thief"}
        vault.status, vault.location = 307, f"{thief.address}/v1/secret/data/team/app"
        assert "no key-value engine" in refusal(vault)
        assert thief.asked == []


def test_nobody_answers(vault: KeyValueVault):
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        assert "is not reached" in refusal(vault, address=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert "is not reached" in refusal(vault, address="no address")


def test_an_answer_that_takes_too_long(vault: KeyValueVault):
    vault.delay_seconds = 1.5
    assert "did not answer in time" in refusal(vault, timeout_seconds=1)


def test_a_certificate_is_trusted_only_when_configured(tmp_path: Path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=vault", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with serving(KeyValueVault(), tls) as vault:
        vault.secrets["team/app"] = {"password": VALUE}
        assert "is not trusted" in refusal(vault)
        assert ask(vault, "team/app#password", ca_file=str(certificate)) == VALUE


def test_settings_do_not_show_the_token(vault: KeyValueVault):
    settings = VaultSettings(address=vault.address, token=TOKEN)
    assert TOKEN not in repr(settings)
    assert TOKEN not in repr(replace(settings, mount="kv"))
