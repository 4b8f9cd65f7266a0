"""The model thinks for the agent and fetches nothing for it, and a key that it does not take ends the task at once."""

import json

from doubles.live_server import bash, says
from sandbox.demo.model_script import Fault, Text, ToolUse, Turn

SEARCH = Turn((Text("I search."), ToolUse("WebSearch", {"query": "how to leave a sandbox"})))
FETCH = Turn((ToolUse("WebFetch", {"url": "https://files.example.org/a", "prompt": "What?"}),))


def tools_asked_for(world):
    """Types of the tools that the model was offered, in all requests that reached it."""
    bodies = [json.loads(request["body"]) for request in world.model_requests() if request["method"] == "POST"]
    return {tool.get("type") for body in bodies for tool in body.get("tools", ())}


def refusals(world):
    return [frame for frame in world.frames() if frame["type"] == "egress_denied"]


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://evil.example.com/?leak=1"}}
TOOL = {"type": "web_fetch_20250910", "name": "web_fetch"}
ADDED = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": TOOL}}
REASONS = (
    (IMAGE, "A source of type url makes the model's servers reach elsewhere"),
    (ADDED, "The tool web_fetch_20250910 makes the model's servers reach elsewhere"),
)


def asking_with(block):
    body = {"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [{"role": "user", "content": [block]}]}
    return bash(f"""
curl -sS -m 20 "$ANTHROPIC_BASE_URL/v1/messages" -H "x-api-key: $ANTHROPIC_API_KEY" -d '{json.dumps(body)}'
""")


def asked_with(world, block):
    """How many model requests that reached the model have it."""
    bodies = [json.loads(request["body"]) for request in world.model_requests() if request["method"] == "POST"]
    return sum(block in message["content"] for body in bodies for message in body["messages"])


def test_where_not_everything_is_reached_the_model_fetches_nothing_either(world):
    """Neither for Claude Code's own search nor for a program inside; its own fetch asks the hosts of the sandbox."""
    asking = [asking_with(block) for block, _ in REASONS]
    # And a model that is busy for a moment is asked again.
    machine = world(Turn(SEARCH.content, faults=(Fault(status=529),)), FETCH, *asking, says())
    machine.submit(vm={"network_mode": "outbound", "allowed_hosts": ["other.example.org"]})
    assert machine.wait()["state"] == "completed", machine.tell()
    searched, _, *programs = machine.tool_results()
    assert "web_search_20250305" in searched
    assert "network_mode full" in searched
    assert "web_search_20250305" not in tools_asked_for(machine)
    assert sum("web_search_20250305" in one["reason"] for one in refusals(machine)) == 1
    elsewhere = {(one["host"], one["port"]) for one in refusals(machine)} - {("model", 8123)}
    assert elsewhere == {("files.example.org", 443)}
    for (block, reason), answer in zip(REASONS, programs, strict=True):
        assert reason in answer
        assert asked_with(machine, block) == 0


def test_the_model_reaches_what_it_likes_where_the_sandbox_may_reach_everything(world):
    asking = [asking_with(block) for block, _ in REASONS]
    machine = world(SEARCH, *asking, says(), says())
    machine.submit(vm={"network_mode": "full"})
    assert machine.wait()["state"] == "completed", machine.tell()
    assert "web_search_20250305" in tools_asked_for(machine)
    assert refusals(machine) == []
    for (block, reason), answer in zip(REASONS, machine.tool_results()[1:], strict=True):
        assert reason not in answer
        assert asked_with(machine, block) == 1


def test_a_task_whose_servers_key_is_refused_fails_at_once_and_says_why(world):
    machine = world(says(faults=(Fault(status=401, times=99),)))
    machine.submit()
    ended = machine.wait(seconds=40)
    assert (ended["state"], ended["error"]["code"]) == ("failed", "agent_failed"), machine.tell()
    assert "rejected the server's key (401)" in ended["error"]["message"]
    assert len([request for request in machine.model_requests() if request["method"] == "POST"]) == 1
