"""The Python client against the real server: its page's examples, and a server that dies beneath its iterators."""

import asyncio
import re
import signal
import threading
from pathlib import Path

import pytest

from doubles.live_server import bash, says, until
from sandbox.client import (
    AsyncClient,
    Client,
    DuplicateTaskIdError,
    InsufficientResourcesError,
    InvalidManifestError,
    InvalidParameterError,
    TaskAlreadyTerminalError,
    TaskNotFoundError,
)

PAGE = (Path(__file__).parents[2] / "docs" / "python-client.md").read_text()

MANIFEST = """\
version: "1"
kind: Task
metadata: {name: "My Task"}
repository: {url: "https://github.com/org/repo.git", branch: "main"}
claude: {prompt: "Do it."}
"""


def test_the_examples_of_the_page_do_what_they_say(world, tmp_path, monkeypatch, capsys):
    machine = world(bash("echo mended > mended.txt"), says())
    monkeypatch.setenv("SANDBOX_SERVER", machine.server.said["http"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text(MANIFEST)
    printed = []
    for number, example in enumerate(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)):
        exec(compile(example, f"example {number}", "exec"), {"__name__": "example"})
        printed.append(capsys.readouterr().out)
    first, submitted, watched, awaited, artifacts, ended = printed
    assert first.startswith("completed 0.")
    assert "+mended\n" in first
    assert submitted == ""
    assert "used Bash" in watched
    assert watched.endswith("ended as completed\n")
    assert '"type":"result"' in awaited
    assert re.search(r"^mend-7\.patch \d+ sha256:[0-9a-f]{64}$", artifacts, re.MULTILINE)
    assert artifacts.endswith("There is no report.\n")
    assert "+mended\n" in (tmp_path / "mend-7.patch").read_text()
    assert ended == "mend-7 completed Mend the build\nIt has ended before: completed\nIts sandbox is not kept.\n"


def test_iterators_go_on_when_the_server_is_killed_and_comes_back_and_its_errors_come_with_what_it_says(world):
    machine = world(bash("for i in $(seq 40); do echo line $i; sleep 0.1; done; echo new > new.txt"), says())
    machine.submit()
    machine.until_state("running")
    server, told = machine.server.said["http"], {"sync": [], "async": []}

    async def follow():
        async with AsyncClient(server) as client:
            async for event in client.events("task-1"):
                told["async"].append(event)

    with Client(server) as client:
        followers = [
            threading.Thread(target=lambda: told["sync"].extend(client.events("task-1"))),
            threading.Thread(target=asyncio.run, args=[follow()]),
        ]
        for follower in followers:
            follower.start()
        until(lambda: told["async"], what="the first event")
        machine.restart_server(signal.SIGKILL)
        for follower in followers:
            follower.join(60)
        assert client.wait("task-1", timeout_seconds=30)["state"] == "completed", machine.tell()
    assert told["async"] == told["sync"] == machine.frames()
    errors_come_with_what_the_server_says(server)


def errors_come_with_what_the_server_says(server):
    """To a client of a server with one task, task-1, which is completed."""
    with Client(server) as client:
        taken = MANIFEST.replace("metadata: {", 'metadata: {id: "task-1", ')
        with pytest.raises(DuplicateTaskIdError) as duplicate:
            client.submit(taken)
        assert duplicate.value.existing_task["state"] == "completed"
        with pytest.raises(TaskAlreadyTerminalError) as ended:
            client.cancel("task-1")
        assert ended.value.task_state == "completed"
        with pytest.raises(InsufficientResourcesError) as large:
            client.submit(MANIFEST + "vm: {cpus: 4096}\n")
        assert large.value.requested_cpus == 4096 > large.value.available_cpus
        assert large.value.requested_memory == "8G"
        with pytest.raises(InvalidManifestError) as wrong:
            client.submit(MANIFEST + "vm: {cpus: many}\n")
        assert [(one["field"], one["line"]) for one in wrong.value.mistakes] == [("vm.cpus", 6)]
        with pytest.raises(InvalidManifestError):
            client.check(MANIFEST + "vm: {cpus: many}\n")
        assert client.check(MANIFEST)["definition"]["vm"]["cpus"] == 4
        assert client.tasks()["total_count"] == 1
        with pytest.raises(InvalidParameterError):
            client.tasks(limit=0)
        with pytest.raises(TaskNotFoundError) as missing:
            client.status("task-404")
        assert missing.value.request_id
