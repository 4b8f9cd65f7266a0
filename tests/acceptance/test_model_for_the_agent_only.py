"""The model thinks for the agent and fetches nothing for it, and a key that it does not take ends the task at once."""

import json

import pytest

from doubles.live import bash, says
from sandbox.demo.model_script import Fault, Text, ToolUse, Turn

SEARCH = Turn((Text("I search."), ToolUse("WebSearch", {"query": "how to leave a sandbox"})))


def tools_asked_for(world):
    """Types of the tools that the model was offered, in all requests that reached it."""
    bodies = [json.loads(request["body"]) for request in world.model_requests() if request["method"] == "POST"]
    return {tool.get("type") for body in bodies for tool in body.get("tools", ())}


def refusals(world):
    return [frame for frame in world.frames() if frame["type"] == "egress_denied"]


@pytest.mark.parametrize("vm", [{}, {"network_mode": "outbound", "allowed_hosts": ["files.example.org"]}])
def test_claude_codes_own_search_is_refused_with_a_sentence_that_says_so(world, vm):
    machine = world(SEARCH, says())
    machine.submit(vm=vm)
    assert machine.wait()["state"] == "completed", machine.tell()
    answer = machine.tool_results()[0]
    assert "web_search_20250305" in answer
    assert "network_mode full" in answer
    assert "web_search_20250305" not in tools_asked_for(machine)
    assert ["web_search_20250305" in one["reason"] for one in refusals(machine)] == [True]


def test_it_reaches_the_model_where_the_sandbox_may_reach_everything(world):
    machine = world(SEARCH, says(), says())
    machine.submit(vm={"network_mode": "full"})
    assert machine.wait()["state"] == "completed", machine.tell()
    assert "web_search_20250305" in tools_asked_for(machine)
    assert refusals(machine) == []


def test_claude_codes_own_fetch_is_a_matter_of_the_sandboxs_hosts_alone(world):
    machine = world(Turn((ToolUse("WebFetch", {"url": "https://files.example.org/a", "prompt": "What?"}),)), says())
    machine.submit()
    assert machine.wait()["state"] == "completed", machine.tell()
    assert {(one["host"], one["port"]) for one in refusals(machine)} == {("files.example.org", 443)}


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


@pytest.mark.parametrize(("block", "reason"), REASONS)
@pytest.mark.parametrize(("vm", "reached"), [({}, 0), ({"network_mode": "full"}, 1)])
def test_a_program_inside_cannot_have_the_models_servers_fetch_either(world, block, reason, vm, reached):
    machine = world(asking_with(block), says(), says())
    machine.submit(vm=vm)
    assert machine.wait()["state"] == "completed", machine.tell()
    assert asked_with(machine, block) == reached
    assert (reason in machine.tool_results()[0]) is not bool(reached)


@pytest.mark.parametrize("status", [401, 403])
def test_a_task_whose_servers_key_is_refused_fails_at_once_and_says_why(world, status):
    machine = world(says(faults=(Fault(status=status, times=99),)))
    machine.submit()
    ended = machine.wait(seconds=40)
    assert (ended["state"], ended["error"]["code"]) == ("failed", "agent_failed"), machine.tell()
    assert f"refused the server's key ({status})" in ended["error"]["message"]
    assert len([request for request in machine.model_requests() if request["method"] == "POST"]) == 1


def test_a_task_whose_model_is_busy_for_a_moment_goes_on(world):
    machine = world(says(faults=(Fault(status=529),)))
    machine.submit()
    assert machine.wait()["state"] == "completed", machine.tell()
