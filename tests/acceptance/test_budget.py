"""A task ends as soon as its budget is exhausted, without another model request."""

import json

import pytest

from doubles.deployment import bash_turn, reply_turn


def with_cost(turn):
    """Return a turn that uses 2000 tokens and so costs 0.018 USD at Sonnet 4.5 prices."""
    from msgspec.structs import replace

    return replace(turn, input_tokens=1000, output_tokens=1000)


def message_requests(deployment):
    """Return the message requests that reached the model."""
    posts = [request for request in deployment.model_requests() if request["method"] == "POST"]
    return [request for request in posts if request["path"].partition("?")[0] == "/v1/messages"]


@pytest.mark.parametrize(
    ("exhausted_budget", "unexhausted_budget", "turns"),
    [({"budget_usd": 0.05}, {"budget_tokens": 100_000}, 3), ({"budget_tokens": 7000}, {"budget_usd": 1.0}, 4)],
)
def test_task_ends_when_the_first_budget_is_exhausted(deploy, exhausted_budget, unexhausted_budget, turns):
    deployment = deploy(*[with_cost(bash_turn("true"))] * 60, with_cost(reply_turn()))
    deployment.submit(lifecycle={**exhausted_budget, **unexhausted_budget})
    status = deployment.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "budget_exceeded"), deployment.diagnostics()
    [(name, amount)] = exhausted_budget.items()
    limit = f"{amount:,} tokens" if name == "budget_tokens" else f"{amount} USD"
    assert status["error"]["message"].startswith(f"lifecycle.{name} ({limit}) is spent; ")
    assert len(message_requests(deployment)) == turns
    assert "authenticate" not in deployment.logs(), "Claude Code adds this word to the gateway's message"
    events = [json.loads(line.partition("[EVENT] ")[2]) for line in deployment.logs(stream="events").splitlines()]
    assert sum(event["type"] == "usage" for event in events) == turns
    assert status["progress"]["cost_usd"] == pytest.approx(0.018 * turns)
