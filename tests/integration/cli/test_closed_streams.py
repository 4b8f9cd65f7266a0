"""The command line where stdin, stdout or stderr is closed: all goes as if it were /dev/null."""

import subprocess
import sys

import pytest

from doubles.recorded_api import of_json

SANDBOX = (sys.executable, "-m", "sandbox")


@pytest.fixture
def closing(environment, tmp_path):
    """Run a command without some of its streams, as a shell writes that."""

    def run(closed: str, *command: str) -> subprocess.CompletedProcess[bytes]:
        argv = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
        return subprocess.run(argv, capture_output=True, env=environment, cwd=tmp_path, timeout=60, check=False)

    return run


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_failure_keeps_its_exit_code(closing, closed):
    result = closing(closed, *SANDBOX, "task", "status", "nope")
    assert result.returncode == 3
    assert (b"There is no such task." in result.stderr) == ("2>&-" not in closed)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_an_answer_that_nobody_reads_is_no_failure(api, closing, closed):
    api.on("GET", "/tasks", of_json({"tasks": [], "next_cursor": None, "total_count": 0}))
    result = closing(closed, *SANDBOX, "task", "list", "--format", "json")
    assert (result.returncode, result.stderr) == (0, b"")
    assert bool(result.stdout) == (">&-" not in closed.split())


def test_a_stdin_that_is_closed_is_an_empty_one(closing):
    empty = closing("</dev/null", *SANDBOX, "task", "validate", "-")
    closed = closing("<&-", *SANDBOX, "task", "validate", "-")
    assert (closed.returncode, closed.stderr) == (empty.returncode, empty.stderr) == (9, empty.stderr)
    assert b"<stdin>" in closed.stdout + closed.stderr


def test_what_a_command_starts_has_all_three_streams(closing, tmp_path):
    script = (
        "import os, subprocess, sys, sandbox.cli.command as command\n"
        'look = \'import os; [os.write(9, os.readlink(f"/proc/self/fd/{n}").encode() + b" ") for n in range(3)]\'\n'
        "told = os.open('told', os.O_CREAT | os.O_WRONLY)\n"
        "os.dup2(told, 9)\n"
        "os.close(told)\n"
        "command.root = lambda **_: subprocess.run([sys.executable, '-c', look], pass_fds=[9], check=True)\n"
        "command.main()\n"
    )
    assert closing("<&- >&- 2>&-", sys.executable, "-c", script).returncode == 0
    assert (tmp_path / "told").read_text().split() == ["/dev/null"] * 3
