"""A user checks a budget in dollars before there is a server."""

MANIFEST = """
version: "1"
kind: Task
metadata: {name: My Task}
repository: {url: "https://github.com/org/repo.git", branch: main}
claude: {prompt: Do it., model: MODEL}
lifecycle: {budget_usd: 0.05}
"""


def test_a_budget_in_dollars_needs_a_model_whose_price_is_known(sandbox, tmp_path):
    (tmp_path / "known.yaml").write_text(MANIFEST.replace("MODEL", "claude-sonnet-4-5-20250929"))
    (tmp_path / "unknown.yaml").write_text(MANIFEST.replace("MODEL", "claude-unheard-of"))
    assert sandbox("task", "validate", "known.yaml").returncode == 0
    refused = sandbox("task", "validate", "unknown.yaml")
    assert refused.returncode == 9
    assert b"give budget_tokens instead" in refused.stdout
