"""The server and the model that the demo starts."""

import os
import re
import signal

import pytest

from sandbox.demo.walkthrough import exit_on_signals, read_first_line, scripted_model_variables, start_server
from sandbox.model.errors import SandboxError


def test_sigterm_and_sighup_exit_with_128_plus_the_signal():
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGHUP):
        with pytest.raises(SystemExit) as raised, exit_on_signals():
            signal.raise_signal(number)
        assert raised.value.code == 128 + number
    assert signal.getsignal(signal.SIGTERM) == before


def test_started_server_prints_no_warnings(tmp_path, capfd):
    with start_server(tmp_path / "data", {"ANTHROPIC_API_KEY": "", "ANTHROPIC_AUTH_TOKEN": ""}) as server:
        assert server["http"].startswith("http://127.0.0.1:")
    assert capfd.readouterr().err == ""


def test_redaction_of_the_demo_key_changes_no_word():
    """The server replaces its key in all output, including the agent's messages."""
    keys = []
    for _ in range(2):
        with scripted_model_variables() as variables:
            keys.append(variables["ANTHROPIC_API_KEY"])
    assert all(re.fullmatch("demo-[0-9a-f]{32}", key) for key in keys)
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("has_ended", "message"),
    [(True, "the server exited during startup;"), (False, "the server did not start within 0 s;")],
)
def test_process_that_ended_is_not_reported_as_slow(has_ended, message):
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb") as stdout, os.fdopen(write_fd, "wb") as stdin:
        if has_ended:
            stdin.close()
        with pytest.raises(SandboxError, match=message):
            read_first_line(stdout, "the server", 0.05)


def test_first_line_printed_by_a_started_process_is_returned():
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb") as stdout, os.fdopen(write_fd, "wb") as stdin:
        stdin.write(b"{}\n")
        stdin.flush()
        assert read_first_line(stdout, "the server") == b"{}\n"
