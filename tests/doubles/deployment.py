"""A real deployment: a server, a git server and a scripted model, each in its own process."""

import atexit
import base64
import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache, lru_cache, partial
from pathlib import Path
from urllib.parse import quote

import httpx2

from doubles.forked_commands import CLI_MAIN, ForkedCommand
from doubles.network_namespace import NamespaceTransport
from sandbox.agents.claude_code.agent import install_binary
from sandbox.demo.scripted_model import Script, Text, ToolUse, Turn

SERVER_KEY = f"sk-ant-the-servers-own-key-{secrets.token_hex(8)}"
ORGANIZATION = "https://github.com/org/"
_GIT_SERVER, _MODEL = "sandbox.demo.git_server:main", "sandbox.demo.scripted_model:main"
_MODULES = {CLI_MAIN: "sandbox", _GIT_SERVER: "sandbox.demo.git_server", _MODEL: "sandbox.demo.scripted_model"}
START_SECONDS = 90
"""On a busy machine, a server that boots a guest without KVM needs most of this time."""


def bash_turn(command):
    """Return a turn in which the model runs a shell command."""
    return Turn((Text("Working."), ToolUse("Bash", {"command": command, "description": "work"})))


def python_turn(source):
    """Return a turn in which the model runs a Python program, whose source needs no shell quoting."""
    encoded = base64.b64encode(source.encode()).decode()
    return bash_turn(f"echo {encoded} | base64 -d | python3 -I -")


def reply_turn(text="Done.", **fields):
    return Turn((Text(text),), **fields)


def wait_until(condition, seconds=20.0, description="the condition", *, pause_max=0.1):
    """Poll with increasing pauses until the condition returns a true value; return that value."""
    deadline = time.monotonic() + seconds
    pause = 0.02
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {description}"
        time.sleep(pause)
        pause = min(pause * 1.2, pause_max)
    return value


class Process:
    """A child process whose first output line is JSON with its addresses.

    start: a function that starts the process with the given streams.
    """

    def __init__(self, start, *, log):
        self.log = log
        with log.open("ab") as errors:
            self._popen = start(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        ready, _, _ = select.select([self._popen.stdout], [], [], START_SECONDS)
        line = self._popen.stdout.readline() if ready else b""
        if not line:
            self.stop()
            raise AssertionError(f"{log.stem} did not start:\n{log.read_text(errors='replace')[-3000:]}")
        self.ready_message = json.loads(line)
        self.pid = self._popen.pid

    def is_alive(self):
        return self._popen.poll() is None

    def send_signal(self, signal_number):
        self._popen.send_signal(signal_number)

    def stop(self, signal_number=signal.SIGTERM, seconds=10.0):
        """Stop the process; return the duration in seconds."""
        start = time.monotonic()
        if self._popen.poll() is None:
            self._popen.send_signal(signal_number)
            try:
                self._popen.wait(seconds)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        self._popen.stdout.close()
        return time.monotonic() - start


def git(*arguments, cwd):
    """Run git for the test, without user configuration."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        **{f"GIT_{role}_{field}": value for role in ("AUTHOR", "COMMITTER") for field, value in _IDENTITY.items()},
    }
    result = subprocess.run(["git", *arguments], cwd=cwd, env=environment, capture_output=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode(errors="replace")


_IDENTITY = {"NAME": "Test", "EMAIL": "test@example.org", "DATE": "2026-01-29T10:00:00Z"}


def make_repository(bare, files, *, branch="main"):
    """Create a bare repository with one commit of these files; return the commit."""
    template, commit = _repository_template(branch, tuple(sorted(files.items())))
    bare.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(template, bare, symlinks=True)
    return commit


@lru_cache(maxsize=64)
def _repository_template(branch, files):
    """Return a template repository to copy, and its commit.

    It is created once per process, since the same files give the same commit.
    """
    directory = _directory_of_this_process("repository-")
    work, bare = directory / "work", directory / "bare"
    for name, content in files:
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    git("init", "-q", "-b", branch, str(work), cwd=directory)
    git("add", "-A", ".", cwd=work)
    git("commit", "-q", "-m", "Begin", cwd=work)
    git("clone", "-q", "--bare", str(work), str(bare), cwd=directory)
    return bare, git("rev-parse", "HEAD", cwd=work).strip()


def _directory_of_this_process(prefix):
    directory = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


@cache
def _installed_agent():
    """Return the agent as installed by a server. All servers of this process share it."""
    return install_binary(_directory_of_this_process("agent-"))


def preinstall_agent(data_dir):
    """Hard-link the copy of Claude Code that the server would make, since copying 400 MB for each server is slow."""
    installed = _installed_agent()
    target = data_dir / "agent" / installed.name
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.parent.mkdir()
    with contextlib.suppress(OSError):  # the server copies it if it is on another file system
        target.hardlink_to(installed)


class Deployment:
    """A server and its data directory, a git host and a model. Each program is a process; `close` stops all processes.

    command_prefix: the words before the command that starts the server.
    forks: whether to fork programs instead of starting an interpreter, which takes a second. Programs with a command
        prefix are never forked.
    """

    def __init__(self, directory, *, command_prefix=(), address="127.0.0.1", namespace=None, forks=True):
        self.directory = Path(directory)
        self.home = self.directory / "home"
        self.home.mkdir()
        self.repositories = self.directory / "git"
        self.repositories.mkdir()
        self.data_dir = self.directory / "data"
        self.model_requests_file = self.directory / "model-requests.ndjson"
        self.command_prefix = command_prefix
        self.address = address
        self.namespace = namespace
        self.transport = NamespaceTransport(namespace) if namespace else None
        self.processes = []
        self.server = None
        self.forks = forks and not command_prefix
        self.runtime = "bubblewrap"  # the fastest runtime; None means the server's default
        self.bearer = None
        self.http = None

    def start_git(self, command_prefix=()):
        arguments = ["--directory", str(self.repositories), "--host", self.address]
        git_server = self._start_program("git", _GIT_SERVER, arguments, {}, command_prefix)
        (self.home / ".gitconfig").write_text(
            f'[url "{git_server.ready_message["url"]}/"]\n\tinsteadOf = {ORGANIZATION}\n'
        )

    def start_model(self, *turns, command_prefix=(), port=0, **script):
        path = self.directory / "script.json"
        import msgspec

        path.write_bytes(msgspec.json.encode(Script(turns, **script)))
        arguments = ["--script", str(path), "--host", self.address, "--port", str(port)]
        self.model = self._start_program(
            "model", _MODEL, [*arguments, "--record", str(self.model_requests_file)], {}, command_prefix
        )
        self.model_url = self.model.ready_message["url"]

    def restart_model(self, *turns, **script):
        """Start a new model at the same address, without recorded requests."""
        self.processes.remove(self.model)
        self.model.stop()
        self.start_model(*turns, port=int(self.model_url.rpartition(":")[2]), **script)

    @contextlib.contextmanager
    def paused_model(self):
        """Pause the model during the block, so that no task completes."""
        self.model.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.model.send_signal(signal.SIGCONT)

    def start_server(self, *, ports=(0, 0), python=None, **environment):
        """Start the server.

        ports: the ports of the REST and WebSocket APIs; 0 selects a free port. python: the interpreter of another
        version of Sandbox.
        """
        if not self.command_prefix and not (self.data_dir / "agent").exists():
            preinstall_agent(self.data_dir)
        port, ws_port = map(str, ports)
        arguments = ["serve", "--port", port, "--ws-port", ws_port, "--data-dir", str(self.data_dir)]
        model = {"ANTHROPIC_BASE_URL": self.model_url, "ANTHROPIC_API_KEY": SERVER_KEY}
        self.server_environment = environment
        if self.runtime is not None:
            environment = {"SANDBOX_RUNTIME": self.runtime, **environment}
        arguments += ["--format", "json"]
        environment = {**model, **environment}
        if python is not None:
            self.server = self._start("server", [python, "-m", _MODULES[CLI_MAIN], *arguments], environment, ())
        else:
            self.server = self._start_program("server", CLI_MAIN, arguments, environment, self.command_prefix)
        if self.http is not None:
            self.http.close()
        self.http = self._client()
        return self.server.ready_message

    def restart_server(self, signal_number):
        """Stop the server with the signal, and start a new one at the same addresses."""
        ports = [self.server.ready_message[name].rpartition(":")[2] for name in ("http", "ws")]
        self.server.stop(signal_number)
        return self.start_server(ports=ports)

    def _start(self, name, command, environment, command_prefix):
        return self._start_process(name, partial(subprocess.Popen, [*command_prefix, *command]), environment)

    def _start_program(self, name, main, arguments, environment, command_prefix):
        """Start one of Sandbox's programs, as a fork if possible."""
        if self.forks and not command_prefix:
            return self._start_process(name, partial(ForkedCommand, arguments, main=main), environment)
        return self._start(name, [sys.executable, "-m", _MODULES[main], *arguments], environment, command_prefix)

    def _start_process(self, name, start, environment):
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8", **environment}
        process = Process(partial(start, env=environment), log=self.directory / f"{name}.log")
        self.processes.append(process)
        return process

    def submit(self, task_id="task-1", **sections):
        """Submit a task with this id; `claude`, `vm`, `lifecycle` and `repository` extend the minimal manifest."""
        manifest = {
            "version": "1",
            "kind": "Task",
            "metadata": {"name": "A task", "id": task_id},
            "repository": {"url": f"{ORGANIZATION}repo.git", "branch": "main", **sections.pop("repository", {})},
            "claude": {"prompt": "Do it.", **sections.pop("claude", {})},
            **sections,
        }
        response = self.http.post("/api/v1/tasks", json=manifest)
        assert response.status_code == 202, response.text
        return response.json()["task_id"]

    def status(self, task_id="task-1"):
        return self.http.get(f"/api/v1/tasks/{task_id}").json()

    def wait(self, task_id="task-1", seconds=60):
        """Wait for the end of a task; return its status."""
        deadline = time.monotonic() + seconds
        while (status := self.status(task_id))["state"] not in FINAL_STATES:
            assert time.monotonic() < deadline, f"{status}\n{self.diagnostics(task_id)}"
            self.http.get(f"/api/v1/tasks/{task_id}/wait?timeout=5")
        return status

    def wait_for_state(self, state, task_id="task-1", seconds=30):
        try:
            wait_until(lambda: self.status(task_id)["state"] == state, seconds, f"state {state}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.status(task_id)}\n{self.diagnostics(task_id)}") from None

    def artifact(self, name, task_id="task-1"):
        response = self.http.get(f"/api/v1/tasks/{task_id}/artifacts/{quote(name, safe='')}")
        assert response.status_code == 200, response.text
        return response.content

    def artifact_names(self, task_id="task-1"):
        listed = self.http.get(f"/api/v1/tasks/{task_id}/artifacts").json()
        return {artifact["name"] for artifact in listed["artifacts"]}

    def logs(self, task_id="task-1", stream="all"):
        return self.http.get(f"/api/v1/tasks/{task_id}/logs?stream={stream}").text

    def wire_events(self, task_id="task-1"):
        """Return all events of a finished task, from the event stream."""
        text = self.http.get(f"/api/v1/tasks/{task_id}/logs?follow=true").text
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]

    def states(self, task_id="task-1"):
        return [event["new_state"] for event in self.wire_events(task_id) if event["type"] == "state_change"]

    def tool_results(self):
        """Return the results of the agent's tool calls as sent to the model, in order."""
        requests = [json.loads(line) for line in self.model_requests_file.read_text().splitlines()]
        bodies = [json.loads(request["body"]) for request in requests if request["method"] == "POST"]
        longest = max(bodies, key=lambda body: len(body.get("messages", ())))
        blocks = [
            block
            for message in longest["messages"]
            if isinstance(message["content"], list)
            for block in message["content"]
            if block["type"] == "tool_result"
        ]
        return [_text(block["content"]) for block in blocks]

    def model_requests(self):
        if not self.model_requests_file.exists():
            return []
        return [json.loads(line) for line in self.model_requests_file.read_text().splitlines()]

    def diagnostics(self, task_id="task-1"):
        """Return the logs for the message of a failed assertion."""
        logs = "".join(path.read_text(errors="replace")[-2000:] for path in self.directory.glob("*.log"))
        runner_logs = "".join(path.read_text() for path in self.data_dir.glob("tasks/*/attempts/*/runner.log"))
        return f"{self.logs(task_id)[-4000:]}\n{runner_logs}\n{logs}"

    def can_be_shared(self):
        """Return whether programs may be forked, and nothing has been prepared or started yet."""
        return self.forks and not (
            self.processes or self.command_prefix or self.data_dir.exists() or any(self.home.iterdir())
        )

    def close(self):
        if self.http is not None:
            self.http.close()
            with contextlib.suppress(Exception):
                self.end_tasks()
        for process in reversed(self.processes):
            process.stop()

    def _client(self):
        headers = {"Authorization": f"Bearer {self.bearer}"} if self.bearer else {}
        return httpx2.Client(
            base_url=self.server.ready_message["http"],
            headers=headers,
            timeout=30,
            trust_env=False,
            verify=False,
            transport=self.transport,
        )

    def end_tasks(self):
        """Cancel unfinished tasks, and wait for their end."""
        with self._client() as http:
            for task in http.get("/api/v1/tasks").json()["tasks"]:
                address = f"/api/v1/tasks/{task['id']}"
                if task["state"] not in FINAL_STATES and http.delete(f"{address}?force=true").is_success:
                    http.get(f"{address}/wait?timeout=20")


FINAL_STATES = {"completed", "failed", "failed_preserved", "cancelled"}


def _text(content):
    """Return the tool's output, without the reminders that Claude Code adds for the model."""
    text = content if isinstance(content, str) else "".join(block.get("text", "") for block in content)
    return text.partition("<system-reminder>")[0].rstrip()
