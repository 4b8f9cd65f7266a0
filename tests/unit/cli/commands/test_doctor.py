"""`sandbox serve`, `sandbox doctor` and `sandbox demo` hand on what they were told."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from sandbox.bootstrap.doctor.findings import Finding
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings
from sandbox.cli.main import root
from sandbox.model.errors import SandboxError


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The wiring, as far as the command line knows it, and a home without a configuration."""
    wiring = SimpleNamespace(settings=None, announce=None, findings=[])

    def run(settings, *, announce):
        wiring.settings, wiring.announce = settings, announce

    wiring.run = run
    wiring.run_checks = lambda settings: wiring.findings
    for module in ("sandbox.bootstrap.server", "sandbox.bootstrap.doctor.examination"):
        monkeypatch.setitem(sys.modules, module, wiring)
    for name in ("HOST", "PORT", "WS_PORT", "DATA_DIR", "RUNTIME", "CONFIG"):
        monkeypatch.delenv(f"SANDBOX_{name}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return wiring


def invoke(*arguments: str, **environment: str):
    return CliRunner(env=environment).invoke(root, list(arguments))


def test_a_first_start_needs_no_options(server):
    assert invoke("serve", XDG_DATA_HOME="/data").exit_code == 0
    where = ServerSection(
        host="127.0.0.1", port=8122, ws_port=8121, data_dir=Path("/data/sandbox"), runtime="auto", host_names=()
    )
    assert server.settings == ServerSettings(server=where)
    assert server.announce == "text"


@pytest.mark.parametrize("variable", ["", "relative"])
def test_without_a_usable_data_home_it_is_in_the_home_directory(server, variable):
    invoke("serve", XDG_DATA_HOME=variable, HOME="/home/me")
    assert server.settings.server.data_dir == Path("/home/me/.local/share/sandbox")


def test_options_and_environment_say_the_same_things(server):
    options = ["--host", "::1", "--port", "0", "--ws-port", "1", "--data-dir", "/d", "--runtime", "bubblewrap"]
    invoke("serve", *options, "--format", "json")
    by_options = server.settings
    assert server.announce == "json"
    variables = {"HOST": "::1", "PORT": "0", "WS_PORT": "1", "DATA_DIR": "/d", "RUNTIME": "bubblewrap"}
    invoke("--format", "json", "serve", **{f"SANDBOX_{name}": value for name, value in variables.items()})
    assert server.settings == by_options
    assert server.announce == "json"


def test_an_option_wins_over_the_environment(server):
    invoke("serve", "--port", "1", SANDBOX_PORT="2")
    assert server.settings.server.port == 1


def test_what_cannot_be_is_refused_before_the_server_starts(server, tmp_path):
    (tmp_path / "sandbox").mkdir()
    (tmp_path / "sandbox" / "sandbox.toml").write_text("[server]\nprot = 1\n")
    result = invoke("serve", "--port", "many")
    assert (result.exit_code, server.settings) == (2, None)
    assert "server.port (--port) must be a whole number" in result.stderr
    assert "did you mean 'port'?" in result.stderr


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (SandboxError("Port 8122 is taken; choose another with --port."), "Port 8122 is taken"),
        (PermissionError(13, "Permission denied", "/data"), "/data: Permission denied"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_a_sentence(server, error, sentence):
    def run(settings, *, announce):
        raise error

    server.run = run
    result = invoke("serve")
    assert result.exit_code == 10
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_what_nobody_foresaw_does_not_end_as_a_task_that_failed(server):
    def run(settings, *, announce):
        raise KeyError("\x1b[2J")

    server.run = run
    result = invoke("serve")
    assert result.exit_code == 10
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == r"KeyError: '\x1b[2J'"


FINE = Finding("bubblewrap", True, "version 0.11")
BROKEN = Finding("namespaces", False, "user namespaces are switched off", "Switch them on with sysctl …")
WEAK = Finding("cgroups", False, "not writable; limits do not hold", "Run as root", is_needed=False)


def test_doctor_is_content_when_everything_works(server):
    server.findings = [FINE]
    result = invoke("doctor")
    assert (result.exit_code, result.stdout) == (0, "✓ bubblewrap  version 0.11\n")


def test_doctor_says_what_to_mend_and_fails_when_no_task_can_run(server):
    server.findings = [FINE, BROKEN]
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "✗ namespaces  user namespaces are switched off\n" in result.stdout
    assert "→ Switch them on with sysctl …\n" in result.stdout


def test_a_weakness_is_told_and_does_not_fail(server):
    server.findings = [WEAK]
    result = invoke("doctor")
    assert result.exit_code == 0
    assert result.stdout.startswith("! cgroups")


def test_what_belongs_together_is_named_once(server):
    server.findings = [FINE, Finding("gap", True, "one"), Finding("gap", True, "two")]
    assert invoke("doctor").stdout == "✓ bubblewrap  version 0.11\n✓ gap         one\n✓             two\n"


def test_doctor_speaks_json(server):
    server.findings = [BROKEN]
    result = invoke("doctor", "-f", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["can_run_tasks"] is False
    assert json.loads(result.stdout)["findings"][0]["mend"] == BROKEN.mend


@pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_demo_ends_as_it_says(monkeypatch, given, code):
    monkeypatch.setitem(sys.modules, "sandbox.demo.command", SimpleNamespace(run=lambda: given))
    assert invoke("demo").exit_code == code
