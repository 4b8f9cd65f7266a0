"""Terminals in a task's sandbox: a shell, the agent's terminal, and a shell in a preserved sandbox."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from doubles.deployment import bash_turn, reply_turn, wait_until
from doubles.terminal_user import TerminalUser
from sandbox.demo.scripted_model import Fault, Turn

WAIT_FOR_FIFO = "mkfifo /tmp/gate && read _ < /tmp/gate"


@pytest.fixture
def open_terminal(deploy):
    """Opens terminals; all are closed at the end."""
    terminals = []

    def make(server, *arguments, **window):
        terminals.append(TerminalUser(*arguments, server=server, **window))
        return terminals[-1]

    yield make
    for terminal in terminals:
        terminal.close()


def test_shell_shares_the_sandbox_without_disturbing_the_agent(deploy, open_terminal):
    deployment = deploy(bash_turn(f"echo of-the-agent > note.txt; {WAIT_FOR_FIFO}; cat answer.txt"), reply_turn())
    deployment.submit()
    deployment.wait_for_state("running")
    wait_until(lambda: deployment.status()["progress"]["current_tool"] == "Bash", description="the tool call")
    server = deployment.server.ready_message["http"]
    check_cross_origin_terminal_is_rejected(server)
    check_terminal_is_refused(open_terminal(server, "task", "attach", "task-1"), "headless", 4)
    check_terminal_is_refused(open_terminal(server, "task", "attach", "task-1"), "sandbox task shell task-1", 4)
    check_terminal_is_refused(open_terminal(server, "task", "shell", "no-such-task"), "no task 'no-such-task'", 3)
    check_detach_keys(open_terminal(server, "task", "shell", "task-1", "--detach-keys", "ctrl-a,d"))
    terminal = open_terminal(server, "task", "shell", "task-1")
    check_shell_session(terminal)
    terminal.type("echo from-the-user > answer.txt; echo > /tmp/gate; exit 7\n")
    assert terminal.exit_code() == 7
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    assert "from-the-user" in deployment.tool_results()[0]
    check_terminal_is_refused(open_terminal(server, "task", "shell", "task-1"), "completed", 4)


def check_cross_origin_terminal_is_rejected(server):
    address = f"ws{server[4:]}/api/v1/tasks/task-1/terminal"
    with pytest.raises(InvalidStatus) as caught:
        connect(address, additional_headers={"Origin": "https://evil.example"})
    assert caught.value.response.status_code == 403
    with connect(address) as own:
        assert json.loads(own.recv()) == {"type": "role", "types": True}


def check_terminal_is_refused(terminal, text, code):
    terminal.expect(text)
    assert terminal.exit_code() == code


def check_detach_keys(terminal):
    terminal.expect(r"\$ ")
    terminal.type("(sleep 4711 & echo be''gun; wait)\n")
    terminal.expect("begun")
    terminal.type("\x01d")
    terminal.expect("The shell has ended")
    assert terminal.exit_code() == 0


def check_shell_session(terminal):
    terminal.expect(r"\$ ")
    terminal.type("until ! grep -qa 4711 /proc/[0-9]*/cmdline; do sleep 0.05; done; echo it is go''ne\n")
    terminal.expect("it is gone")
    terminal.type("cat note.txt; stty size; echo key=[$ANTHROPIC_API_KEY] uid=$(id -u)\n")
    terminal.expect("of-the-agent")
    terminal.expect("30 100")
    terminal.expect(r"key=\[\] uid=1000")
    terminal.resize(50, 120)
    terminal.type("until [ \"$(stty size)\" = '50 120' ]; do sleep 0.05; done; echo resi''zed\n")
    terminal.expect("resized")
    # Wait until the program runs in the foreground: bash ignores Ctrl-C while it starts a program.
    terminal.type("sh -c 'trap \"exit 130\" INT; echo sle''eping; while :; do sleep 0.05; done'\n")
    terminal.expect("sleeping")
    terminal.type("\x03")
    terminal.expect(r"\^C")
    terminal.expect(r"\$ ")


def test_agent_terminal_has_one_writer_and_many_viewers(deploy, open_terminal):
    deployment = deploy(reply_turn("GOODDAY"), reply_turn("WELLCOME"), reply_turn("GOODBYE"))
    deployment.submit(claude={"prompt": "Say good day.", "headless": False})
    server = deployment.server.ready_message["http"]
    first = open_terminal(server, "task", "attach", "task-1")  # waits until the agent starts
    first.expect("Detach: Ctrl-P Ctrl-Q")
    first.expect("GOODDAY")
    second = open_terminal(server, "task", "attach", "task-1")
    second.expect("Read-only")
    second.expect("GOODDAY")
    second.type("this is not for you\r")
    first.type("mine?")
    first.expect("mine")
    first.type("\r")
    first.expect("WELLCOME")
    second.expect("WELLCOME")
    first.type("\x10\x11")
    first.expect("The agent continues")
    assert first.exit_code() == 0
    second.type_until_echoed("isee")
    second.type("\r")
    second.expect("GOODBYE")
    second.type("/exit")
    second.type("\r")
    second.expect("The agent ended; task task-1 completed.")
    second.expect("sandbox task logs task-1")
    assert second.exit_code() == 0
    status = deployment.wait()
    assert (status["state"], status["exit_code"], status["error"]) == ("completed", 0, None), deployment.diagnostics()
    bodies = [request["body"] for request in deployment.model_requests() if request["method"] == "POST"]
    assert "Say good day." in bodies[0]
    assert not any("this is not for you" in body for body in bodies)
    assert "GOODDAY" in deployment.logs(stream="stdout")
    assert deployment.status()["progress"]["output_tokens"] > 0


VALUE = "a-value-that-nobody-may-see"


@pytest.fixture
def server_with_preserved_task(deploy, tmp_path):
    """A failed task whose agent has written its secret to a file; returns the deployment and the path of the file."""
    value = tmp_path / "secrets" / "deploy-key"
    value.parent.mkdir()
    value.write_text(VALUE)
    deployment = deploy(
        bash_turn("echo kept > kept.txt; ln kept.txt kept-too.txt; echo $DEPLOY_KEY > key.txt"),
        Turn(faults=(Fault("error", status=400, times=9),)),
        environment={"SANDBOX_SECRETS_DIRECTORY": str(value.parent)},
    )
    deployment.submit(
        lifecycle={"failure_action": "preserve"},
        secrets=[{"name": "DEPLOY_KEY", "source": "file", "key": "deploy-key"}],
    )
    assert deployment.wait()["state"] == "failed_preserved", deployment.diagnostics()
    return deployment, value


def test_shell_opens_in_a_preserved_sandbox_until_it_is_released(server_with_preserved_task, open_terminal):
    deployment, value = server_with_preserved_task
    server = deployment.server.ready_message["http"]
    check_refused_without_redaction(server, value, open_terminal)
    terminal, other = open_terminal(server, "task", "shell", "task-1"), open_terminal(server, "task", "shell", "task-1")
    terminal.expect(r"\$ ")
    other.expect(r"\$ ")
    terminal.type("cat key.txt; echo se''en\n")
    output = terminal.expect(r"en\r\n([\s\S]*)seen").group(1)
    assert VALUE.encode() not in output
    assert b"DEPLOY_KEY" in output
    terminal.type("cat kept.txt; touch /tmp/met; (: < /dev/tcp/127.0.0.1/8123) || echo no mo''del\n")
    terminal.expect("kept")
    terminal.expect("no model")
    other.type("until [ -e /tmp/met ]; do sleep 0.05; done; echo m''et; echo more > more.txt; exit 3\n")
    other.expect("met")
    assert other.exit_code() == 3
    rejected = deployment.http.delete("/api/v1/tasks/task-1/vm")
    assert (rejected.status_code, rejected.json()["error"]) == (503, "service_unavailable")
    kill_session_runner(deployment)
    assert terminal.exit_code() == 10
    late_terminal = open_terminal(server, "task", "shell", "task-1")
    late_terminal.expect(r"\$ ")
    late_terminal.type("cat more.txt; exit 0\n")
    late_terminal.expect("more\r\n")
    assert late_terminal.exit_code() == 0
    released = wait_until(
        lambda: deployment.http.delete("/api/v1/tasks/task-1/vm").status_code in {200, 404}, description="the release"
    )
    assert released
    assert deployment.status()["state"] == "failed_preserved"
    check_terminal_is_refused(open_terminal(server, "task", "shell", "task-1"), "it was released", 4)


def check_refused_without_redaction(server, value, open_terminal):
    value.unlink()
    rejected = open_terminal(server, "task", "shell", "task-1")
    rejected.expect("could not be redacted")
    rejected.expect("DEPLOY_KEY")
    assert rejected.exit_code() == 10
    value.write_text("another-value-since-then")
    check_terminal_is_refused(open_terminal(server, "task", "shell", "task-1"), "could not be redacted", 10)
    value.write_text(VALUE)


def kill_session_runner(deployment):
    [lock] = deployment.data_dir.glob("tasks/task-1/attempts/*/visit.lock")
    for runner in processes_with_open_file(lock):
        os.kill(runner, signal.SIGKILL)


def processes_with_open_file(file):
    """Return the processes that have the file open."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if descriptor.readlink() == file:
                found.add(int(descriptor.parts[2]))
    assert found
    return found
