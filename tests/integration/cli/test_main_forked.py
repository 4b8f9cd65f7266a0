"""A forked command does and says what the same command says that is started truly."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from doubles.forked_commands import ForkedCommand
from doubles.recorded_api import Answer, of_frames, of_json
from doubles.recorded_task import TASK, frames, status

TRUE = (sys.executable, "-c", "from sandbox.cli.main import main; main()")


@pytest.fixture
def both(environment, tmp_path):
    """Start `sandbox …` both ways, one after the other."""

    def start(*arguments, **streams):
        keywords = {"env": environment, "cwd": tmp_path, **streams}
        for starts, words in ((subprocess.Popen, [*TRUE, *arguments]), (ForkedCommand, arguments)):
            with starts(words, **keywords) as process:
                yield process
                process.kill()

    return start


def ends(processes, stdin=None):
    """How each ends: its exit code, what it printed and what it said."""
    return [(*process.communicate(stdin, 60), process.returncode) for process in processes]


@pytest.mark.parametrize("command", ["task list", "task validate -", "token revoke me", "admin check", "no"])
def test_it_prints_says_and_ends_the_same(api, both, command):
    api.on("GET", "/tasks", of_json({"tasks": [status("running")], "total_count": 1, "next_cursor": None}))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    true, forked = ends(both(*command.split(), **streams), b"version: '1'\nkind: Tsk\n")
    assert true == forked
    assert b"Traceback" not in true[1]


def test_it_knows_a_terminal(api, both, terminal):
    api.on("GET", f"/tasks/{TASK}", of_json(status("failed")))
    shown = []
    for process in both("task", "status", TASK, **dict.fromkeys(("stdin", "stdout", "stderr"), terminal.theirs)):
        shown.append(terminal.read_to_end(process))
        assert process.returncode == 0
    assert shown[0] == shown[1]
    assert b"\x1b[1;31mfailed" in shown[0]


@pytest.mark.parametrize("command", ["task list", "--help"])
def test_it_ends_the_same_where_its_last_output_cannot_be_written(api, both, command):
    api.on("GET", "/tasks", of_json({"tasks": [status("running")], "total_count": 1, "next_cursor": None}))
    with Path("/dev/full").open("w") as full:
        (_, said, code), forked = ends(both(*command.split(), stdout=full, stderr=subprocess.PIPE))
    assert code in {10, 120}
    assert forked[2] == code
    assert forked[1].splitlines()[-1] == said.splitlines()[-1]


def test_a_reader_that_leaves_and_an_interruption_end_it_the_same(api, both):
    over = threading.Event()

    def story():
        yield from of_frames(frames()[:5]).chunks
        over.wait(60)

    api.on("GET", f"/tasks/{TASK}", of_json(status("running")))
    lines = [b"[t] [STDOUT] x\n" * 100_000]
    api.on("GET", f"/tasks/{TASK}/logs", lambda asked: Answer(200, story() if "follow" in asked.query else lines))
    pipes, seen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}, []
    for process in both("task", "logs", TASK, **pipes):
        process.stdout.readline()
        process.stdout.close()
        seen.append((process.wait(30), process.stderr.read()))
    for process in both("task", "logs", TASK, "--follow", **pipes):
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        seen.append((process.wait(30), process.stderr.read()))
    over.set()
    assert [code for code, _ in seen] == [141, 141, 130, 130]
    assert (seen[0], seen[2]) == (seen[1], seen[3])


EACH_ALONE = """
import os, sys
from importlib import import_module
from sandbox.cli import main
from sandbox.cli.commands.task import group as task_command

for place in [entry[0] for entries in (main.ENTRIES, task_command.ENTRIES) for entry in entries.values()]:
    if os.fork() == 0:
        import_module(place.partition(":")[0])
        os._exit(0)
    print(place, os.wait()[1])
"""


def test_what_a_fork_does_not_see_each_command_finds_all_that_it_imports(environment):
    imported = subprocess.run(
        [sys.executable, "-c", EACH_ALONE], env=environment, capture_output=True, timeout=60, check=True
    )
    assert imported.stderr == b""
    lines = imported.stdout.decode().splitlines()
    assert len(lines) > 25
    assert [line for line in lines if not line.endswith(" 0")] == []
