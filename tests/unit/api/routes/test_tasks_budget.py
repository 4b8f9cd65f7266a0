"""A budget in dollars is refused at the door where nobody knows what the model costs."""

import pytest

from doubles.fake_access import FakeAccess

MANIFEST = """
version: "1"
kind: Task
metadata: {name: My Task}
repository: {url: "https://github.com/org/repo.git", branch: main}
claude: {prompt: Do it., model: MODEL}
lifecycle: {budget_usd: 0.05}
"""


@pytest.fixture
def submit(guarded_api):
    api = guarded_api(FakeAccess(), priced=lambda model: model == "claude-known")
    return lambda model: api.post("/api/v1/tasks", content=MANIFEST.replace("MODEL", model))


def test_a_model_without_a_price_is_told_with_its_place(submit):
    answer = submit("claude-unheard-of")
    assert answer.status_code == 400
    (mistake,) = answer.json()["details"]
    assert (mistake["field"], mistake["rule"], mistake["line"]) == ("lifecycle.budget_usd", "not_offered", 7)


def test_a_model_with_a_price_is_taken(submit):
    assert submit("claude-known").status_code == 202
