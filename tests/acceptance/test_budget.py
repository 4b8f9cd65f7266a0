"""A task that would spend too much is ended when its budget is reached, and not one model request later."""

import json

import pytest

from doubles.live_server import bash, says


def spend(turn):
    """This turn costs 0.018 USD at the prices of Sonnet 4.5, and 2000 tokens."""
    from msgspec.structs import replace

    return replace(turn, input_tokens=1000, output_tokens=1000)


def answered(world):
    """Requests for an answer that reached the model."""
    asked = [request for request in world.model_requests() if request["method"] == "POST"]
    return [request for request in asked if request["path"].partition("?")[0] == "/v1/messages"]


@pytest.mark.parametrize(
    ("spent", "ample", "turns"),
    [({"budget_usd": 0.05}, {"budget_tokens": 100_000}, 3), ({"budget_tokens": 7000}, {"budget_usd": 1.0}, 4)],
)
def test_a_script_that_would_spend_a_dollar_ends_at_the_budget_that_is_spent_first(world, spent, ample, turns):
    machine = world(*[spend(bash("true"))] * 60, spend(says()))
    machine.submit(lifecycle={**spent, **ample})
    status = machine.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "budget_exceeded"), machine.tell()
    assert f"lifecycle.{next(iter(spent))} is spent" in status["error"]["message"]
    assert len(answered(machine)) == turns
    events = [json.loads(line.partition("[EVENT] ")[2]) for line in machine.logs(stream="events").splitlines()]
    assert sum(event["type"] == "usage" for event in events) == turns
    assert status["progress"]["cost_usd"] == pytest.approx(0.018 * turns)
