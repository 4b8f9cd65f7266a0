"""A server is replaced by a newer version while its tasks go on.

The old version is that of OLD_COMMIT, after which most modules and names changed. Its runners stay when its server
stops; the new server follows, cancels, enters and clears away their tasks. Nothing may have changed that one version
writes and the other reads.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from doubles import wire_samples
from doubles.leftovers import left_behind
from doubles.live_server import bash, make_repository, says, until
from doubles.old_version import OldVersion, missing_reason
from doubles.runners import end_books, records, runner_pid
from doubles.terminal_user import Person
from sandbox.demo.model_script import Fault, Turn
from sandbox.journal.lock import kill_lock_holder

OLD_COMMIT = "087898174e4eb7f8436a4b28756aadbbe9c04233"
SETTINGS = """[git]
allowed_hosts = ["github.com"]

[retention]
older_than = "60d"
"""
WAIT = "mkfifo /tmp/gate && read _ < /tmp/gate"
# Twice: Claude Code answers for the model once where the call that broke off had come to its session.
GOING_ON = (bash("cat first.txt; echo second > second.txt"),) * 2
SCRIPTS = {
    "PLAY-FINISH": (bash("mkdir out && echo kept > out/kept.txt && echo finished > finished.txt"), says("Finished.")),
    "PLAY-KEEP": (bash("echo preserved > preserved.txt"), Turn(faults=(Fault("error", status=400, times=99),))),
    "PLAY-RUN": (bash(f"echo line-1 > lines.txt; {WAIT}; echo line-2 >> lines.txt; cat lines.txt"), says("Finished.")),
    "PLAY-CANCEL": (bash(f"echo begun > begun.txt; {WAIT}"), says("Finished.")),
    "PLAY-LOSE": (bash(f"echo lost > lost.txt; {WAIT}"), says("Finished.")),
    "PLAY-ORPHAN": (bash(WAIT), says("Finished.")),
    "PLAY-RESUME": (bash(f"echo first > first.txt; {WAIT}"), *GOING_ON, says("Both.")),
    "PLAY-TALK": (says("GOODDAY"), says("WELLCOME")),
}
KILLED = ("lose", "orphan", "resume")
WAITING = ("run", "cancel", *KILLED)
"""Their agents wait in a shell command."""

STATES = ["pending", "staging", "provisioning", "ready", "running", "completing"]

# Types of the old version, and the same ones of this version: what goes to another process or into a file.
JSON_TYPES = {
    "sandbox.model.event:Record": "sandbox.model.events:Record",
    "sandbox.model.task:Task": "sandbox.model.task:Task",
    "sandbox.contracts.runtime:SandboxHandle": "sandbox.interfaces.runtime:SandboxHandle",
    "sandbox.contracts.placement:LaunchOrder": "sandbox.interfaces.placement:LaunchOrder",
    "sandbox.contracts.placement:CancelOrder|sandbox.contracts.placement:TerminalOrder": (
        "sandbox.interfaces.placement:CancelOrder|sandbox.interfaces.placement:TerminalOrder"
    ),
    "sandbox.contracts.placement:Receipt": "sandbox.interfaces.placement:Reply",
    "sandbox.access.token_file:_Document": "sandbox.auth.token_file:_TokenDocument",
    "sandbox.profiles.record:ImageRecord": "sandbox.images.image_store:ImageMetadata",
    "sandbox.wiring.backup:BackupManifest": "sandbox.bootstrap.backup.create:BackupManifest",
    "sandbox.api.cursor:Bookmark": "sandbox.api.cursor:PageCursor",
}
MSGPACK_TYPES = {
    "sandbox.contracts.terminals:Shown|sandbox.contracts.terminals:Role|sandbox.contracts.terminals:Ended": (
        "sandbox.interfaces.terminals:OutputFrame|sandbox.interfaces.terminals:RoleFrame"
        "|sandbox.interfaces.terminals:EndFrame"
    ),
    "sandbox.contracts.terminals:Typed|sandbox.contracts.terminals:Resized": (
        "sandbox.interfaces.terminals:InputFrame|sandbox.interfaces.terminals:ResizeFrame"
    ),
}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    reason = missing_reason(OLD_COMMIT)
    if reason is not None:
        pytest.skip(f"the history of this copy does not have the old version: {reason}")
    return OldVersion(tmp_path_factory.mktemp("old"), OLD_COMMIT)


@pytest.mark.parametrize(("kind", "types"), [("json", JSON_TYPES), ("msgpack", MSGPACK_TYPES)], ids=["json", "msgpack"])
def test_both_versions_write_the_same_and_read_it(old, kind, types):
    of_old = json.loads(old.run(wire_samples.__file__, kind, *types))
    of_new = wire_samples.encoded_samples(types.values(), kind)
    for old_name, new_name in types.items():
        assert of_new[new_name], new_name
        assert of_old[old_name] == of_new[new_name], new_name


@pytest.fixture
def machine(empty_world):
    """Nothing but its server has been started."""
    make_repository(empty_world.repositories / "repo.git", {"README.md": "# A repository\n"})
    configuration = empty_world.home / ".config" / "sandbox" / "sandbox.toml"
    configuration.parent.mkdir(parents=True)
    configuration.write_text(SETTINGS)
    empty_world.start_git()
    empty_world.start_model(branches=SCRIPTS)
    return empty_world


@pytest.fixture
def person(machine):
    """Makes people at terminals; all leave at the end."""
    with contextlib.ExitStack() as people:

        def make(*arguments):
            server = machine.server.said["http"]
            return people.enter_context(Person(*arguments, "--token", machine.bearer, server=server))

        yield make


@pytest.mark.timeout(300)
def test_a_new_server_takes_over_the_tasks_of_an_old_one(machine, old, person):
    machine.bearer = old_command(machine, old, "token", "create", "--role", "operator", "--name", "old")["token"]
    configured = [old_command(machine, old, *words) for words in (("token", "list"), ("config", "show"))]
    run_the_old_server(machine, old)
    before, followed = told(machine), follow_to_running(machine)
    runners = {name: runner_pid(machine, name) for name in (*WAITING, "talk")}
    machine.server.stop(signal.SIGTERM)
    assert all(b"sandbox.wiring.runner" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in runners.values())
    runners_are_killed(machine)

    machine.start_server()
    assert told(machine) == before
    assert [new_command(machine, *words) for words in (("token", "list"), ("config", "show"))] == configured
    assert {name: runner_pid(machine, name) for name in ("run", "cancel", "talk")}.items() <= runners.items()
    a_running_task_is_followed_to_its_end(machine, person, followed)
    a_running_task_is_cancelled(machine)
    a_person_talks_to_a_waiting_agent(machine, person)
    a_preserved_sandbox_is_visited_and_released(machine, person)
    lost_tasks_are_ended_or_resumed(machine)
    until(lambda: not left_behind(machine.data_dir), 20, "nothing to be left of any task")
    found = new_command(machine, "admin", "check", "--deep")
    assert found == {"clean": True, "tasks": len(SCRIPTS), "findings": []}
    an_old_client_is_told_the_same(machine, old)


def variables(machine):
    """Of the command line, whichever version."""
    said = machine.server.said if machine.server is not None else {"http": ""}
    return {
        "PATH": os.environ["PATH"], "HOME": str(machine.home), "SANDBOX_DATA_DIR": str(machine.data_dir),
        "SANDBOX_SERVER": said["http"], "SANDBOX_TOKEN": machine.bearer or "",
    }  # fmt: skip


def old_command(machine, old, *words):
    return json.loads(old.run("-m", "sandbox", *words, "--format", "json", **variables(machine)))


def new_command(machine, *words):
    command = [sys.executable, "-m", "sandbox", *words, "--format", "json"]
    done = subprocess.run(command, env=variables(machine), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return json.loads(done.stdout)


def run_the_old_server(machine, old):
    """Until one task is finished, one preserved, and the others wait."""
    machine.start_server(python=old.python)
    for name in ("finish", "keep", *WAITING):
        submit(machine, name)
    submit(machine, "talk", headless=False)
    assert machine.wait("finish", 120)["state"] == "completed", machine.tell("finish")
    assert machine.wait("keep")["state"] == "failed_preserved", machine.tell("keep")
    for name in WAITING:
        until(lambda name=name: machine.status(name)["progress"]["current_tool"] == "Bash", 60, f"{name} to wait")
    machine.until_state("running", "talk")


def submit(machine, name, **claude):
    lifecycle = {"failure_action": "preserve"} if name == "keep" else {"resume": name == "resume"}
    machine.submit(
        name,
        claude={"prompt": f"PLAY-{name.upper()}", **claude},
        vm={"cpus": 1, "memory": "1G", "disk": "256M"},
        lifecycle={"artifact_patterns": ["out/*"], **lifecycle},
    )


def told(machine):
    """All that a server says of tasks that are over."""
    return {
        name: (
            machine.status(name),
            machine.frames(name),
            machine.logs(name),
            machine.http.get(f"/api/v1/tasks/{name}/artifacts").json(),
            {artifact: machine.artifact(artifact, name) for artifact in machine.artifact_names(name)},
        )
        for name in ("finish", "keep")
    }


def follow_to_running(machine):
    """What a follower has been told when the server stops."""
    frames = []
    with machine.http.stream("GET", "/api/v1/tasks/run/logs?follow=true") as follower:
        for frame in read_frames(follower.iter_lines()):
            frames.append(frame)
            if frame.get("new_state") == "running":
                return frames
    raise AssertionError("the stream ended")


def read_frames(lines):
    return (json.loads(line[6:]) for line in lines if line.startswith("data: "))


def runners_are_killed(machine):
    """One task is left to be finished, one to be resumed; one is over by its journal, and only what it had is there."""
    for name in KILLED:
        assert kill_lock_holder(machine.data_dir / "tasks" / name / "journal" / "lock")
        until(lambda name=name: runner_pid(machine, name) is None, what=f"the runner of {name} to be gone")
    end_books(machine.data_dir, "orphan")


def a_running_task_is_followed_to_its_end(machine, person, followed):
    resumed = {"Last-Event-ID": str(followed[-1]["seq"])}
    with machine.http.stream("GET", "/api/v1/tasks/run/logs?follow=true", headers=resumed) as follower:
        lines = follower.iter_lines()
        next(lines)
        shell = person("task", "shell", "run")
        shell.sees(r"\$ ")
        shell.types("cat lines.txt; echo > /tmp/gate; exit 7\n")
        shell.sees("line-1\r\n")
        assert shell.exit_code() == 7
        frames = [*followed, *read_frames(lines)]
    status = machine.wait("run")
    assert (status["state"], status["exit_code"], status["error"]) == ("completed", 0, None), machine.tell("run")
    assert frames == machine.frames("run")
    assert machine.states("run") == [*STATES, "completed"]
    assert not [frame for frame in frames if frame["type"] in {"gap", "error"}]
    seqs = [json.loads(line[9:])["seq"] for line in records(machine, "run").splitlines()]
    assert all(after == before + 1 for before, after in pairwise(seqs))
    assert "line-1\\nline-2" in machine.logs("run", "stdout")
    assert b"+line-1\n+line-2\n" in machine.artifact("run.patch", "run")


def a_running_task_is_cancelled(machine):
    answer = machine.http.delete("/api/v1/tasks/cancel")
    assert answer.is_success, answer.text
    assert machine.wait("cancel")["state"] == "cancelled", machine.tell("cancel")
    assert b"+begun\n" in machine.artifact("cancel.patch", "cancel")


def a_person_talks_to_a_waiting_agent(machine, person):
    one = person("task", "attach", "talk")
    one.sees("GOODDAY")
    one.types_until_shown("more")
    one.types("\r")
    one.sees("WELLCOME")
    one.types("/exit")
    one.types("\r")
    assert one.exit_code() == 0
    status = machine.wait("talk")
    assert (status["state"], status["error"]) == ("completed", None), machine.tell("talk")


def a_preserved_sandbox_is_visited_and_released(machine, person):
    shell = person("task", "shell", "keep")
    shell.sees(r"\$ ")
    shell.types("cat preserved.txt; exit 3\n")
    shell.sees("preserved\r\n")
    assert shell.exit_code() == 3
    until(lambda: machine.http.delete("/api/v1/tasks/keep/vm").is_success, what="the release")
    assert machine.status("keep")["state"] == "failed_preserved"


def lost_tasks_are_ended_or_resumed(machine):
    assert machine.wait("lose")["error"]["code"] == "runner_lost"
    assert b"+lost\n" in machine.artifact("lose.patch", "lose")
    assert machine.status("orphan")["error"]["code"] == "runner_lost"
    status = machine.wait("resume")
    assert (status["state"], status["result"]["result"]) == ("completed", "Both."), machine.tell("resume")
    assert [one["followed_by"] for one in status["attempts"]] == ["resume", None]
    patch = machine.artifact("resume.patch", "resume")
    assert b"+first\n" in patch
    assert b"+second\n" in patch


def an_old_client_is_told_the_same(machine, old):
    for words in (("task", "list"), ("task", "status", "run")):
        assert old_command(machine, old, *words) == new_command(machine, *words)
