"""Each manifest in the cookbook runs as printed and does what the page says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from doubles.deployment import Deployment, bash_turn, git, make_repository, reply_turn
from sandbox.demo.scripted_model import Fault, ToolUse, Turn
from sandbox.runtimes.nodejs import pinned_packages

PAGE = (Path(__file__).parents[2] / "docs" / "cookbook.md").read_text()
SECTIONS = {title: body for title, _, body in (part.partition("\n") for part in PAGE.split("\n## ")[1:])}
RECIPES = {
    title: re.findall(r"^```yaml\n(.*?)^```", body, re.MULTILINE | re.DOTALL) for title, body in SECTIONS.items()
}
GITHUB_TOKEN, INDEX_URL = "token-of-the-cookbook", "https://user:password-of-the-index@packages.example.com/simple"
FILES = {
    "calc.py": "def total(a, b):\n    return a - b\n",
    "test_calc.py": (
        "import unittest\nfrom calc import total\n\n\n"
        "class CalcTest(unittest.TestCase):\n    def test_total(self):\n        self.assertEqual(total(1, 2), 3)\n"
    ),
    "requirements.txt": "httplib==1.4\n",
    "services/billing/invoice.py": "TAX = 19\n",
    "data/orders.csv": "month,cents\n2026-01,1200\n2026-01,300\n2026-02,50\n",
}
REPORT_PROGRAM = """\
import collections, csv, pathlib
months = collections.Counter()
for row in csv.DictReader(open("data/orders.csv")): months[row["month"]] += int(row["cents"])
pathlib.Path("report").mkdir()
pathlib.Path("report/summary.csv").write_text("".join(f"{month},{cents}\\n" for month, cents in months.items()))
pathlib.Path("report/index.html").write_text("<p>Revenue fell.</p>")
"""


def write_turn(name, content):
    return Turn((ToolUse("Write", {"file_path": f"/workspace/{name}", "content": content}),))


FAILING_TURN = Turn((), faults=(Fault(status=403, times=100),))
SCRIPTS = {
    "The tests fail.": (bash_turn("sed -i 's/a - b/a + b/' calc.py && python3 -m unittest 2>&1"), reply_turn("Fixed.")),
    "Add unit tests": (
        bash_turn("pwd; grep -q 19 invoice.py && echo 'import invoice' > test_invoice.py"),
        reply_turn(),
    ),
    "Read GitHub issue 42": (bash_turn("echo length ${#GITHUB_TOKEN}"), reply_turn()),
    "Upgrade the HTTP library": (bash_turn("echo $PIP_INDEX_URL; sed -i s/1.4/2.0/ requirements.txt"), reply_turn()),
    "Look for injection": (write_turn("security-report.md", "# Findings\n"), reply_turn()),
    "Review the last commit": (
        bash_turn("git show --stat HEAD"),
        bash_turn("python3 calc.py"),
        write_turn("review.md", "Merge it.\n"),
        reply_turn(),
    ),
    "Which function computes": (reply_turn("calc.py:1"),),
    "Read data/orders.csv": (bash_turn(f"python3 - <<'END'\n{REPORT_PROGRAM}END"), reply_turn()),
    "Replace every call": (
        Turn(bash_turn("echo migrated > migrated.txt").content, faults=(Fault(status=403),)),
        reply_turn("Migrated."),
    ),
    "Write a program crash.py": (bash_turn("echo 'raise SystemExit(1)' > crash.py"), FAILING_TURN),
}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    deployment = Deployment(tmp_path_factory.mktemp("cookbook"))
    try:
        bare = deployment.repositories / "app.git"
        make_repository(bare, FILES)
        for branch in ("production", "feature/login"):
            git("branch", branch, "main", cwd=bare)
        deployment.start_git()
        deployment.start_model(reply_turn("No script matches the prompt."), branches=SCRIPTS)
        capacity = {f"SANDBOX_CAPACITY_{name}": "64" for name in ("CPUS", "MEMORY", "DISK")}
        deployment.start_server(GITHUB_TOKEN=GITHUB_TOKEN, PIP_INDEX_URL=INDEX_URL, **capacity)
        yield deployment
    finally:
        deployment.close()


class Result:
    """A finished task from the cookbook."""

    def __init__(self, deployment, task_id, status):
        self.task_id, self.status = task_id, status
        self._deployment = deployment

    @property
    def patch(self):
        return self.artifact(f"{self.task_id}.patch")

    def artifact(self, name):
        return self._deployment.artifact(name, self.task_id).decode()

    @property
    def artifact_names(self):
        return self._deployment.artifact_names(self.task_id)

    @property
    def output(self):
        return self._deployment.logs(self.task_id, "stdout")

    @property
    def tools(self):
        """The tools that Claude Code reported when it started."""
        lines = [json.loads(line) for line in self.artifact("transcript.ndjson").splitlines()]
        return set(next(line for line in lines if line.get("subtype") == "init")["tools"])


@pytest.fixture
def run(deployment):
    """Runs the manifest of a recipe as printed; returns its result."""

    def run(title, state="completed"):
        (manifest,) = RECIPES[title]
        response = deployment.http.post("/api/v1/tasks", content=manifest, headers={"Content-Type": "application/yaml"})
        assert response.status_code == 202, response.text
        task_id = response.json()["task_id"]
        status = deployment.wait(task_id, 100)
        assert status["state"] == state, deployment.diagnostics(task_id)
        return Result(deployment, task_id, status)

    return run


def test_each_recipe_is_run():
    source = Path(__file__).read_text()
    assert len(RECIPES) == len(SCRIPTS) == 10
    assert [title for title in RECIPES if f'run("{title}"' not in source] == []
    prompts = [yaml.safe_load(manifest)["claude"]["prompt"] for (manifest,) in RECIPES.values()]
    assert [len([word for word in SCRIPTS if word in prompt]) for prompt in prompts] == [1] * 10


def test_fix_of_failing_tests_is_in_the_patch(run, deployment):
    result = run("Fix failing tests")
    assert "+    return a + b" in result.patch
    assert re.search(r"\\nOK\b", result.output)
    listed = deployment.http.get("/api/v1/tasks?label.kind=bug").json()["tasks"]
    assert [task["id"] for task in listed] == [result.task_id]
    assert result.status["progress"]["cost_usd"] < 2


def test_agent_starts_in_the_package_of_the_monorepo(run):
    result = run("Write tests for one package of a monorepo")
    assert "+++ b/services/billing/test_invoice.py" in result.patch
    assert "/workspace/services/billing" in result.output


@pytest.mark.skipif(not pinned_packages(), reason="the pinned npm packages are not installed")
def test_github_mcp_server_is_available_with_its_token(run):
    result = run("Work on a GitHub issue")
    assert "mcp__github__get_issue" in result.tools
    assert f"length {len(GITHUB_TOKEN)}" in result.output


def test_package_index_url_is_redacted(run):
    result = run("Upgrade a dependency from your package index")
    assert "+httplib==2.0" in result.patch
    assert "[REDACTED:PIP_INDEX_URL]" in result.output
    assert "password-of-the-index" not in result.output + result.artifact("transcript.ndjson")


def test_audit_writes_a_report_without_a_shell(run):
    result = run("Audit the code and write a report")
    assert result.tools == {"Read", "Grep", "Glob", "Write"}
    assert result.artifact("security-report.md") == "# Findings\n"


def test_reviewing_agent_can_run_only_git(run):
    result = run("Review a branch from someone you do not trust")
    denied = [denial["tool_input"]["command"] for denial in result.status["result"]["permission_denials"]]
    assert denied == ["python3 calc.py"]
    assert "files changed" in result.output
    assert result.artifact("review.md") == "Merge it.\n"


def test_stdout_is_one_json_object_with_the_answer(run, deployment):
    result = run("Ask a question and use the answer in a script")
    command = [sys.executable, "-m", "sandbox", "task", "logs", result.task_id, "--stream", "stdout", "--raw"]
    environment = {"PATH": os.environ["PATH"], "SANDBOX_SERVER": deployment.server.ready_message["http"]}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(printed)["result"] == "calc.py:1"


def test_all_files_of_the_report_are_artifacts(run):
    result = run("Turn data into a report")
    assert {"summary.csv", "index.html"} <= result.artifact_names
    assert result.artifact("summary.csv") == "2026-01,1500\n2026-02,50\n"


def test_migration_is_retried_after_a_failure(run):
    result = run("A long migration that survives failures")
    assert [attempt["followed_by"] for attempt in result.status["attempts"]] == ["retry", None]
    assert "+migrated" in result.patch


def test_files_of_a_failed_task_are_kept_until_released(run, deployment):
    result = run("Keep the files of a failed task", state="failed_preserved")
    assert result.status["sandbox_kept"]
    assert "+raise SystemExit(1)" in result.patch
    assert deployment.http.delete(f"/api/v1/tasks/{result.task_id}/vm").is_success
    assert not deployment.status(result.task_id)["sandbox_kept"]
