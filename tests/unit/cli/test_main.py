"""Commands, options, help and errors of the command line."""

import json
import pkgutil
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from sandbox.bootstrap.worker import SLURM_HOST_VARIABLE, TOKEN_VARIABLE
from sandbox.cli import commands, main, options
from sandbox.cli.commands import admin, task
from sandbox.interfaces.cluster_engine import HOST_NAME_VARIABLE, IDENTITY_FILE_VARIABLE

SLOW_MODULES = (
    "rich",
    "httpx2",
    "pydantic",
    "fastapi",
    "uvicorn",
    "yaml",
    "msgspec",
    "asyncio",
    "sandbox.client",
    "sandbox.bootstrap",
)


@pytest.mark.parametrize("arguments", [["--help"], ["task", "--help"], ["admin", "--help"]])
def test_help_does_not_import_slow_modules(arguments):
    script = (
        "import sys\nfrom sandbox.cli.main import root\n"
        f"root({arguments!r}, standalone_mode=False)\n"
        f"print('LOADED', sorted(name for name in {SLOW_MODULES!r} if name in sys.modules))"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert completed.stdout.splitlines()[-1] == "LOADED []"


def test_client_command_does_not_import_asyncio_or_httpx_main():
    script = (
        "import atexit, sys\nfrom sandbox.cli.main import main\n"
        "loaded = ('httpx2', 'asyncio', 'httpx2._main', 'rich')\n"
        "atexit.register(lambda: print('LOADED', [name for name in loaded if sys.modules.get(name)]))\n"
        "sys.argv[1:] = ['task', 'list', '--server', 'http://127.0.0.1:9']\n"
        "main()"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert completed.stdout.splitlines()[-1] == "LOADED ['httpx2']"


@pytest.mark.parametrize("entries", [main.ROOT_ENTRIES, main.TASK_ENTRIES, main.ADMIN_ENTRIES])
def test_group_help_matches_command_help(entries):
    groups = (main.root, main.task, main.admin)
    [group] = [each for each in groups if each._entries is entries]
    for name, (_, short_help) in entries.items():
        command = group.get_command(click.Context(group), name)
        assert command.help.splitlines()[0] == short_help


def modules_of(package):
    """Return the modules of a package as pairs: the name, and whether the module is itself a package."""
    prefix = f"{package.__name__}."
    return {(name, is_package) for _, name, is_package in pkgutil.iter_modules(package.__path__, prefix)}


def test_every_command_module_is_listed_in_its_group():
    entries = {**main.ROOT_ENTRIES, **main.TASK_ENTRIES, **main.ADMIN_ENTRIES}
    expected = {name for package in (task, admin) for name, _ in modules_of(package)}
    expected |= {
        f"{name}.command" if is_package else name
        for name, is_package in modules_of(commands)
        if name not in (task.__name__, admin.__name__)
    }
    locations = [*(location for location, _ in entries.values()), *main.HIDDEN_ROOT_COMMANDS.values()]
    assert {location.partition(":")[0] for location in locations} - {main.__name__} == expected


def test_commands_for_other_programs_are_not_listed():
    runner = CliRunner()
    assert "worker" not in runner.invoke(main.root, ["--help"]).output
    text = runner.invoke(main.root, ["worker", "--help"]).output
    assert "An engine starts workers." in text
    assert all(name in text for name in (TOKEN_VARIABLE, IDENTITY_FILE_VARIABLE, HOST_NAME_VARIABLE))
    assert all(name in text for name in (SLURM_HOST_VARIABLE, "SANDBOX_CLUSTER_HOST_KEY_FILE"))


@pytest.fixture
def parse_common_options(monkeypatch, tmp_path):
    """Return a function that runs a command and returns the server, token, format and color from its common options."""
    results = {}

    @click.command()
    @options.common_options
    def example():
        current = options.current_options()
        results["chosen"] = (current.server, current.token, current.format, current.has_color)

    monkeypatch.setitem(sys.modules, "example_module", type(sys)("example_module"))
    sys.modules["example_module"].example = example
    monkeypatch.setitem(main.TASK_ENTRIES, "example", ("example_module:example", ""))
    for variable in ("SANDBOX_SERVER", "SANDBOX_TOKEN", "SANDBOX_CONTEXT", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def run(*arguments: str, **environment: str):
        result = CliRunner(env=environment).invoke(main.root, list(arguments))
        assert result.exit_code == 0, result.output
        return results["chosen"]

    return run


def test_common_options_have_defaults(parse_common_options):
    assert parse_common_options("task", "example") == ("http://localhost:8122", "", "text", True)


COMMON_OPTIONS = ["--server", "http://a", "--token", "t", "-f", "json", "--no-color"]


@pytest.mark.parametrize(
    "arguments",
    [[*COMMON_OPTIONS, "task", "example"], ["task", *COMMON_OPTIONS, "example"], ["task", "example", *COMMON_OPTIONS]],
)
def test_common_options_are_accepted_before_and_after_the_command(parse_common_options, arguments):
    assert parse_common_options(*arguments) == ("http://a", "t", "json", False)


def test_options_of_a_context_are_read_from_its_file(parse_common_options, tmp_path):
    contexts = {"prod": {"server": "https://prod", "token": "p"}}
    file = tmp_path / "sandbox" / "contexts.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"version": 1, "current": "default", "contexts": contexts}))
    file.chmod(0o600)
    for arguments in (["--context", "prod", "task", "example"], ["task", "example", "--context", "prod"]):
        assert parse_common_options(*arguments)[:2] == ("https://prod", "p")
    assert parse_common_options("task", "example", SANDBOX_CONTEXT="prod")[:2] == ("https://prod", "p")
    assert parse_common_options("task", "example")[:2] == ("http://localhost:8122", "")


def test_option_after_the_command_overrides_earlier_options(parse_common_options):
    current = parse_common_options(
        "--server", "http://a", "task", "example", "--server", "http://b", SANDBOX_SERVER="http://c"
    )
    assert current[0] == "http://b"


def test_options_are_read_from_the_environment(parse_common_options):
    current = parse_common_options("task", "example", SANDBOX_SERVER="http://c", SANDBOX_TOKEN="s", NO_COLOR="1")
    assert current == ("http://c", "s", "text", False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["task", "nonsense"],
        ["task", "submit", "/no/such/file.yaml"],
        ["task", "list", "--state", "sleeping"],
        ["task", "list", "--label", "team"],
        ["task", "list", "--label", "team=a", "--label", "team=b"],
        ["task", "list", "--limit", "0"],
        ["task", "wait", "t", "--timeout", "soon"],
        ["task", "logs", "t", "--since", "yesterday"],
        ["task", "submit", __file__, "--set", "vm.cpus"],
        ["task", "apply", "t", "--directory", "/no/such/directory"],
        ["completion", "tcsh"],
        ["task", "download", "t"],
        ["task", "download", "t", "name", "--all"],
        ["task", "download", "t", "--all", "-o", "-"],
        ["task", "status"],
        ["--format", "xml", "task", "list"],
        ["--server", "example.com:8122", "task", "list"],
        ["serve", "--port", "70000"],
    ],
)
def test_usage_error_exits_with_code_2_and_a_message(arguments):
    result = CliRunner().invoke(main.root, arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_version_is_printed():
    assert CliRunner().invoke(main.root, ["--version"]).output.startswith("sandbox 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("status", "No such command 'status'; did you mean sandbox task status?"),
        ("tsk list", "No such command 'tsk'; did you mean sandbox task?"),
        ("task stats", "did you mean sandbox task status?"),
        ("task serve", "did you mean sandbox serve?"),
        ("task ps", "did you mean sandbox task list?"),
        ("task rm t", "did you mean sandbox task delete?"),
        ("token delete t", "did you mean sandbox token revoke?"),
        ("token creat", "did you mean sandbox token create?"),
        ("profile rm x", "did you mean sandbox profile remove?"),
        ("zzz", "No such command 'zzz'."),
        ("stop", "No such command 'stop'; did you mean sandbox task cancel?"),
        ("start", "No such command 'start'; did you mean sandbox run?"),
        ("rm", "No such command 'rm'; did you mean sandbox task delete?"),
        ("ls", "No such command 'ls'; did you mean sandbox task list?"),
        ("ps", "No such command 'ps'; did you mean sandbox top?"),
        ("task ps", "No such command 'ps'; did you mean sandbox task list?"),
        ("token rm", "No such command 'rm'; did you mean sandbox token revoke?"),
        ("task delte t", "did you mean sandbox task delete?"),
    ],
)
def test_suggestion_of_a_similar_command_has_its_full_name(arguments, message):
    result = CliRunner().invoke(main.root, arguments.split(), prog_name="sandbox")
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]


@pytest.mark.parametrize("arguments", ["cost", "task cost demo", "task usage"])
def test_error_for_an_unknown_cost_command_names_the_commands_that_show_the_cost(arguments):
    result = CliRunner().invoke(main.root, arguments.split(), prog_name="sandbox")
    assert result.exit_code == 2
    assert result.output.splitlines()[-2:] == [
        "  sandbox task status TASK_ID",
        "  sandbox task list --sort cost --totals",
    ]


@pytest.mark.parametrize(
    ("arguments", "example"),
    [("run", 'sandbox run "Fix the failing tests."'), ("task status", "sandbox task status 5e173eb5")],
)
def test_missing_argument_error_has_an_example(arguments, example):
    result = CliRunner().invoke(main.root, arguments.split(), prog_name="sandbox")
    assert result.exit_code == 2
    last = result.output.splitlines()[-1]
    assert last.startswith("Error: Missing argument ")
    assert last.endswith(f". For example: {example}")


def test_several_similar_commands_are_listed():
    result = CliRunner().invoke(main.root, ["list"], prog_name="sandbox")
    assert result.output.splitlines()[-5:] == [
        "Error: No such command 'list'. Similar commands:",
        "  sandbox task list",
        "  sandbox context list",
        "  sandbox profile list",
        "  sandbox token list",
    ]


def test_unknown_option_of_a_group_is_not_reported_as_a_command():
    result = CliRunner().invoke(main.root, ["task", "--formt", "json", "list"], prog_name="sandbox")
    assert "No such option '--formt'" in result.output
