"""The Python client with the real server: the documented examples, event iterators across a restart, and errors."""

import asyncio
import re
import signal
import threading
from pathlib import Path

import pytest

from doubles.deployment import bash_turn, reply_turn, wait_until
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


def test_examples_on_the_docs_page_run(deploy, tmp_path, monkeypatch, capsys):
    deployment = deploy(bash_turn("echo mended > mended.txt"), reply_turn())
    monkeypatch.setenv("SANDBOX_SERVER", deployment.server.ready_message["http"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text(MANIFEST)
    outputs = []
    for number, example in enumerate(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)):
        exec(compile(example, f"example {number}", "exec"), {"__name__": "example"})
        outputs.append(capsys.readouterr().out)
    first, submitted, rerun, continued, watched, awaited, artifacts, ended = outputs
    assert first.startswith("completed 0.")
    assert "+mended\n" in first
    assert submitted == ""
    assert re.fullmatch(r"[0-9a-f-]{36}\n", rerun)
    assert continued == "fix-7 session\n"
    assert "used Bash" in watched
    assert watched.endswith("ended as completed\n")
    assert '"type":"result"' in awaited
    assert re.search(r"^fix-7\.patch \d+ sha256:[0-9a-f]{64}$", artifacts, re.MULTILINE)
    assert artifacts.endswith("There is no report.\n")
    assert "+mended\n" in (tmp_path / "fix-7.patch").read_text()
    # Tasks derived from fix-7 may still be running, so the size of their patch may be unknown.
    listed = r"https://github\.com/org/repo\.git (None|\{'files': \d, 'additions': \d, 'deletions': \d\})\n"
    assert re.fullmatch(
        rf"fix-7 completed Fix the build\n({listed}){{3}}"
        r"The task has already ended: completed\nIts sandbox is not preserved\.\n",
        ended,
    )
    assert "https://github.com/org/repo.git {'files': 1, 'additions': 1, 'deletions': 0}\n" in ended


def test_iterators_resume_after_a_server_restart_and_errors_have_details(deploy):
    deployment = deploy(
        bash_turn("for i in $(seq 40); do echo line $i; sleep 0.1; done; echo new > new.txt"), reply_turn()
    )
    deployment.submit()
    deployment.wait_for_state("running")
    server, received = deployment.server.ready_message["http"], {"sync": [], "async": []}

    async def follow():
        async with AsyncClient(server) as client:
            async for event in client.events("task-1"):
                received["async"].append(event)

    with Client(server) as client:
        followers = [
            threading.Thread(target=lambda: received["sync"].extend(client.events("task-1"))),
            threading.Thread(target=asyncio.run, args=[follow()]),
        ]
        for follower in followers:
            follower.start()
        wait_until(lambda: received["async"], description="the first event")
        deployment.restart_server(signal.SIGKILL)
        for follower in followers:
            follower.join(60)
        assert client.wait("task-1", timeout_seconds=30)["state"] == "completed", deployment.diagnostics()
    assert received["async"] == received["sync"] == deployment.wire_events()
    check_errors(server)


def check_errors(server):
    """Check the types and details of errors. The server must have one completed task, task-1."""
    with Client(server) as client:
        manifest = MANIFEST.replace("metadata: {", 'metadata: {id: "task-1", ')
        with pytest.raises(DuplicateTaskIdError) as duplicate:
            client.submit(manifest)
        assert duplicate.value.existing_task["state"] == "completed"
        with pytest.raises(TaskAlreadyTerminalError) as ended:
            client.cancel("task-1")
        assert ended.value.task_state == "completed"
        with pytest.raises(InsufficientResourcesError) as large:
            client.submit(MANIFEST + "vm: {cpus: 4096}\n")
        assert large.value.requested_cpus == 4096 > large.value.available_cpus
        assert large.value.requested_memory == "8G"
        with pytest.raises(InvalidManifestError) as invalid:
            client.submit(MANIFEST + "vm: {cpus: many}\n")
        assert [(detail["field"], detail["line"]) for detail in invalid.value.field_errors] == [("vm.cpus", 6)]
        with pytest.raises(InvalidManifestError):
            client.check(MANIFEST + "vm: {cpus: many}\n")
        assert client.check(MANIFEST)["definition"]["vm"]["cpus"] == 4
        assert client.tasks()["total_count"] == 1
        with pytest.raises(InvalidParameterError):
            client.tasks(limit=0)
        with pytest.raises(TaskNotFoundError) as missing:
            client.status("task-404")
        assert missing.value.request_id
