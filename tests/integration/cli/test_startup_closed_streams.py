"""The command line where stdin, stdout or stderr is closed: all goes as if it were /dev/null."""

import os
import subprocess
import sys
from pathlib import Path

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


FULL = Path("/dev/full")
EVERYTHING = [
    ["--help"],
    ["--version"],
    ["task", "--help"],
    ["task", "submit", "--help"],
    ["admin", "check", "--help"],
    ["completion", "bash"],
    ["completion", "zsh"],
    ["config", "show"],
    ["config", "path"],
    ["token", "list", "--data-dir", ".", "--format", "json"],
    ["profile", "list", "--format", "json"],
    ["task", "list"],
    ["task", "list", "--format", "json"],
    ["task", "validate", "task.yaml", "--format", "json"],
]
MANIFEST = """{"version": "1", "kind": "Task", "metadata": {"name": "My Task"}, "claude": {"prompt": "Work."},
"repository": {"url": "https://github.com/org/repo.git", "branch": "main"}}"""


@pytest.fixture
def writing(api, environment, tmp_path):
    """Run a command that has something to print, with this as its stdout and this as its stderr."""
    task = {"id": "task-1", "name": "A", "state": "pending", "created_at": "2026-01-29T10:00:00.000Z"}
    listed = {"tasks": [task | {"labels": {}, "error": None}], "next_cursor": None, "total_count": 1}
    api.on("GET", "/tasks", of_json(listed))
    (tmp_path / "task.yaml").write_text(MANIFEST)

    def run(command, stdout, stderr=subprocess.PIPE, **variables):
        argv, env = [*SANDBOX, *command], {**environment, **variables}
        return subprocess.run(argv, stdout=stdout, stderr=stderr, env=env, cwd=tmp_path, timeout=60, check=False)

    return run


@pytest.mark.parametrize("command", EVERYTHING, ids=" ".join)
def test_a_stdout_that_is_full_is_told_in_one_sentence(writing, command):
    with FULL.open("wb") as full:
        done = writing(command, full)
    assert done.stderr == b"Error: stdout: No space left on device; make room and try again\n"
    assert done.returncode == 10
    assert writing(command, subprocess.PIPE).returncode == 0


@pytest.mark.parametrize("command", EVERYTHING, ids=" ".join)
def test_nothing_is_said_where_whoever_read_stdout_is_gone(writing, command):
    reading, write = os.pipe()
    os.close(reading)
    try:
        done = writing(command, write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("is_full", [True, False])
def test_completing_ends_in_the_same_way(writing, is_full):
    asked = {"_SANDBOX_COMPLETE": "bash_complete", "COMP_WORDS": "sandbox ta", "COMP_CWORD": "1"}
    assert writing([], subprocess.PIPE, **asked).stdout == b"plain,task\n"
    if is_full:
        with FULL.open("wb") as full:
            done = writing([], full, **asked)
        assert (done.returncode, done.stderr.count(b"\n")) == (10, 1)
        return
    reading, write = os.pipe()
    os.close(reading)
    done = writing([], write, **asked)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["nonsense"], 2),
        (["task", "list", "--nonsense"], 2),
        (["task", "status", "nope"], 3),
        (["task", "list"], 0),
        (["admin", "check", "--data-dir", "nowhere"], 3),
    ],
    ids=str,
)
def test_messages_that_cannot_be_written_change_no_exit_code(writing, command, code):
    assert writing(command, subprocess.PIPE).returncode == code
    with FULL.open("wb") as full:
        assert writing(command, subprocess.PIPE, full).returncode == code
        assert writing(command, full, full).returncode == (code or 10)


def test_a_pipeline_of_a_shell_is_quiet(environment, tmp_path):
    script = 'python=$1; "$python" -m sandbox --help | head -1'
    argv = ["bash", "-c", script, "bash", sys.executable]
    done = subprocess.run(argv, capture_output=True, env=environment, cwd=tmp_path, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (b"Usage: sandbox [OPTIONS] COMMAND [ARGS]...\n", b"")


def test_what_a_command_starts_has_all_three_streams(closing, tmp_path):
    script = (
        "import os, subprocess, sys, sandbox.cli.main as command\n"
        'look = \'import os; [os.write(9, os.readlink(f"/proc/self/fd/{n}").encode() + b" ") for n in range(3)]\'\n'
        "told = os.open('told', os.O_CREAT | os.O_WRONLY)\n"
        "os.dup2(told, 9)\n"
        "os.close(told)\n"
        "command.root = lambda **_: subprocess.run([sys.executable, '-c', look], pass_fds=[9], check=True)\n"
        "command.main()\n"
    )
    assert closing("<&- >&- 2>&-", sys.executable, "-c", script).returncode == 0
    assert (tmp_path / "told").read_text().split() == ["/dev/null"] * 3
