"""A server is replaced by a newer version while its tasks run.

The old version is OLD_COMMIT, from before most modules were renamed. Its runners continue when its server stops; the
new server follows their tasks, cancels them, attaches to them and cleans up after them. Both versions must use the same
formats for data that one of them writes and the other reads.
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
from doubles.deployment import bash_turn, make_repository, reply_turn, wait_until
from doubles.leftovers import find_leftovers
from doubles.old_version import OldVersion, lock_retired_uids, missing_reason
from doubles.runner_processes import finalize_journal, read_journal, runner_pid
from doubles.terminal_user import TerminalUser
from sandbox.demo.scripted_model import Fault, Turn
from sandbox.placements.local.placement import kill_lock_holder

OLD_COMMIT = "087898174e4eb7f8436a4b28756aadbbe9c04233"
SETTINGS = """[git]
allowed_hosts = ["github.com"]

[retention]
older_than = "60d"
"""
WAIT_FOR_FIFO = "mkfifo /tmp/gate && read _ < /tmp/gate"
# There are two turns, because Claude Code adds a response itself if the session already contains the interrupted tool
# call. That response counts as the first turn.
RESUMED_TURNS = (bash_turn("cat first.txt; echo second > second.txt"),) * 2
SCRIPTS = {
    "PLAY-FINISH": (
        bash_turn("mkdir out && echo kept > out/kept.txt && echo finished > finished.txt"),
        reply_turn("Finished."),
    ),
    "PLAY-KEEP": (bash_turn("echo preserved > preserved.txt"), Turn(faults=(Fault("error", status=400, times=99),))),
    "PLAY-RUN": (
        bash_turn(f"echo line-1 > lines.txt; {WAIT_FOR_FIFO}; echo line-2 >> lines.txt; cat lines.txt"),
        reply_turn("Finished."),
    ),
    "PLAY-CANCEL": (bash_turn(f"echo begun > begun.txt; {WAIT_FOR_FIFO}"), reply_turn("Finished.")),
    "PLAY-LOSE": (bash_turn(f"echo lost > lost.txt; {WAIT_FOR_FIFO}"), reply_turn("Finished.")),
    "PLAY-ORPHAN": (bash_turn(WAIT_FOR_FIFO), reply_turn("Finished.")),
    "PLAY-RESUME": (bash_turn(f"echo first > first.txt; {WAIT_FOR_FIFO}"), *RESUMED_TURNS, reply_turn("Both.")),
    "PLAY-TALK": (reply_turn("GOODDAY"), reply_turn("WELLCOME")),
}
KILLED_TASKS = ("lose", "orphan", "resume")
WAITING_TASKS = ("run", "cancel", *KILLED_TASKS)
"""Tasks whose agents wait in a shell command."""

STATES = ["pending", "staging", "provisioning", "ready", "running", "completing"]

# Types of the old version that are sent to another process or stored in a file, and their current counterparts.
JSON_TYPES = {
    "sandbox.model.event:Record": "sandbox.model.events:Record",
    "sandbox.model.task:Task": "sandbox.model.task:Task",
    "sandbox.contracts.runtime:SandboxHandle": "sandbox.interfaces.runtime:SandboxHandle",
    "sandbox.contracts.placement:LaunchOrder": "sandbox.placements.local.runner_starters:LegacyLaunchMessage",
    "sandbox.contracts.placement:CancelOrder|sandbox.contracts.placement:TerminalOrder": (
        "sandbox.interfaces.runner:CancelAttempt|sandbox.interfaces.runner:OpenTerminal"
    ),
    "sandbox.contracts.placement:Receipt": "sandbox.interfaces.runner:Reply",
    "sandbox.access.token_file:_Document": "sandbox.access_tokens.token_file:_TokenDocument",
    "sandbox.profiles.record:ImageRecord": "sandbox.images.image_store:ImageMetadata",
    "sandbox.wiring.backup:BackupManifest": "sandbox.bootstrap.data_dir_backup:BackupManifest",
    "sandbox.api.cursor:Bookmark": "sandbox.api.routes.tasks:PageCursor",
}
ADDED_STATUS_FIELDS = {
    *("repository", "branch", "diff", "duration_seconds", "parent", "continues", "rerun_of", "chain", "final_message"),
    *("base_commit", "cancel", "links", "host", "job", "prompt_beginning"),
}
ADDED_SETTINGS = {"cluster"}
EXTENDED_TYPES = {
    *("sandbox.model.events:Record", "sandbox.model.task:Task"),
    "sandbox.api.routes.tasks:PageCursor",
}
"""Types with additional fields, events or values. The new version reads what the old one writes, but not vice versa."""

MSGPACK_TYPES = {
    "sandbox.contracts.terminals:Shown|sandbox.contracts.terminals:Role|sandbox.contracts.terminals:Ended": (
        "sandbox.interfaces.runner:OutputFrame|sandbox.interfaces.runner:WriteAccessFrame"
        "|sandbox.interfaces.runner:EndFrame"
    ),
    "sandbox.contracts.terminals:Typed|sandbox.contracts.terminals:Resized": (
        "sandbox.interfaces.runner:InputFrame|sandbox.interfaces.runner:ResizeFrame"
    ),
}


@pytest.fixture(scope="module")
def old_version(tmp_path_factory):
    reason = missing_reason(OLD_COMMIT)
    if reason is not None:
        pytest.skip(f"the history of this copy does not contain the old version: {reason}")
    with lock_retired_uids():
        yield OldVersion(tmp_path_factory.mktemp("old"), OLD_COMMIT)


@pytest.mark.parametrize(("kind", "types"), [("json", JSON_TYPES), ("msgpack", MSGPACK_TYPES)], ids=["json", "msgpack"])
def test_both_versions_encode_types_identically(old_version, kind, types):
    old_samples = json.loads(old_version.run(wire_samples.__file__, kind, *types))
    new_samples = wire_samples.encoded_samples(types.values(), kind)
    for old_name, new_name in types.items():
        assert new_samples[new_name], new_name
        if new_name in EXTENDED_TYPES:
            assert wire_samples.keeps_all_fields(old_samples[old_name], new_name, kind), new_name
        else:
            assert old_samples[old_name] == new_samples[new_name], new_name


@pytest.fixture
def deployment(deployment):
    """A deployment in which everything except the server is running."""
    make_repository(deployment.repositories / "repo.git", {"README.md": "# A repository\n"})
    configuration = deployment.home / ".config" / "sandbox" / "sandbox.toml"
    configuration.parent.mkdir(parents=True)
    configuration.write_text(SETTINGS)
    deployment.start_git()
    deployment.start_model(branches=SCRIPTS)
    return deployment


@pytest.fixture
def open_terminal(deployment):
    """Opens terminals; all are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(*arguments):
            server = deployment.server.ready_message["http"]
            return stack.enter_context(TerminalUser(*arguments, "--token", deployment.bearer, server=server))

        yield make


@pytest.mark.timeout(300)
def test_new_server_takes_over_tasks_of_the_old_version(deployment, old_version, open_terminal):
    deployment.bearer = old_command(deployment, old_version, "token", "create", "--role", "operator", "--name", "old")[
        "token"
    ]
    configured = [
        old_command(deployment, old_version, *command_words)
        for command_words in (("token", "list"), ("config", "show"))
    ]
    run_old_server(deployment, old_version)
    before, received = finished_tasks(deployment), follow_to_running(deployment)
    runners = {name: runner_pid(deployment, name) for name in (*WAITING_TASKS, "talk")}
    deployment.server.stop(signal.SIGTERM)
    assert all(b"sandbox.wiring.runner" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in runners.values())
    kill_runners(deployment)

    deployment.start_server()
    assert finished_tasks(deployment) == before
    tokens, settings = (new_command(deployment, *words) for words in (("token", "list"), ("config", "show")))
    assert [tokens, {name: settings[name] for name in settings if name not in ADDED_SETTINGS}] == configured
    assert {name: runner_pid(deployment, name) for name in ("run", "cancel", "talk")}.items() <= runners.items()
    check_running_task_completes(deployment, open_terminal, received)
    check_running_task_is_cancelled(deployment)
    check_interactive_session(deployment, open_terminal)
    check_preserved_sandbox(deployment, open_terminal)
    check_lost_tasks(deployment)
    wait_until(lambda: not find_leftovers(deployment.data_dir), 20, "the removal of all sandboxes")
    found = new_command(deployment, "admin", "check", "--deep")
    assert found == {"clean": True, "tasks": len(SCRIPTS), "findings": []}
    check_old_client(deployment, old_version)


def cli_environment(deployment):
    """Return the environment of the command line, for both versions."""
    ready = deployment.server.ready_message if deployment.server is not None else {"http": ""}
    return {
        "PATH": os.environ["PATH"], "HOME": str(deployment.home), "SANDBOX_DATA_DIR": str(deployment.data_dir),
        "SANDBOX_SERVER": ready["http"], "SANDBOX_TOKEN": deployment.bearer or "",
    }  # fmt: skip


def old_command(deployment, old_version, *command_words):
    return json.loads(
        old_version.run("-m", "sandbox", *command_words, "--format", "json", **cli_environment(deployment))
    )


def new_command(deployment, *command_words):
    command = [sys.executable, "-m", "sandbox", *command_words, "--format", "json"]
    done = subprocess.run(command, env=cli_environment(deployment), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return json.loads(done.stdout)


def run_old_server(deployment, old_version):
    """Start the old server; wait until one task is finished, one is preserved, and the other agents wait for input."""
    deployment.start_server(python=old_version.python)
    for name in ("finish", "keep", *WAITING_TASKS):
        submit(deployment, name)
    submit(deployment, "talk", headless=False)
    assert deployment.wait("finish", 120)["state"] == "completed", deployment.diagnostics("finish")
    assert deployment.wait("keep")["state"] == "failed_preserved", deployment.diagnostics("keep")
    for name in WAITING_TASKS:
        wait_until(
            lambda name=name: deployment.status(name)["progress"]["current_tool"] == "Bash", 60, f"{name} to wait"
        )
    deployment.wait_for_state("running", "talk")


def submit(deployment, name, **claude):
    lifecycle = {"failure_action": "preserve"} if name == "keep" else {"resume": name == "resume"}
    deployment.submit(
        name,
        claude={"prompt": f"PLAY-{name.upper()}", **claude},
        vm={"cpus": 1, "memory": "1G", "disk": "256M"},
        lifecycle={"artifact_patterns": ["out/*"], **lifecycle},
    )


def finished_tasks(deployment):
    """Return everything that a server reports about finished tasks, except the text that describes their isolation."""
    return {
        name: (
            status_without_additions(deployment, name),
            without_additions(deployment.wire_events(name)),
            [line for line in deployment.logs(name).splitlines() if '"type":"conversation"' not in line],
            deployment.http.get(f"/api/v1/tasks/{name}/artifacts").json(),
            {artifact: deployment.artifact(artifact, name) for artifact in deployment.artifact_names(name)},
        )
        for name in ("finish", "keep")
    }


def without_added_keys(error):
    """Return an error without the keys that old servers do not send."""
    return {key: error[key] for key in error if key not in {"reason", "remedy"}}


def without_additions(events):
    """Return the events without the fields that the new server adds to the output of old runners."""
    for event in events:
        if event["type"] == "end" and event["error"] is not None:
            event["error"] = without_added_keys(event["error"])
    return [{key: event[key] for key in event if key not in {"parsed", "conversation"}} for event in events]


def status_without_additions(deployment, name):
    """Return the status without the isolation's description and without the fields that old servers do not send."""
    status = deployment.status(name)
    del status["vm"]["isolates"]
    status["progress"].pop("current_subject", None)
    for failed in (status, *status["attempts"]):
        if failed["error"] is not None:
            failed["error"] = without_added_keys(failed["error"])
    return {key: status[key] for key in status if key not in ADDED_STATUS_FIELDS}


def follow_to_running(deployment):
    """Follow the task `run` until it is running; return the received events."""
    events = []
    with deployment.http.stream("GET", "/api/v1/tasks/run/logs?follow=true") as follower:
        for event in read_events(follower.iter_lines()):
            events.append(event)
            if event.get("new_state") == "running":
                return events
    raise AssertionError("the stream ended")


def read_events(lines):
    return (json.loads(line[6:]) for line in lines if line.startswith("data: "))


def kill_runners(deployment):
    """Kill three runners. The new server must finalize one task, resume another, and clean up after the third."""
    for name in KILLED_TASKS:
        assert kill_lock_holder(deployment.data_dir / "tasks" / name / "journal" / "lock")
        wait_until(lambda name=name: runner_pid(deployment, name) is None, description=f"the runner of {name} to end")
    finalize_journal(deployment.data_dir, "orphan")


def check_running_task_completes(deployment, open_terminal, received):
    resumed = {"Last-Event-ID": str(received[-1]["seq"])}
    with deployment.http.stream("GET", "/api/v1/tasks/run/logs?follow=true", headers=resumed) as follower:
        lines = follower.iter_lines()
        next(lines)
        shell = open_terminal("task", "shell", "run")
        shell.expect(r"\$ ")
        shell.type("cat lines.txt; echo > /tmp/gate; exit 7\n")
        shell.expect("line-1\r\n")
        assert shell.exit_code() == 7
        events = [*received, *read_events(lines)]
    status = deployment.wait("run")
    assert (status["state"], status["exit_code"], status["error"]) == ("completed", 0, None), deployment.diagnostics(
        "run"
    )
    assert without_additions(events) == without_additions(deployment.wire_events("run"))
    assert deployment.states("run") == [*STATES, "completed"]
    assert not [event for event in events if event["type"] in {"gap", "error"}]
    seqs = [json.loads(line[9:])["seq"] for line in read_journal(deployment, "run").splitlines()]
    assert all(after == before + 1 for before, after in pairwise(seqs))
    assert "line-1\\nline-2" in deployment.logs("run", "stdout")
    assert b"+line-1\n+line-2\n" in deployment.artifact("run.patch", "run")


def check_running_task_is_cancelled(deployment):
    response = deployment.http.delete("/api/v1/tasks/cancel")
    assert response.is_success, response.text
    assert deployment.wait("cancel")["state"] == "cancelled", deployment.diagnostics("cancel")
    assert b"+begun\n" in deployment.artifact("cancel.patch", "cancel")


def check_interactive_session(deployment, open_terminal):
    terminal = open_terminal("task", "attach", "talk")
    terminal.expect("GOODDAY")
    terminal.type_until_echoed("more")
    terminal.type("\r")
    terminal.expect("WELLCOME")
    terminal.type("/exit")
    terminal.type("\r")
    assert terminal.exit_code() == 0
    status = deployment.wait("talk")
    assert (status["state"], status["error"]) == ("completed", None), deployment.diagnostics("talk")


def check_preserved_sandbox(deployment, open_terminal):
    shell = open_terminal("task", "shell", "keep")
    shell.expect(r"\$ ")
    shell.type("cat preserved.txt; exit 3\n")
    shell.expect("preserved\r\n")
    assert shell.exit_code() == 3
    wait_until(lambda: deployment.http.delete("/api/v1/tasks/keep/vm").is_success, description="the release")
    assert deployment.status("keep")["state"] == "failed_preserved"


def check_lost_tasks(deployment):
    assert deployment.wait("lose")["error"]["code"] == "runner_lost"
    assert b"+lost\n" in deployment.artifact("lose.patch", "lose")
    assert deployment.status("orphan")["error"]["code"] == "runner_lost"
    status = deployment.wait("resume")
    assert (status["state"], status["result"]["result"]) == ("completed", "Both."), deployment.diagnostics("resume")
    assert [attempt["followed_by"] for attempt in status["attempts"]] == ["resume", None]
    patch = deployment.artifact("resume.patch", "resume")
    assert b"+first\n" in patch
    assert b"+second\n" in patch


def check_old_client(deployment, old_version):
    for command_words in (("task", "list"), ("task", "status", "run")):
        assert old_command(deployment, old_version, *command_words) == new_command(deployment, *command_words)
