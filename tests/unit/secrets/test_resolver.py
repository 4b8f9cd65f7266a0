"""A task's secrets: all of them, at once, or one message that tells everything that is wrong."""

import asyncio

import pytest

from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.model.manifest.schema import Secret
from sandbox.secrets.resolver import SecretResolver
from sandbox.secrets.sources import EnvironmentSource, unavailable_error

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
    return asyncio.run(SecretResolver({"env": EnvironmentSource(VARIABLES, allowed)}).resolve(secrets))


def refusal(*secrets: Secret, allowed: set[str] | None = None) -> str:
    with pytest.raises(SecretUnavailableError) as caught:
        resolve(*secrets, allowed=allowed)
    told = caught.value.message + caught.value.detail
    assert not any(value in told for value in VARIABLES.values() if len(value) > 3)
    return caught.value.detail


def test_the_single_user_has_all_variables_of_the_server():
    assert resolve(secret("TOKEN", "GITHUB_TOKEN"), secret("DATABASE")) == {
        "TOKEN": "ghp_the-value",
        "DATABASE": "db-value",
    }
    assert resolve() == {}


def test_with_tokens_only_what_is_listed_is_given_away():
    assert resolve(secret("DATABASE"), allowed={"DATABASE"}) == {"DATABASE": "db-value"}
    told = refusal(secret("GITHUB_TOKEN"), allowed={"DATABASE"})
    assert told == (
        "Secret GITHUB_TOKEN (source env, key GITHUB_TOKEN): this variable is not among those that the server's "
        "configuration gives away; ask its operator."
    )


def test_an_unlisted_variable_does_not_tell_whether_it_is_set():
    def told(key: str) -> str:
        return refusal(secret("X", key), allowed=set()).replace(key, "KEY")

    assert told("GITHUB_TOKEN") == told("NOT_THERE")


@pytest.mark.parametrize("key", ["SANDBOX_TOKEN", "ANTHROPIC_API_KEY", "anthropic_api_key"])
def test_the_servers_own_variables_stay_its_own(key: str):
    for allowed in (None, {key}):
        assert "own variables are not given away" in refusal(secret("X", key), allowed=allowed)


@pytest.mark.parametrize(
    ("key", "told"),
    [("MISSING", "is not set"), ("EMPTY", "is empty"), ("RAW", "no UTF-8 text"), ("LARGE", "larger than 64 KiB")],
)
def test_values_that_cannot_be_used(key: str, told: str):
    assert told in refusal(secret("X", key))


def test_sources_that_this_server_does_not_offer():
    told = refusal(secret("A", "a", "file"), secret("B", "b#c", "vault"))
    assert "no secrets directory; its operator sets secrets.directory (SANDBOX_SECRETS_DIRECTORY)" in told
    assert "no access to Vault; its operator sets secrets.vault.address (SANDBOX_SECRETS_VAULT_ADDRESS) and" in told


def test_all_failures_are_told_at_once():
    told = refusal(secret("FIRST"), secret("DATABASE"), secret("SECOND"))
    assert "Secret FIRST" in told
    assert "Secret SECOND" in told
    assert "DATABASE" not in told


class Meeting:
    """Answers when everybody has arrived."""

    def __init__(self, guests: int) -> None:
        self._barrier = asyncio.Barrier(guests)

    async def resolve(self, secret: Secret) -> str:
        async with asyncio.timeout(5):
            await self._barrier.wait()
        return "value of " + secret.name


def test_slow_sources_are_asked_at_the_same_time():
    async def story() -> dict[str, str]:
        return await SecretResolver({"vault": Meeting(3)}).resolve([secret(name, "k#f", "vault") for name in "ABC"])

    assert asyncio.run(story()) == {name: f"value of {name}" for name in "ABC"}


class Answering:
    def __init__(self, answer: str | Exception) -> None:
        self._answer = answer

    async def resolve(self, secret: Secret) -> str:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def test_what_no_environment_variable_can_hold():
    with pytest.raises(SecretUnavailableError) as caught:
        asyncio.run(SecretResolver({"vault": Answering("a\0b")}).resolve([secret("A", "k#f", "vault")]))
    assert "NUL" in caught.value.detail


def test_all_values_together_have_a_bound():
    source = SecretResolver({"vault": Answering("x" * 65536)})
    assert len(asyncio.run(source.resolve([secret(f"S{i}", "k#f", "vault") for i in range(4)]))) == 4
    with pytest.raises(SecretUnavailableError, match="larger than 256 KiB together"):
        asyncio.run(source.resolve([secret(f"S{i}", "k#f", "vault") for i in range(5)]))


def test_a_mistake_of_ours_is_not_called_a_missing_secret():
    with pytest.raises(ZeroDivisionError):
        asyncio.run(SecretResolver({"vault": Answering(ZeroDivisionError())}).resolve([secret("A", "k#f", "vault")]))


def test_the_sentence_names_the_secret():
    error = unavailable_error(secret("TOKEN", "a/b#c", "vault"), "it rained.")
    assert (error.code, error.detail) == ("secret_unavailable", "Secret TOKEN (source vault, key a/b#c): it rained.")


def test_everybody_is_told_names_and_operators_the_rest():
    with pytest.raises(SecretUnavailableError) as caught:
        resolve(secret("FIRST", "key-1"), secret("DATABASE"), secret("SECOND", "key-2", "file"))
    message, detail = caught.value.message, caught.value.detail
    assert "FIRST, SECOND" in message
    for private in ("key-1", "key-2", "env", "file", "source", "not set", "secrets directory"):
        assert private not in message
    for told in ("source env, key key-1", "source file, key key-2", "not set", "secrets directory"):
        assert told in detail
