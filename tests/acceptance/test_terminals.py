"""A person in a task's sandbox: a shell beside the agent, the agent's own terminal, a look at what a failure left."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from doubles.live_server import bash, says, until
from doubles.terminal_user import Person
from sandbox.demo.model_script import Fault, Turn

WAITS = "mkfifo /tmp/gate && read _ < /tmp/gate"


@pytest.fixture
def person(world):
    """Makes people at terminals; all leave at the end."""
    people = []

    def make(server, *arguments, **window):
        people.append(Person(*arguments, server=server, **window))
        return people[-1]

    yield make
    for one in people:
        one.leave()


def test_people_beside_an_agent_see_what_it_does_and_leave_it_alone(world, person):
    made = world(bash(f"echo of-the-agent > note.txt; {WAITS}; cat answer.txt"), says())
    made.submit()
    made.until_state("running")
    until(lambda: made.status()["progress"]["current_tool"] == "Bash", what="the agent at work")
    server = made.server.said["http"]
    a_page_of_another_site_gets_no_terminal(server)
    what_cannot_be_opened_is_told(person(server, "task", "attach", "task-1"), "headless", 4)
    what_cannot_be_opened_is_told(person(server, "task", "shell", "no-such-task"), "no task 'no-such-task'", 3)
    detach_keys_end_a_shell(person(server, "task", "shell", "task-1", "--detach-keys", "ctrl-a,d"))
    one = person(server, "task", "shell", "task-1")
    a_shell_is_beside_the_agent(one)
    one.types("echo from-the-person > answer.txt; echo > /tmp/gate; exit 7\n")
    assert one.exit_code() == 7
    assert made.wait()["state"] == "completed", made.tell()
    assert "from-the-person" in made.tool_results()[0]
    what_cannot_be_opened_is_told(person(server, "task", "shell", "task-1"), "completed", 4)


def a_page_of_another_site_gets_no_terminal(server):
    address = f"ws{server[4:]}/api/v1/tasks/task-1/terminal"
    with pytest.raises(InvalidStatus) as caught:
        connect(address, additional_headers={"Origin": "https://evil.example"})
    assert caught.value.response.status_code == 403
    with connect(address) as own:
        assert json.loads(own.recv()) == {"type": "role", "types": True}


def what_cannot_be_opened_is_told(one, words, code):
    one.sees(words)
    assert one.exit_code() == code


def detach_keys_end_a_shell(one):
    one.sees(r"\$ ")
    one.types("(sleep 4711 & echo be''gun; wait)\n")
    one.sees("begun")
    one.types("\x01d")
    one.sees("The shell has ended")
    assert one.exit_code() == 0


def a_shell_is_beside_the_agent(one):
    one.sees(r"\$ ")
    one.types("until ! grep -qa 4711 /proc/[0-9]*/cmdline; do sleep 0.05; done; echo it is go''ne\n")
    one.sees("it is gone")
    one.types("cat note.txt; stty size; echo key=[$ANTHROPIC_API_KEY] uid=$(id -u)\n")
    one.sees("of-the-agent")
    one.sees("30 100")
    one.sees(r"key=\[\] uid=1000")
    one.resize(50, 120)
    one.types("until [ \"$(stty size)\" = '50 120' ]; do sleep 0.05; done; echo resi''zed\n")
    one.sees("resized")
    # A program that is known to be in the foreground: bash itself lets a key go by that comes while it starts one.
    one.types("sh -c 'trap \"exit 130\" INT; echo sle''eping; while :; do sleep 0.05; done'\n")
    one.sees("sleeping")
    one.types("\x03")
    one.sees(r"\^C")
    one.sees(r"\$ ")


def test_the_agents_terminal_has_one_who_types_and_many_who_look_on(world, person):
    made = world(says("GOODDAY"), says("WELLCOME"), says("GOODBYE"))
    made.submit(claude={"prompt": "Say good day.", "headless": False})
    made.until_state("running")
    server = made.server.said["http"]
    first = person(server, "task", "attach", "task-1")
    first.sees("GOODDAY")
    second = person(server, "task", "attach", "task-1")
    second.sees("look on")
    second.sees("GOODDAY")
    second.types("this is not for you\r")
    first.types("mine?")
    first.sees("mine")
    first.types("\r")
    first.sees("WELLCOME")
    second.sees("WELLCOME")
    first.types("\x10\x11")
    first.sees("The agent goes on")
    assert first.exit_code() == 0
    second.types_until_shown("isee")
    second.types("\r")
    second.sees("GOODBYE")
    second.types("/exit")
    second.types("\r")
    assert second.exit_code() == 0
    status = made.wait()
    assert (status["state"], status["exit_code"], status["error"]) == ("completed", 0, None), made.tell()
    asked = [request["body"] for request in made.model_requests() if request["method"] == "POST"]
    assert "Say good day." in asked[0]
    assert not any("this is not for you" in body for body in asked)
    assert "GOODDAY" in made.logs(stream="stdout")
    assert made.status()["progress"]["output_tokens"] > 0


VALUE = "a-value-that-nobody-may-see"


@pytest.fixture
def preserved(world, tmp_path):
    """A task that failed, whose agent wrote its secret into a file; gives the machine and the secret's file."""
    value = tmp_path / "secrets" / "deploy-key"
    value.parent.mkdir()
    value.write_text(VALUE)
    made = world(
        bash("echo kept > kept.txt; ln kept.txt kept-too.txt; echo $DEPLOY_KEY > key.txt"),
        Turn(faults=(Fault("error", status=400, times=9),)),
        environment={"SANDBOX_SECRETS_DIRECTORY": str(value.parent)},
    )
    made.submit(
        lifecycle={"failure_action": "preserve"},
        secrets=[{"name": "DEPLOY_KEY", "source": "file", "key": "deploy-key"}],
    )
    assert made.wait()["state"] == "failed_preserved", made.tell()
    return made, value


def test_what_a_failure_left_is_visited_as_often_as_people_like_until_it_is_released(preserved, person):
    made, value = preserved
    server = made.server.said["http"]
    it_is_shown_to_nobody_while_its_secrets_cannot_be_redacted(server, value, person)
    one, other = person(server, "task", "shell", "task-1"), person(server, "task", "shell", "task-1")
    one.sees(r"\$ ")
    other.sees(r"\$ ")
    one.types("cat key.txt; echo se''en\n")
    shown = one.sees(r"en\r\n([\s\S]*)seen").group(1)
    assert VALUE.encode() not in shown
    assert b"DEPLOY_KEY" in shown
    one.types("cat kept.txt; touch /tmp/met; (: < /dev/tcp/127.0.0.1/8123) || echo no mo''del\n")
    one.sees("kept")
    one.sees("no model")
    other.types("until [ -e /tmp/met ]; do sleep 0.05; done; echo m''et; echo more > more.txt; exit 3\n")
    other.sees("met")
    assert other.exit_code() == 3
    refused = made.http.delete("/api/v1/tasks/task-1/vm")
    assert (refused.status_code, refused.json()["error"]) == (503, "service_unavailable")
    its_runner_is_killed(made)
    assert one.exit_code() == 10
    late = person(server, "task", "shell", "task-1")
    late.sees(r"\$ ")
    late.types("cat more.txt; exit 0\n")
    late.sees("more\r\n")
    assert late.exit_code() == 0
    released = until(lambda: made.http.delete("/api/v1/tasks/task-1/vm").status_code in {200, 404}, what="the release")
    assert released
    assert made.status()["state"] == "failed_preserved"
    what_cannot_be_opened_is_told(person(server, "task", "shell", "task-1"), "it was released", 4)


def it_is_shown_to_nobody_while_its_secrets_cannot_be_redacted(server, value, person):
    value.unlink()
    refused = person(server, "task", "shell", "task-1")
    refused.sees("could not be redacted")
    refused.sees("DEPLOY_KEY")
    assert refused.exit_code() == 10
    value.write_text("another-value-since-then")
    what_cannot_be_opened_is_told(person(server, "task", "shell", "task-1"), "could not be redacted", 10)
    value.write_text(VALUE)


def its_runner_is_killed(made):
    [lock] = made.data_dir.glob("tasks/task-1/attempts/*/visit.lock")
    for runner in holders(lock):
        os.kill(runner, signal.SIGKILL)


def holders(file):
    """Processes that have it open, runners of this test's and nobody else's."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if descriptor.readlink() == file:
                found.add(int(descriptor.parts[2]))
    assert found
    return found
