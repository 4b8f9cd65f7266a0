"""The upstream model API comes from the server's environment. Invalid values prevent the server from starting."""

import pytest

from sandbox.agents.claude_code.agent import DEFAULT_BASE_URL, ClaudeCode
from sandbox.bootstrap.secret_sources import upstream_from_environment
from sandbox.bootstrap.settings.load import ConfigurationError
from sandbox.interfaces.gateway import ModelUpstream


def test_upstream_is_read_from_the_environment():
    assert upstream_from_environment(ClaudeCode(), {"ANTHROPIC_API_KEY": "k"}) == ModelUpstream(
        DEFAULT_BASE_URL, api_key="k"
    )
    assert upstream_from_environment(ClaudeCode(), {"ANTHROPIC_AUTH_TOKEN": "t"}) == ModelUpstream(
        DEFAULT_BASE_URL, auth_token="t"
    )
    elsewhere = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:8131", "ANTHROPIC_API_KEY": "k", "ANTHROPIC_AUTH_TOKEN": "t"}
    assert upstream_from_environment(ClaudeCode(), elsewhere) == ModelUpstream("http://127.0.0.1:8131", api_key="k")
    assert upstream_from_environment(ClaudeCode(), {"ANTHROPIC_BASE_URL": "nonsense"}) is None


INVALID_ENVIRONMENTS = [
    ({"ANTHROPIC_BASE_URL": "api.example.com", "ANTHROPIC_API_KEY": "k"}, "ANTHROPIC_BASE_URL must be an http://"),
    (
        {"ANTHROPIC_BASE_URL": "https://x:99999", "ANTHROPIC_API_KEY": "k"},
        "ANTHROPIC_BASE_URL has an invalid host or port",
    ),
    ({"ANTHROPIC_AUTH_TOKEN": "two words"}, "ANTHROPIC_AUTH_TOKEN has characters"),
]


@pytest.mark.parametrize(("environment", "message"), INVALID_ENVIRONMENTS)
def test_invalid_upstream_settings_are_rejected(environment, message):
    with pytest.raises(ConfigurationError, match=message):
        upstream_from_environment(ClaudeCode(), environment)
