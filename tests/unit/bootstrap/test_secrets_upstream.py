"""Where the model is stands in the server's environment; what cannot be is told before any task fails of it."""

import pytest

from sandbox.bootstrap.secrets import DEFAULT_BASE_URL, read_upstream
from sandbox.bootstrap.settings.load import ConfigurationError
from sandbox.interfaces.gateway import ModelUpstream


def test_a_key_is_enough():
    assert read_upstream({"ANTHROPIC_API_KEY": "k"}) == ModelUpstream(DEFAULT_BASE_URL, api_key="k")
    assert read_upstream({"ANTHROPIC_AUTH_TOKEN": "t"}) == ModelUpstream(DEFAULT_BASE_URL, auth_token="t")
    elsewhere = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:8131", "ANTHROPIC_API_KEY": "k", "ANTHROPIC_AUTH_TOKEN": "t"}
    assert read_upstream(elsewhere) == ModelUpstream("http://127.0.0.1:8131", api_key="k")
    assert read_upstream({"ANTHROPIC_BASE_URL": "nonsense"}) is None


WRONG = [
    ({"ANTHROPIC_BASE_URL": "api.example.com", "ANTHROPIC_API_KEY": "k"}, "ANTHROPIC_BASE_URL must be an http://"),
    (
        {"ANTHROPIC_BASE_URL": "https://x:99999", "ANTHROPIC_API_KEY": "k"},
        "ANTHROPIC_BASE_URL has an invalid host or port",
    ),
    ({"ANTHROPIC_AUTH_TOKEN": "two words"}, "ANTHROPIC_AUTH_TOKEN has characters"),
]


@pytest.mark.parametrize(("environment", "sentence"), WRONG)
def test_a_server_does_not_start_with_what_no_task_could_use(environment, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        read_upstream(environment)
