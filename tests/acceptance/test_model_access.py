"""The network mode also applies to the model's server-side tools, and a rejected model key fails the task."""

import json

from doubles.deployment import bash_turn, reply_turn
from sandbox.demo.scripted_model import Fault, Text, ToolUse, Turn

SEARCH_TURN = Turn((Text("I search."), ToolUse("WebSearch", {"query": "how to leave a sandbox"})))
FETCH_TURN = Turn((ToolUse("WebFetch", {"url": "https://files.example.org/a", "prompt": "What?"}),))


def offered_tool_types(deployment):
    """Return the types of the tools in all requests that reached the model."""
    bodies = [json.loads(request["body"]) for request in deployment.model_requests() if request["method"] == "POST"]
    return {tool.get("type") for body in bodies for tool in body.get("tools", ())}


def denials(deployment):
    return [event for event in deployment.wire_events() if event["type"] == "egress_denied"]


URL_IMAGE = {"type": "image", "source": {"type": "url", "url": "https://evil.example.com/?leak=1"}}
WEB_FETCH_TOOL = {"type": "web_fetch_20250910", "name": "web_fetch"}
TOOL_ADDITION = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": WEB_FETCH_TOOL}}
DENIED_BLOCKS = (
    (URL_IMAGE, "A source of type url makes the model provider's servers access the network"),
    (TOOL_ADDITION, "The tool web_fetch_20250910 makes the model provider's servers access the network"),
)


def send_block_turn(block):
    body = {"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": [block]}]}
    return bash_turn(f"""
curl -sS -m 20 "$ANTHROPIC_BASE_URL/v1/messages" -H "x-api-key: $ANTHROPIC_API_KEY" -d '{json.dumps(body)}'
""")


def count_messages_with(deployment, block):
    """Return the number of messages with this content block in all requests that reached the model."""
    bodies = [json.loads(request["body"]) for request in deployment.model_requests() if request["method"] == "POST"]
    return sum(block in message["content"] for body in bodies for message in body["messages"])


def test_server_side_tools_are_denied_without_full_network(deploy):
    """Claude Code's WebSearch and other programs' server-side tools are denied. WebFetch uses the sandbox's network."""
    commands = [send_block_turn(block) for block, _ in DENIED_BLOCKS]
    # The model also reports once that it is overloaded (529).
    deployment = deploy(Turn(SEARCH_TURN.content, faults=(Fault(status=529),)), FETCH_TURN, *commands, reply_turn())
    deployment.submit(vm={"network_mode": "outbound", "allowed_hosts": ["other.example.org"]})
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    searched, _, *programs = deployment.tool_results()
    assert "web_search_20250305" in searched
    assert "network_mode full" in searched
    assert "web_search_20250305" not in offered_tool_types(deployment)
    assert sum("web_search_20250305" in denial["reason"] for denial in denials(deployment)) == 1
    others = {(denial["host"], denial["port"]) for denial in denials(deployment)} - {("model", 8123)}
    assert others == {("files.example.org", 443)}
    for (block, reason), output in zip(DENIED_BLOCKS, programs, strict=True):
        assert reason in output
        assert count_messages_with(deployment, block) == 0


def test_server_side_tools_are_allowed_with_full_network(deploy):
    commands = [send_block_turn(block) for block, _ in DENIED_BLOCKS]
    deployment = deploy(SEARCH_TURN, *commands, reply_turn(), reply_turn())
    deployment.submit(vm={"network_mode": "full"})
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    assert "web_search_20250305" in offered_tool_types(deployment)
    assert denials(deployment) == []
    for (block, reason), output in zip(DENIED_BLOCKS, deployment.tool_results()[1:], strict=True):
        assert reason not in output
        assert count_messages_with(deployment, block) == 1


def test_rejected_model_key_fails_the_task_immediately(deploy):
    deployment = deploy(reply_turn(faults=(Fault(status=401, message="invalid x-api-key", times=99),)))
    deployment.submit()
    status = deployment.wait(seconds=40)
    assert (status["state"], status["error"]["code"]) == ("failed", "agent_failed"), deployment.diagnostics()
    assert "rejected the server's key (401): invalid x-api-key; check the key." in status["error"]["message"]
    assert len([request for request in deployment.model_requests() if request["method"] == "POST"]) == 1
