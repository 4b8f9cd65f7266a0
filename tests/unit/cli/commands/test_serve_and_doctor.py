"""`sandbox serve`, `sandbox doctor` and `sandbox demo` pass on their options and report the results."""

import io
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console

from sandbox.bootstrap.doctor import Finding
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings
from sandbox.cli.main import root
from sandbox.model.errors import SandboxError


@pytest.fixture
def bootstrap(monkeypatch, tmp_path):
    """A fake composition root, and a home directory without configuration."""
    bootstrap = SimpleNamespace(settings=None, announce=None, findings=[])

    def run(settings, *, announce):
        bootstrap.settings, bootstrap.announce = settings, announce

    bootstrap.run = run
    bootstrap.run_checks = lambda settings, worker_server: bootstrap.findings
    for module in ("sandbox.bootstrap.server", "sandbox.bootstrap.doctor.host_checks"):
        monkeypatch.setitem(sys.modules, module, bootstrap)
    for name in ("HOST", "PORT", "WS_PORT", "DATA_DIR", "RUNTIME", "CONFIG"):
        monkeypatch.delenv(f"SANDBOX_{name}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return bootstrap


def invoke(*arguments: str, **environment: str):
    return CliRunner(env=environment).invoke(root, list(arguments))


def test_serve_without_options_uses_defaults(bootstrap):
    assert invoke("serve", XDG_DATA_HOME="/data").exit_code == 0
    section = ServerSection(
        host="127.0.0.1", port=8122, ws_port=8121, data_dir=Path("/data/sandbox"), runtime="auto", host_names=()
    )
    assert bootstrap.settings == ServerSettings(server=section)
    assert bootstrap.announce == "text"


@pytest.mark.parametrize("variable", ["", "relative"])
def test_data_dir_defaults_to_the_home_directory(bootstrap, variable):
    invoke("serve", XDG_DATA_HOME=variable, HOME="/home/me")
    assert bootstrap.settings.server.data_dir == Path("/home/me/.local/share/sandbox")


def test_options_and_environment_are_equivalent(bootstrap):
    options = ["--host", "::1", "--port", "0", "--ws-port", "1", "--data-dir", "/d", "--runtime", "bubblewrap"]
    invoke("serve", *options, "--format", "json")
    by_options = bootstrap.settings
    assert bootstrap.announce == "json"
    variables = {"HOST": "::1", "PORT": "0", "WS_PORT": "1", "DATA_DIR": "/d", "RUNTIME": "bubblewrap"}
    invoke("--format", "json", "serve", **{f"SANDBOX_{name}": value for name, value in variables.items()})
    assert bootstrap.settings == by_options
    assert bootstrap.announce == "json"


def test_option_overrides_the_environment(bootstrap):
    invoke("serve", "--port", "1", SANDBOX_PORT="2")
    assert bootstrap.settings.server.port == 1


def test_invalid_settings_are_rejected_before_startup(bootstrap, tmp_path):
    (tmp_path / "sandbox").mkdir()
    (tmp_path / "sandbox" / "sandbox.toml").write_text("[server]\nprot = 1\n")
    result = invoke("serve", "--port", "many")
    assert (result.exit_code, bootstrap.settings) == (2, None)
    assert "server.port (--port) must be a whole number" in result.stderr
    assert "did you mean 'port'?" in result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SandboxError("Port 8122 is taken; choose another with --port."), "Port 8122 is taken"),
        (PermissionError(13, "Permission denied", "/data"), "/data: Permission denied"),
    ],
)
def test_start_failure_prints_a_short_message(bootstrap, error, message):
    def run(settings, *, announce):
        raise error

    bootstrap.run = run
    result = invoke("serve")
    assert result.exit_code == 10
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_unexpected_error_exits_with_code_10(bootstrap):
    def run(settings, *, announce):
        raise KeyError("\x1b[2J")

    bootstrap.run = run
    result = invoke("serve")
    assert result.exit_code == 10
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == r"KeyError: '\x1b[2J'"


OK = Finding("bubblewrap", True, "version 0.11")
BROKEN = Finding("namespaces", False, "user namespaces are switched off", "Switch them on with sysctl …")
WEAK = Finding("cgroups", False, "not writable; limits do not hold", "Run as root", blocks_tasks=False)


def test_doctor_succeeds_without_problems(bootstrap):
    bootstrap.findings = [OK]
    result = invoke("doctor")
    assert (result.exit_code, result.stdout) == (0, "✓ bubblewrap  version 0.11\n")


def test_doctor_fails_and_names_the_fix(bootstrap):
    bootstrap.findings = [OK, BROKEN]
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "✗ namespaces  user namespaces are switched off\n" in result.stdout
    assert "→ Switch them on with sysctl …\n" in result.stdout


def test_doctor_prints_a_warning_and_succeeds(bootstrap):
    bootstrap.findings = [WEAK]
    result = invoke("doctor")
    assert result.exit_code == 0
    assert result.stdout.startswith("! cgroups")


def test_doctor_distinguishes_information_from_fixable_problems(bootstrap):
    information = Finding("runtime", False, "qemu works only slowly", blocks_tasks=False, runtime="qemu")
    bootstrap.findings = [SELECTED, information, WEAK]
    lines = invoke("doctor").stdout.splitlines()
    assert [line[0] for line in lines if not line.startswith(" ")] == ["✓", "·", "!"]


def print_on_terminal(bootstrap, monkeypatch, findings, *options):
    """Run the command on a terminal; return the printed lines and the verdict."""
    import sandbox.cli.commands.doctor as command

    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, _environ={})
    monkeypatch.setattr(command, "stdout_console", lambda *, has_color: console)
    bootstrap.findings = findings
    result = invoke("doctor", *options)
    return [line.strip() for line in console.file.getvalue().splitlines()], result.stderr


def test_doctor_shows_that_the_checks_are_running(bootstrap, monkeypatch):
    import sandbox.cli.commands.doctor as command

    lines = []

    @contextmanager
    def record(text):
        lines.append(text)
        yield
        lines.append("end")

    bootstrap.run_checks = lambda settings, worker_server: lines.append("checks") or [OK]
    monkeypatch.setattr(command, "activity_line", record)
    assert invoke("doctor").exit_code == 0
    assert lines == ["Checking this machine…", "checks", "end"]


def test_doctor_prints_problems_last_on_a_terminal(bootstrap, monkeypatch):
    findings = [BROKEN, OK, WEAK, Finding("gap", True, "one"), Finding("gap", True, "two")]
    assert print_on_terminal(bootstrap, monkeypatch, findings)[0] == [
        "✓ bubblewrap  version 0.11",
        "✓ gap         one",
        "✓             two",
        "! cgroups     not writable; limits do not hold",
        "→ Run as root",
        "✗ namespaces  user namespaces are switched off",
        "→ Switch them on with sysctl …",
    ]


SELECTED = Finding("sandbox", True, "sandboxes run with gvisor", runtime="gvisor")
GAPS = [
    Finding("gap", False, "gvisor: starts are slow", blocks_tasks=False, runtime="gvisor"),
    Finding("gap", False, "gvisor: memory is shared", blocks_tasks=False, runtime="gvisor"),
    Finding("gap", False, "bubblewrap: the kernel is shared", blocks_tasks=False, runtime="bubblewrap"),
    Finding("kernel", False, "one system call takes long", blocks_tasks=False, runtime="bubblewrap"),
]


def test_doctor_counts_the_limits_of_the_selected_runtime_on_a_terminal(bootstrap, monkeypatch):
    lines, verdict = print_on_terminal(bootstrap, monkeypatch, [SELECTED, *GAPS])
    assert lines == [
        "✓ sandbox  sandboxes run with gvisor",
        "· gap      2 known limits of gvisor on this kernel; show them with --all",
    ]
    assert verdict == "Tasks can run with gvisor.\n"


def test_doctor_lists_all_limits_on_request_and_without_a_terminal(bootstrap, monkeypatch):
    bootstrap.findings = [SELECTED, *GAPS]
    piped = invoke("doctor").stdout
    lines, _ = print_on_terminal(bootstrap, monkeypatch, [SELECTED, *GAPS], "--all")
    for gap in GAPS:
        assert any(gap.message in line for line in lines)
        assert gap.message in piped


def test_verdict_of_doctor_names_the_actions(bootstrap):
    bootstrap.findings = [
        SELECTED,
        Finding("model", False, "no key", "export …", blocks_tasks=False, short_remedy="set KEY"),
    ]
    assert invoke("doctor").stderr == "Tasks can run with gvisor. To do: set KEY.\n"
    bootstrap.findings = [Finding("git", False, "git is not installed", "apt-get …", short_remedy="install git"), WEAK]
    assert invoke("doctor").stderr.splitlines()[-1].endswith("and run this again. To do: install git.")


def test_doctor_keeps_its_order_without_a_terminal(bootstrap):
    bootstrap.findings = [OK, BROKEN]
    assert invoke("doctor").stdout.startswith("✓ bubblewrap")


def test_repeated_finding_name_is_printed_once(bootstrap):
    bootstrap.findings = [OK, Finding("gap", True, "one"), Finding("gap", True, "two")]
    assert invoke("doctor").stdout == "✓ bubblewrap  version 0.11\n✓ gap         one\n✓             two\n"


def test_doctor_prints_json(bootstrap):
    bootstrap.findings = [BROKEN]
    result = invoke("doctor", "-f", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["can_run_tasks"] is False
    assert json.loads(result.stdout)["findings"][0]["remedy"] == BROKEN.remedy


@pytest.mark.parametrize(("demo_code", "code"), [(None, 0), (0, 0), (1, 1)])
def test_demo_exit_code_is_returned(monkeypatch, demo_code, code):
    monkeypatch.setitem(sys.modules, "sandbox.demo.walkthrough", SimpleNamespace(run=lambda: demo_code))
    assert invoke("demo").exit_code == code


def test_demo_with_keep_option_uses_the_given_ports(monkeypatch):
    received = []
    background = SimpleNamespace(PORTS={"port": 1, "git_port": 2}, run_and_keep_servers=received.append)
    monkeypatch.setitem(sys.modules, "sandbox.demo.background_servers", background)
    assert invoke("demo", "--keep", "--git-port", "0").exit_code == 0
    assert received == [{"port": 1, "git_port": 0}]


@pytest.mark.parametrize("arguments", [("--port", "1"), ("--stop", "--keep"), ("--stop", "--port", "1")])
def test_demo_rejects_incompatible_options(arguments):
    assert invoke("demo", *arguments).exit_code == 2


@pytest.mark.parametrize("options", [(), ("--keep",)])
def test_demo_prints_the_lines_of_a_start_error(monkeypatch, options):
    def fail_to_start(*_):
        raise SandboxError("The server stopped during startup.\nPort 8122 \x1b[2J is taken.")

    monkeypatch.setattr("sandbox.demo.walkthrough.run", fail_to_start)
    monkeypatch.setattr("sandbox.demo.background_servers.run_and_keep_servers", fail_to_start)
    result = invoke("demo", *options)
    lines = ["Error: The server stopped during startup.", r"Port 8122 \x1b[2J is taken."]
    assert (result.exit_code, result.stderr.splitlines()) == (10, lines)
