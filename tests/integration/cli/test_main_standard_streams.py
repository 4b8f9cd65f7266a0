"""A closed stdin, stdout or stderr behaves like /dev/null."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.fake_api import json_response
from doubles.sample_task import TASK_ID, task_status

SANDBOX = (sys.executable, "-m", "sandbox")


@pytest.fixture
def run_closed(environment, tmp_path):
    """Return a function that runs a command after closing streams with shell redirections such as `<&-`."""

    def run(closed: str, *command: str) -> subprocess.CompletedProcess[bytes]:
        argv = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
        return subprocess.run(argv, capture_output=True, env=environment, cwd=tmp_path, timeout=60, check=False)

    return run


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_stream_does_not_change_the_exit_code_of_a_failure(run_closed, closed):
    result = run_closed(closed, *SANDBOX, "task", "status", "nope")
    assert result.returncode == 3
    assert (b"There is no such task." in result.stderr) == ("2>&-" not in closed)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_output_to_a_closed_stream_is_not_a_failure(api, run_closed, closed):
    api.on("GET", "/tasks", json_response({"tasks": [], "next_cursor": None, "total_count": 0}))
    result = run_closed(closed, *SANDBOX, "task", "list", "--format", "json")
    assert (result.returncode, result.stderr) == (0, b"")
    assert bool(result.stdout) == (">&-" not in closed.split())


def test_closed_stdin_behaves_like_an_empty_file(run_closed):
    empty = run_closed("</dev/null", *SANDBOX, "task", "validate", "-")
    closed = run_closed("<&-", *SANDBOX, "task", "validate", "-")
    assert (closed.returncode, closed.stderr) == (empty.returncode, empty.stderr) == (9, empty.stderr)
    assert b"<stdin>" in closed.stdout + closed.stderr


FULL = Path("/dev/full")
COMMANDS = [
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
def run_with_streams(api, environment, tmp_path):
    """Return a function that runs a command with the given stdout and stderr."""
    page = {"tasks": [task_status("pending")], "next_cursor": None, "total_count": 1}
    api.on("GET", "/tasks", json_response(page))
    (tmp_path / "task.yaml").write_text(MANIFEST)

    def run(command, stdout, stderr=subprocess.PIPE, **variables):
        argv, env = [*SANDBOX, *command], {**environment, **variables}
        return subprocess.run(argv, stdout=stdout, stderr=stderr, env=env, cwd=tmp_path, timeout=60, check=False)

    return run


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_full_stdout_is_reported_in_one_line(run_with_streams, command):
    with FULL.open("wb") as full:
        result = run_with_streams(command, full)
    assert result.stderr == b"Error: stdout: No space left on device; free disk space and try again\n"
    assert result.returncode == 10
    assert run_with_streams(command, subprocess.PIPE).returncode == 0


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_closed_stdout_pipe_exits_silently(run_with_streams, command):
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    try:
        result = run_with_streams(command, write_fd)
    finally:
        os.close(write_fd)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.parametrize("output", ["text", "json"])
def test_error_names_the_submitted_task_if_its_id_cannot_be_printed(api, run_with_streams, output):
    submitted = {"task_id": TASK_ID, "state": "pending", "message": "m", "created_at": "2026-01-29T10:10:15.000Z"}
    api.on("POST", "/tasks", json_response(submitted, 202))
    command = ["task", "submit", "task.yaml", "--format", output]
    with FULL.open("wb") as full:
        result = run_with_streams(command, full)
    assert result.returncode == 10
    assert f"Task {TASK_ID} was submitted.".encode() in result.stderr
    assert b"was submitted" not in run_with_streams(command, subprocess.PIPE).stderr


@pytest.mark.parametrize("is_full", [True, False])
def test_completion_handles_unwritable_stdout(run_with_streams, is_full):
    variables = {"_SANDBOX_COMPLETE": "bash_complete", "COMP_WORDS": "sandbox ta", "COMP_CWORD": "1"}
    assert run_with_streams([], subprocess.PIPE, **variables).stdout == b"plain,task\n"
    if is_full:
        with FULL.open("wb") as full:
            result = run_with_streams([], full, **variables)
        assert (result.returncode, result.stderr.count(b"\n")) == (10, 1)
        return
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    result = run_with_streams([], write_fd, **variables)
    os.close(write_fd)
    assert (result.returncode, result.stderr) == (141, b"")


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
def test_unwritable_stderr_does_not_change_the_exit_code(run_with_streams, command, code):
    assert run_with_streams(command, subprocess.PIPE).returncode == code
    with FULL.open("wb") as full:
        assert run_with_streams(command, subprocess.PIPE, full).returncode == code
        assert run_with_streams(command, full, full).returncode == (code or 10)


def test_shell_pipeline_prints_no_errors(environment, tmp_path):
    script = 'python=$1; "$python" -m sandbox --help | head -1'
    argv = ["bash", "-c", script, "bash", sys.executable]
    result = subprocess.run(argv, capture_output=True, env=environment, cwd=tmp_path, timeout=60, check=False)
    assert (result.stdout, result.stderr) == (b"Usage: sandbox [OPTIONS] COMMAND [ARGS]...\n", b"")


def test_child_processes_have_three_open_streams(run_closed, tmp_path):
    script = (
        "import os, subprocess, sys, sandbox.cli.main as command\n"
        'show = \'import os; [os.write(9, os.readlink(f"/proc/self/fd/{n}").encode() + b" ") for n in range(3)]\'\n'
        "targets = os.open('targets', os.O_CREAT | os.O_WRONLY)\n"
        "os.dup2(targets, 9)\n"
        "os.close(targets)\n"
        "command.root = lambda **_: subprocess.run([sys.executable, '-c', show], pass_fds=[9], check=True)\n"
        "command.main()\n"
    )
    assert run_closed("<&- >&- 2>&-", sys.executable, "-c", script).returncode == 0
    assert (tmp_path / "targets").read_text().split() == ["/dev/null"] * 3
