"""The real Claude Code behind a real gateway: each request is forwarded with all its headers."""

import asyncio

from doubles.claude_on_host import GATEWAY_KEY, ClaudeOnHost
from doubles.loopback_listeners import loopback_listeners
from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.demo.scripted_model import Script, ScriptedModel, Text, ToolUse, Turn
from sandbox.gateway.server import SocketGatewayFactory
from sandbox.interfaces.gateway import GatewayRules, ModelUpstream
from sandbox.model.events import Usage

SERVER_KEY = "sk-server-key"
SUBAGENT = {"description": "look", "prompt": "Look around.", "subagent_type": "general-purpose"}
TURNS = (
    Turn((ToolUse("Bash", {"command": "echo ran", "description": "look"}),)),
    Turn((ToolUse("Agent", SUBAGENT),)),
    Turn((Text("All done."),)),
)
AGENT_HEADERS = {
    "accept",
    "anthropic-beta",
    "anthropic-dangerous-direct-browser-access",
    "anthropic-version",
    "user-agent",
    "x-app",
    "x-claude-code-session-id",
    "x-stainless-arch",
    "x-stainless-lang",
    "x-stainless-os",
    "x-stainless-package-version",
    "x-stainless-retry-count",
    "x-stainless-runtime",
    "x-stainless-runtime-version",
    "x-stainless-timeout",
}
GATEWAY_HEADERS = {"accept-encoding", "content-length", "content-type", "host", "x-api-key"}
SUBAGENT_HEADERS = {"x-claude-code-agent-id", "x-claude-code-parent-agent-id"}


async def test_requests_of_claude_code_are_forwarded_with_the_key_of_the_server(tmp_path):
    async def scenario():
        events: list = []
        async with ScriptedModel(Script(TURNS)) as model:
            with loopback_listeners() as listeners:
                gateway = SocketGatewayFactory(MessagesApi()).create(
                    ModelUpstream(model.url, api_key=SERVER_KEY), GATEWAY_KEY, events.append, GatewayRules()
                )
                gateway_task = asyncio.ensure_future(gateway.serve(listeners))
                port = listeners.model.getsockname()[1]
                completed = await ClaudeOnHost(tmp_path).run(f"http://127.0.0.1:{port}")
                gateway_task.cancel()
                await asyncio.gather(gateway_task, return_exceptions=True)
        return completed, model, events

    completed, model, events = await scenario()
    assert completed.exit_code == 0, completed.stderr
    assert {type(event) for event in events} == {Usage}, [event for event in events if not isinstance(event, Usage)]
    requests = [dict(request.headers) for request in model.requests if request.path.startswith("/v1/messages")]
    assert len(requests) >= 4, "requests of the agent, its tool and its subagent"
    for headers in requests:
        assert headers["x-api-key"] == SERVER_KEY
        assert headers.keys() >= AGENT_HEADERS
        assert headers.keys() - AGENT_HEADERS - GATEWAY_HEADERS - SUBAGENT_HEADERS == set()
        assert "claude-code-20250219" in headers["anthropic-beta"].split(",")
    assert any("x-claude-code-agent-id" in headers for headers in requests)
