"""Secrets from Vault: permitted fields are read, and errors are reported clearly."""

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

from doubles.fake_vault import TOKEN, FakeVault, serving
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.model.manifest.schema import Secret
from sandbox.secrets.hashicorp_vault import VaultSettings, VaultSource
from sandbox.secrets.limits import CONCURRENT_VAULT_REQUESTS_MAX

VALUE = "s3cr3t-value-of-the-database"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "VAULT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def vault() -> Iterator[FakeVault]:
    with serving(FakeVault()) as vault:
        vault.secrets["team/app"] = {"password": VALUE, "port": 5432, "#odd": "x"}
        yield vault


def resolve(vault: FakeVault, key: str, **settings: Any) -> str:
    arguments = {"address": vault.address, "token": TOKEN, "mount": vault.mount, "timeout_seconds": 5, **settings}
    return asyncio.run(VaultSource(VaultSettings(**arguments)).resolve(Secret(name="DB", source="vault", key=key)))


def resolve_error(vault: FakeVault, key: str = "team/app#password", **settings: Any) -> str:
    with pytest.raises(SecretUnavailableError) as caught:
        resolve(vault, key, **settings)
    assert caught.value.code == "secret_unavailable"
    assert caught.value.detail.startswith(f"Secret DB (source vault, key {key}): ")
    message = caught.value.message + caught.value.detail
    assert VALUE not in message
    assert TOKEN not in message
    assert "ault" not in caught.value.message
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    return caught.value.detail


def test_field_of_a_secret_is_read(vault: FakeVault):
    assert resolve(vault, "team/app#password") == VALUE
    assert vault.requests == [("/v1/secret/data/team/app", None)]


async def test_concurrent_requests_to_a_hanging_vault_are_limited(monkeypatch: pytest.MonkeyPatch):
    threads, may_respond = [], threading.Event()

    def hang(*_: Any) -> str:
        threads.append(threading.current_thread())
        may_respond.wait(20)
        return VALUE

    monkeypatch.setattr(VaultSource, "_read_field", hang)
    secret = Secret(name="DB", source="vault", key="team/app#password")
    source = VaultSource(VaultSettings(address="http://127.0.0.1:1", token=TOKEN, timeout_seconds=1))
    for _ in range(2):
        requests = [source.resolve(secret) for _ in range(CONCURRENT_VAULT_REQUESTS_MAX + 1)]
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(result) for result in results} == {SecretUnavailableError}
        assert len(threads) == CONCURRENT_VAULT_REQUESTS_MAX
    may_respond.set()
    assert await source.resolve(secret) == VALUE


def test_mount_and_namespace_come_from_the_settings(vault: FakeVault):
    vault.mount = "kv/prod"
    assert resolve(vault, "team/app#password", namespace="team-a") == VALUE
    assert vault.requests == [("/v1/kv/prod/data/team/app", "team-a")]


def test_denied_secret_is_reported(vault: FakeVault):
    vault.denied.add("team/app")
    assert "denies the server access (403)" in resolve_error(vault)


def test_missing_path_or_field_is_reported(vault: FakeVault):
    assert "no secret at this path (404) in the engine mounted at secret" in resolve_error(vault, "team/other#password")
    assert "has no field user" in resolve_error(vault, "team/app#user")
    assert "not a string" in resolve_error(vault, "team/app#port")


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
def test_invalid_keys_are_not_requested(vault: FakeVault, key: str):
    assert "path#field" in resolve_error(vault, key)
    assert vault.requests == []


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (503, "sealed or down"),
        (500, "responded with an error"),
        (429, "rate limit is exceeded"),
        (401, "rejects"),
        (501, "not initialized"),
    ],
)
def test_vault_errors_are_reported(vault: FakeVault, status: int, message: str):
    vault.status = status
    assert message in resolve_error(vault)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": {"keys": []}}', b'{"data": null}', b"", b'"text"'])
def test_unexpected_response_is_reported(vault: FakeVault, body: bytes):
    vault.body = body
    assert "does not serve a version 2 key-value engine" in resolve_error(vault)


def test_redirect_is_not_followed(vault: FakeVault):
    with serving(FakeVault()) as redirect_target:
        redirect_target.secrets["team/app"] = {"password": "of the redirect target"}
        vault.status, vault.location = 307, f"{redirect_target.address}/v1/secret/data/team/app"
        assert "does not serve a version 2 key-value engine" in resolve_error(vault)
        assert redirect_target.requests == []


def test_unreachable_vault_is_reported(vault: FakeVault):
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        assert "is not reachable" in resolve_error(vault, address=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert "is not reachable" in resolve_error(vault, address="no address")


def test_slow_response_times_out(vault: FakeVault):
    vault.delay_seconds = 1.5
    assert "did not respond in time" in resolve_error(vault, timeout_seconds=1)


def test_certificate_is_trusted_only_if_configured(tmp_path: Path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=vault", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with serving(FakeVault(), tls) as vault:
        vault.secrets["team/app"] = {"password": VALUE}
        assert "is not trusted" in resolve_error(vault)
        assert resolve(vault, "team/app#password", ca_file=str(certificate)) == VALUE


def test_repr_of_settings_does_not_contain_the_token(vault: FakeVault):
    settings = VaultSettings(address=vault.address, token=TOKEN)
    assert TOKEN not in repr(settings)
    assert TOKEN not in repr(replace(settings, mount="kv"))
