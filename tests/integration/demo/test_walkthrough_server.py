"""The server and the model that the demo starts."""

import re

from sandbox.demo.walkthrough import scripted_model_variables, start_server


def test_started_server_prints_no_warnings(tmp_path, capfd):
    with start_server(tmp_path / "data", {"ANTHROPIC_API_KEY": "", "ANTHROPIC_AUTH_TOKEN": ""}) as server:
        assert server["http"].startswith("http://127.0.0.1:")
    assert capfd.readouterr().err == ""


def test_redaction_of_the_demo_key_changes_no_word():
    """The server replaces its key in all output, also in the agent's messages."""
    keys = []
    for _ in range(2):
        with scripted_model_variables() as variables:
            keys.append(variables["ANTHROPIC_API_KEY"])
    assert all(re.fullmatch("demo-[0-9a-f]{32}", key) for key in keys)
    assert keys[0] != keys[1]
