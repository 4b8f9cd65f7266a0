"""What the command line accepts, and what it says of itself."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from sandbox.cli import main, options
from sandbox.cli.commands.admin import group as admin_command
from sandbox.cli.commands.task import group as task_command

SLOW = (
    "rich",
    "httpx",
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
def test_help_comes_without_importing_what_only_commands_need(arguments):
    script = (
        "import sys\nfrom sandbox.cli.main import root\n"
        f"root({arguments!r}, standalone_mode=False)\n"
        f"print('LOADED', sorted(name for name in {SLOW!r} if name in sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert answer.stdout.splitlines()[-1] == "LOADED []"


def test_a_command_that_asks_a_server_imports_neither_an_event_loop_nor_the_command_line_of_httpx():
    script = (
        "import atexit, sys\nfrom sandbox.cli.main import main\n"
        "loaded = ('httpx', 'asyncio', 'httpx._main', 'rich')\n"
        "atexit.register(lambda: print('LOADED', [name for name in loaded if sys.modules.get(name)]))\n"
        "sys.argv[1:] = ['task', 'list', '--server', 'http://127.0.0.1:9']\n"
        "main()"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert answer.stdout.splitlines()[-1] == "LOADED ['httpx']"


@pytest.mark.parametrize("entries", [main.ENTRIES, task_command.ENTRIES, admin_command.ENTRIES])
def test_the_help_says_of_each_command_what_the_command_says_of_itself(entries):
    groups = (main.root, task_command.task, admin_command.admin)
    [group] = [each for each in groups if each._entries is entries]
    for name, (_, short_help) in entries.items():
        found = group.get_command(click.Context(group), name)
        assert found.help.splitlines()[0] == short_help


def test_the_commands_are_these_and_no_others():
    assert list(main.ENTRIES) == [
        "run", "init", "task", "top", "serve", "doctor", "config", "profile", "token", "admin", "mcp", "completion",
        "demo",
    ]  # fmt: skip
    assert set(task_command.ENTRIES) == {
        "submit", "list", "status", "logs", "wait", "cancel", "artifacts", "download", "validate",
        "diff", "apply", "release", "shell", "attach",
    }  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """What a command with the common options finds chosen."""
    found = {}

    @click.command()
    @options.common_options
    def probe():
        found["chosen"] = options.current_options()

    monkeypatch.setitem(sys.modules, "probe_module", type(sys)("probe_module"))
    sys.modules["probe_module"].probe = probe
    monkeypatch.setitem(task_command.ENTRIES, "probe", ("probe_module:probe", ""))
    for variable in ("SANDBOX_SERVER", "SANDBOX_TOKEN", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments: str, **environment: str):
        result = CliRunner(env=environment).invoke(main.root, list(arguments))
        assert result.exit_code == 0, result.output
        return found["chosen"]

    return run


def test_without_options_everything_has_its_default(seen):
    assert seen("task", "probe") == options.CliOptions("http://localhost:8122", None, "text", True)


COMMON = ["--server", "http://a", "--token", "t", "-f", "json", "--no-color"]


@pytest.mark.parametrize(
    "arguments", [[*COMMON, "task", "probe"], ["task", *COMMON, "probe"], ["task", "probe", *COMMON]]
)
def test_common_options_stand_before_or_after_the_command(seen, arguments):
    assert seen(*arguments) == options.CliOptions("http://a", "t", "json", False)


def test_the_option_closest_to_the_command_wins_over_others_and_the_environment(seen):
    chosen = seen("--server", "http://a", "task", "probe", "--server", "http://b", SANDBOX_SERVER="http://c")
    assert chosen.server == "http://b"


def test_the_environment_is_heard(seen):
    chosen = seen("task", "probe", SANDBOX_SERVER="http://c", SANDBOX_TOKEN="s", NO_COLOR="1")
    assert chosen == options.CliOptions("http://c", "s", "text", False)


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
        ["--server", "localhost:8122", "task", "list"],
        ["serve", "--port", "70000"],
    ],
)
def test_what_makes_no_sense_ends_with_2_and_a_sentence(arguments):
    result = CliRunner().invoke(main.root, arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_the_version_is_told():
    assert CliRunner().invoke(main.root, ["--version"]).output.startswith("sandbox 0.")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("status", "it is sandbox task status."),
        ("list", "it is sandbox task list or sandbox profile list or sandbox token list."),
        ("nope", "No such command 'nope'."),
    ],
)
def test_a_command_that_belongs_to_a_group_is_named_in_full(name, told):
    ran = CliRunner().invoke(main.root, [name], prog_name="sandbox")
    assert ran.exit_code == 2
    assert told in ran.output
