"""The real Claude Code asks through a real gateway: what it sends arrives, and nothing is dropped or refused."""

import asyncio

from doubles.claude_on_host import TASK_KEY, Outside
from doubles.loopback_listeners import loopback_listeners
from sandbox.demo.model_script import Script, Text, ToolUse, Turn
from sandbox.demo.scripted_model import ScriptedModel
from sandbox.gateway.server import SocketGateways
from sandbox.interfaces.gateway import GatewayRules, ModelUpstream
from sandbox.model.events import Usage

SERVER_KEY = "sk-the-servers-own"
SUBAGENT = {"description": "look", "prompt": "Look around.", "subagent_type": "general-purpose"}
TURNS = (
    Turn((ToolUse("Bash", {"command": "echo ran", "description": "look"}),)),
    Turn((ToolUse("Agent", SUBAGENT),)),
    Turn((Text("All done."),)),
)
OF_ITSELF = {
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
OF_THE_GATEWAY = {"accept-encoding", "content-length", "content-type", "host", "x-api-key"}
OF_A_SUBAGENT = {"x-claude-code-agent-id", "x-claude-code-parent-agent-id"}


def test_all_that_claude_code_sends_arrives_with_the_servers_key(tmp_path):
    async def story():
        told: list = []
        async with ScriptedModel(Script(TURNS)) as model:
            with loopback_listeners() as listeners:
                gateway = SocketGateways().create(
                    ModelUpstream(model.url, api_key=SERVER_KEY), TASK_KEY, told.append, GatewayRules()
                )
                serving = asyncio.ensure_future(gateway.serve(listeners))
                port = listeners.model.getsockname()[1]
                ran = await Outside(tmp_path).run(f"http://127.0.0.1:{port}")
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
        return ran, model, told

    ran, model, told = asyncio.run(story())
    assert ran.exit_code == 0, ran.stderr
    assert {type(one) for one in told} == {Usage}, [one for one in told if not isinstance(one, Usage)]
    asked = [dict(request.headers) for request in model.requests if request.path.startswith("/v1/messages")]
    assert len(asked) >= 4, "the agent, its tool and its subagent asked"
    for headers in asked:
        assert headers["x-api-key"] == SERVER_KEY
        assert headers.keys() >= OF_ITSELF
        assert headers.keys() - OF_ITSELF - OF_THE_GATEWAY - OF_A_SUBAGENT == set()
        assert "claude-code-20250219" in headers["anthropic-beta"].split(",")
    assert any("x-claude-code-agent-id" in headers for headers in asked)
