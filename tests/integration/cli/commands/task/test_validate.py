"""`sandbox task validate` checks a budget in dollars without a server."""

MANIFEST = """
version: "1"
kind: Task
metadata: {name: My Task}
repository: {url: "https://github.com/org/repo.git", branch: main}
claude: {prompt: Do it., model: MODEL}
lifecycle: {budget_usd: 0.05}
"""


def test_budget_in_dollars_needs_a_model_with_a_known_price(run_cli, tmp_path):
    (tmp_path / "known.yaml").write_text(MANIFEST.replace("MODEL", "claude-sonnet-4-5-20250929"))
    (tmp_path / "unknown.yaml").write_text(MANIFEST.replace("MODEL", "claude-unheard-of"))
    assert run_cli("task", "validate", "known.yaml").returncode == 0
    result = run_cli("task", "validate", "unknown.yaml")
    assert result.returncode == 9
    assert b"set budget_tokens instead" in result.stdout
