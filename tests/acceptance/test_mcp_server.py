"""`sandbox mcp` with the real server, used by the official client and by Claude Code."""

import asyncio
import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest
from websockets.sync.client import connect

from doubles.deployment import Turn, bash_turn, make_repository, reply_turn
from doubles.redaction_attacks import ESCAPES, as_base64, with_noise
from sandbox.agents.claude_code.agent import find_binary
from sandbox.demo.scripted_model import Text, ToolUse

MANIFEST = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "From an agent", "id": "mine"},
    "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
    "claude": {"prompt": "Do it."},
}
COMMAND = [sys.executable, "-m", "sandbox", "mcp"]


class Tools:
    """Calls tools as an MCP client; returns the text of the result or, with `error`, of the error."""

    def __init__(self, session):
        self._session = session

    async def __call__(self, name, /, **arguments):
        response = await self._session.call_tool(name, arguments)
        assert not response.is_error, response
        return response.content[0].text

    async def error(self, name, /, **arguments):
        response = await self._session.call_tool(name, arguments)
        assert response.is_error, response
        return response.content[0].text


@asynccontextmanager
async def tools_of(address, errlog):
    from mcp import ClientSession, StdioServerParameters, stdio_client  # slows down test collection

    parameters = StdioServerParameters(
        command=COMMAND[0], args=COMMAND[1:], env={"SANDBOX_SERVER": address, "PYTHONWARNINGS": "error"}
    )
    async with stdio_client(parameters, errlog=errlog) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        yield session


def run_scenario(address, tmp_path, scenario):
    """Run a scenario with the tools; return the stderr of the MCP server."""

    async def run():
        with (tmp_path / "mcp.log").open("w") as errlog:
            async with tools_of(address, errlog) as session:
                await scenario(Tools(session), session)

    asyncio.run(run())
    return (tmp_path / "mcp.log").read_text()


def test_client_submits_and_cancels_tasks_and_reads_results_and_errors(deploy, tmp_path):
    deployment = deploy(
        bash_turn("echo new > new.txt; seq 20000 > long.txt; printf '\\000' > data.bin"),
        reply_turn("I did it."),
        branches={"Take long.": (bash_turn("sleep 300"), reply_turn())},
    )

    async def scenario(tool, session):
        listed = {one.name: one for one in (await session.list_tools()).tools}
        assert set(listed) == {"submit", "continue_task", "list", "status", "logs", "diff", "artifacts", "cancel"}
        assert listed["status"].annotations.read_only_hint
        await check_submit_and_results(tool)
        await check_status_and_cancel(tool, deployment)
        await check_errors(tool)

    assert run_scenario(deployment.server.ready_message["http"], tmp_path, scenario) == ""


async def check_submit_and_results(tool):
    submitted = json.loads(await tool("submit", manifest=MANIFEST | {"lifecycle": {"artifact_patterns": ["*.*"]}}))
    assert submitted["task_id"] == "mine"
    status = json.loads(await tool("status", task_id="mine", wait_seconds=60))
    assert (status["state"], status["final_message"]) == ("completed", "I did it.")
    assert status["progress"]["cost_usd"] > 0
    assert '"new_state":"completed"' in await tool("logs", task_id="mine", lines=1)
    assert '"type":"result"' in await tool("logs", task_id="mine", stream="stdout")
    patch = await tool("diff", task_id="mine")
    assert patch.startswith("diff --git a/data.bin b/data.bin")
    assert patch.endswith("more characters: continue with offset=40000]")
    [found] = json.loads(await tool("list", search="mine", state="completed"))["tasks"]
    assert (found["id"], found["state"]) == ("mine", "completed")
    assert found["diff"]["files"] > 0
    assert json.loads(await tool("list", search="nowhere")) == {"tasks": [], "total_count": 0}
    names = [entry["name"] for entry in json.loads(await tool("artifacts", task_id="mine"))]
    assert {"mine.patch", "new.txt", "data.bin"} <= set(names)
    assert await tool("artifacts", task_id="mine", name="new.txt") == "new\n"
    rest = await tool("artifacts", task_id="mine", name="long.txt", offset=100_000)
    assert rest.endswith("20000\n")
    assert "artifact_not_text" in await tool.error("artifacts", task_id="mine", name="data.bin")
    continued = json.loads(await tool("continue_task", task_id="mine", prompt="Once more."))
    status = json.loads(await tool("status", task_id=continued["task_id"], wait_seconds=60))
    assert (status["state"], status["parent"], status["continues"]) == ("completed", "mine", "session")


async def check_status_and_cancel(tool, deployment):
    long = {**MANIFEST, "metadata": {"name": "Long", "id": "long"}, "claude": {"prompt": "Take long."}}
    await tool("submit", manifest=json.dumps(long))  # a JSON string is accepted as well
    assert json.loads(await tool("status", task_id="long", wait_seconds=0))["state"] != "completed"
    await asyncio.to_thread(deployment.wait_for_state, "running", "long")
    assert "artifact_not_found: There is no patch yet" in await tool.error("diff", task_id="long")
    assert json.loads(await tool("cancel", task_id="long", force=True))["new_state"] == "cancelled"
    assert json.loads(await tool("status", task_id="long", wait_seconds=60))["state"] == "cancelled"
    assert "task_already_terminal: " in await tool.error("cancel", task_id="long")


async def check_errors(tool):
    """Check that tool errors have the API's code and message."""
    message = await tool.error("submit", manifest={**MANIFEST, "vm": {"cpus": "many"}, "extra": 1})
    assert "invalid_manifest: " in message
    assert "vm.cpus: must be a whole number" in message
    assert "extra: " in message
    assert "task_not_found: " in await tool.error("status", task_id="nobody")
    assert "less than or equal to 300" in await tool.error("status", task_id="nobody", wait_seconds=99999)


SECRET = 'C:\\x2\\7:of/the "customer" & 100%4é'
ENCODED = [
    *dict.fromkeys([SECRET, SECRET.lower(), *(escape(SECRET) for escape in ESCAPES)]),
    *(escape(with_noise(SECRET, 7)) for escape in ESCAPES),
    *(as_base64(SECRET, before, url_safe=False).replace("\n", "") for before in range(3)),
    SECRET.encode().hex(),
]
WAIT_FOR_FILE = "cat encoded.txt; while [ ! -e /tmp/go ]; do sleep 0.1; done"


def assert_redacted(text, expected_count):
    """Fail if one of the encoded values is in the text, which may be JSON, or if there are too few replacements."""
    shown = [encoded for encoded in ENCODED if encoded in text or json.dumps(encoded)[1:-1] in text]
    assert (shown, text.count("[REDACTED:TOKEN]") >= expected_count) == ([], True), text


def test_secret_in_any_encoding_is_redacted_in_mcp_results_and_websocket_messages(deploy, tmp_path):
    lines = "".join(f"<{encoded}>\n" for encoded in ENCODED)
    deployment = deploy(
        Turn((Text(lines), ToolUse("Bash", {"command": WAIT_FOR_FILE, "description": lines}))),
        reply_turn(lines),
        files={"encoded.txt": lines},
        environment={"SERVER_TOKEN": SECRET},
    )
    secret = {"name": "TOKEN", "source": "env", "key": "SERVER_TOKEN"}
    deployment.submit(secrets=[secret])
    deployment.wait_for_state("running")
    address = f"ws{deployment.server.ready_message['http'][4:]}/api/v1/tasks"
    with connect(f"{address}/task-1/terminal") as terminal:
        terminal.send(b"cat encoded.txt; echo that is a''ll; touch /tmp/go\n")
        shown = b""
        while b"that is all" not in shown:
            message = terminal.recv(timeout=30)
            shown += message if isinstance(message, bytes) else b""
    assert_redacted(shown.decode(), len(ENCODED))
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    with connect(f"{address}/stream?task_id=task-1&after=0") as events:
        streamed = "\n".join(events)
    assert_redacted(streamed, 6 * len(ENCODED))

    async def scenario(tool, session):
        assert_redacted(await tool("status", task_id="task-1"), len(ENCODED))
        for stream in ("stdout", "conversation"):
            assert_redacted(await tool("logs", task_id="task-1", stream=stream, lines=1000), len(ENCODED))
        assert_redacted(await tool("logs", task_id="task-1", stream="all", lines=1000), len(ENCODED))

    run_scenario(deployment.server.ready_message["http"], tmp_path, scenario)


async def test_tool_error_without_a_server_suggests_sandbox_serve():
    from mcp.server.mcpserver.exceptions import ToolError

    from sandbox.cli.commands.mcp.tools import TaskTools

    with pytest.raises(ToolError, match=r"^unreachable: Cannot reach http://127\.0\.0\.1:9\.(?s:.*)sandbox serve"):
        await TaskTools("http://127.0.0.1:9", None).status("mine")


@pytest.fixture
def claude(deploy, tmp_path):
    """Runs Claude Code on the host with `sandbox mcp` in its configuration and a scripted model."""

    def run(*turns):
        branches = {"Do it.": (bash_turn("echo new > new.txt"), reply_turn("Done inside."))}
        deployment = deploy(*turns, branches=branches)
        make_repository(deployment.repositories / "app.git", {"a.txt": "a\n"})
        address = deployment.server.ready_message["http"]
        servers = {"sandbox": {"command": COMMAND[0], "args": COMMAND[1:], "env": {"SANDBOX_SERVER": address}}}
        (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
        (tmp_path / "outside").mkdir()
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path / "outside"),
            "ANTHROPIC_BASE_URL": deployment.model_url,
            "ANTHROPIC_API_KEY": "scripted",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
        }
        allowed = "mcp__sandbox__submit,mcp__sandbox__status,mcp__sandbox__diff"
        command = [str(find_binary()), "-p", "Hand this to Sandbox.", "--mcp-config", str(tmp_path / "mcp.json")]
        command += ["--strict-mcp-config", "--allowedTools", allowed, "--output-format", "json"]
        process = subprocess.run(
            command, cwd=tmp_path / "outside", env=environment, capture_output=True, timeout=100, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.returncode == 0, (process.stdout, process.stderr)
        return deployment, json.loads(process.stdout)

    return run


def tool_turn(tool, **arguments):
    return Turn((Text("I hand it over."), ToolUse(f"mcp__sandbox__{tool}", arguments)))


def test_claude_code_submits_a_task_through_its_mcp_configuration(claude):
    deployment, result = claude(
        tool_turn("submit", manifest=MANIFEST),
        tool_turn("status", task_id="mine", wait_seconds=60),
        tool_turn("diff", task_id="mine"),
        reply_turn("The patch adds new.txt."),
    )
    assert (result["is_error"], result["result"]) == (False, "The patch adds new.txt.")
    submitted, status, patch = deployment.tool_results()
    assert json.loads(submitted)["task_id"] == "mine"
    assert json.loads(status)["state"] == "completed"
    assert "+new" in patch
    assert deployment.status("mine")["state"] == "completed"
