"""A budget in dollars is rejected for a model without a known price."""

import pytest

from doubles.fake_token_store import FakeTokenStore
from sandbox.agents.claude_code.agent import ClaudeCode

MANIFEST = """
version: "1"
kind: Task
metadata: {name: My Task}
repository: {url: "https://github.com/org/repo.git", branch: main}
claude: {prompt: Do it., model: MODEL}
lifecycle: {budget_usd: 0.05}
"""


class PricedClaudeCode(ClaudeCode):
    def has_price(self, model):
        return model == "claude-known"


@pytest.fixture
def submit(api_with_tokens):
    api = api_with_tokens(FakeTokenStore(), agents={"claude": PricedClaudeCode()})
    return lambda model: api.post("/api/v1/tasks", content=MANIFEST.replace("MODEL", model))


def test_model_without_price_is_rejected_with_its_line(submit):
    response = submit("claude-unheard-of")
    assert response.status_code == 400
    (error,) = response.json()["details"]
    assert (error["field"], error["rule"], error["line"]) == ("lifecycle.budget_usd", "not_offered", 7)


def test_model_with_price_is_accepted(submit):
    assert submit("claude-known").status_code == 202
