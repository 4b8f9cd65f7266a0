"""The real server's responses match `openapi.json`, for valid and invalid requests generated from it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from doubles.deployment import make_repository, reply_turn
from doubles.fake_agent import make_fake_agent

DRAIN_OPERATION = "POST /api/v1/admin/drain"
"""The operation that the test omits: a drained server rejects tasks, which would affect all other requests."""

SETTINGS = Path(__file__).with_name("schemathesis.toml")
HOOKS = "doubles.schemathesis_hooks"


@pytest.mark.timeout(300)
def test_responses_match_the_schema(deployment, tmp_path):
    make_repository(deployment.repositories / "repo.git", {"README.md": "# A repository\n"})
    deployment.start_git()
    deployment.start_model(reply_turn())
    # Generated requests also start tasks; their results do not matter.
    agent = make_fake_agent(tmp_path / "agent", [])
    deployment.start_server(SANDBOX_ACCESS_REQUESTS_PER_MINUTE="0", PYTHONPATH=str(agent))
    deployment.submit()
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    base_url = deployment.server.ready_message["http"]
    completed = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(SETTINGS),
            "run", f"{base_url}/openapi.json", "--max-examples", "5", "--seed", "1",
            "--no-shrink", "--continue-on-failure", "--request-timeout", "60", "--exclude-name", DRAIN_OPERATION,
        ],
        env={**os.environ, "SCHEMATHESIS_HOOKS": HOOKS, "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stdout[-20_000:] + completed.stderr[-3000:]
    assert int(re.search(r"(\d+) generated", completed.stdout)[1]) > 300
    operations = httpx2.get(f"{base_url}/openapi.json").json()["paths"].values()
    assert f"Tested: {sum(map(len, operations)) - 1}\n" in completed.stdout
    assert "Traceback" not in deployment.server.log.read_text()
