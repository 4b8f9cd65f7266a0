"""A task's secrets are resolved concurrently. The result is all values, or one error that lists every failure."""

import asyncio

import pytest

from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.model.manifest.schema import Secret
from sandbox.secrets.sources import EnvironmentSource, SecretResolver, unavailable_error

VARIABLES = {
    "GITHUB_TOKEN": "ghp_the-value",
    "DATABASE": "db-value",
    "EMPTY": "",
    "SANDBOX_TOKEN": "own",
    "ANTHROPIC_API_KEY": "own",
    "RAW": "\udcff\udcfe bytes that are no text",
    "LARGE": "x" * 65537,
}


def secret(name: str, key: str = "", source: str = "env") -> Secret:
    return Secret(name=name, source=source, key=key or name)  # type: ignore[arg-type]


def resolve(*secrets: Secret, allowed: set[str] | None = None) -> dict[str, str]:
    return asyncio.run(
        SecretResolver({"env": EnvironmentSource(VARIABLES, allowed, ("SANDBOX_", "ANTHROPIC_"))}).resolve(secrets)
    )


def error_detail(*secrets: Secret, allowed: set[str] | None = None) -> str:
    with pytest.raises(SecretUnavailableError) as caught:
        resolve(*secrets, allowed=allowed)
    text = caught.value.message + caught.value.detail
    assert not any(value in text for value in VARIABLES.values() if len(value) > 3)
    return caught.value.detail


def test_all_server_variables_are_available_without_an_allow_list():
    assert resolve(secret("TOKEN", "GITHUB_TOKEN"), secret("DATABASE")) == {
        "TOKEN": "ghp_the-value",
        "DATABASE": "db-value",
    }
    assert resolve() == {}


def test_only_listed_variables_are_available_with_an_allow_list():
    assert resolve(secret("DATABASE"), allowed={"DATABASE"}) == {"DATABASE": "db-value"}
    detail = error_detail(secret("GITHUB_TOKEN"), allowed={"DATABASE"})
    assert detail == (
        "Secret GITHUB_TOKEN (source env, key GITHUB_TOKEN): the server's configuration does not allow this "
        "variable; ask its operator."
    )


def test_error_for_an_unlisted_variable_does_not_reveal_whether_it_is_set():
    def detail(key: str) -> str:
        return error_detail(secret("X", key), allowed=set()).replace(key, "KEY")

    assert detail("GITHUB_TOKEN") == detail("NOT_THERE")


@pytest.mark.parametrize("key", ["SANDBOX_TOKEN", "ANTHROPIC_API_KEY", "anthropic_api_key"])
def test_reserved_server_variables_are_never_available(key: str):
    for allowed in (None, {key}):
        assert "own variables are not available" in error_detail(secret("X", key), allowed=allowed)


@pytest.mark.parametrize(
    ("key", "reason"),
    [("MISSING", "is not set"), ("EMPTY", "is empty"), ("RAW", "not UTF-8 text"), ("LARGE", "larger than 64 KiB")],
)
def test_invalid_value_is_unavailable(key: str, reason: str):
    assert reason in error_detail(secret("X", key))


def test_unconfigured_sources_are_unavailable():
    detail = error_detail(secret("A", "a", "file"), secret("B", "b#c", "vault"))
    assert "no secrets directory; its operator must set secrets.directory (SANDBOX_SECRETS_DIRECTORY)" in detail
    assert "no access to Vault; its operator must set secrets.vault.address (SANDBOX_SECRETS_VAULT_ADDRESS)" in detail


def test_all_failures_are_reported_together():
    detail = error_detail(secret("FIRST"), secret("DATABASE"), secret("SECOND"))
    assert "Secret FIRST" in detail
    assert "Secret SECOND" in detail
    assert "DATABASE" not in detail


class BarrierSource:
    """A source that responds once `request_count` requests are pending."""

    def __init__(self, request_count: int) -> None:
        self._barrier = asyncio.Barrier(request_count)

    async def resolve(self, secret: Secret) -> str:
        async with asyncio.timeout(5):
            await self._barrier.wait()
        return "value of " + secret.name


async def test_sources_are_queried_concurrently():
    async def run() -> dict[str, str]:
        return await SecretResolver({"vault": BarrierSource(3)}).resolve(
            [secret(name, "k#f", "vault") for name in "ABC"]
        )

    assert (await run()) == {name: f"value of {name}" for name in "ABC"}


class ScriptedSource:
    def __init__(self, result: str | Exception) -> None:
        self._result = result

    async def resolve(self, secret: Secret) -> str:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


async def test_value_with_a_nul_character_is_unavailable():
    with pytest.raises(SecretUnavailableError) as caught:
        await SecretResolver({"vault": ScriptedSource("a\0b")}).resolve([secret("A", "k#f", "vault")])
    assert "NUL" in caught.value.detail


def test_total_size_of_values_is_limited():
    source = SecretResolver({"vault": ScriptedSource("x" * 65536)})
    assert len(asyncio.run(source.resolve([secret(f"S{i}", "k#f", "vault") for i in range(4)]))) == 4
    with pytest.raises(SecretUnavailableError, match="larger than 256 KiB in total"):
        asyncio.run(source.resolve([secret(f"S{i}", "k#f", "vault") for i in range(5)]))


async def test_unexpected_exception_is_not_converted():
    with pytest.raises(ZeroDivisionError):
        await SecretResolver({"vault": ScriptedSource(ZeroDivisionError())}).resolve([secret("A", "k#f", "vault")])


def test_error_detail_names_the_secret():
    error = unavailable_error(secret("TOKEN", "a/b#c", "vault"), "it rained.")
    assert (error.code, error.detail) == ("secret_unavailable", "Secret TOKEN (source vault, key a/b#c): it rained.")


def test_error_message_has_secret_names_and_error_detail_has_sources_and_reasons():
    with pytest.raises(SecretUnavailableError) as caught:
        resolve(secret("FIRST", "key-1"), secret("DATABASE"), secret("SECOND", "key-2", "file"))
    message, detail = caught.value.message, caught.value.detail
    assert "FIRST, SECOND" in message
    for private in ("key-1", "key-2", "env", "file", "source", "not set", "secrets directory"):
        assert private not in message
    for text in ("source env, key key-1", "source file, key key-2", "not set", "secrets directory"):
        assert text in detail
