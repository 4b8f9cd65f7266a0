"""`openapi.json` is true for every answer: requests made from it, good and bad, are held against the real server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx

from doubles.live_server import make_repository, says
from doubles.stand_in_agent import make_stand_in

DRAINS = "POST /api/v1/admin/drain"
"""Left out: after it the server rightly takes no tasks, and all other requests would be asked of such a one."""

SETTINGS = Path(__file__).with_name("schemathesis.toml")
HOOKS = "doubles.schemathesis_hooks"


def test_no_answer_is_other_than_the_schema_says(empty_world, tmp_path):
    machine = empty_world
    make_repository(machine.repositories / "repo.git", {"README.md": "# A repository\n"})
    machine.start_git()
    machine.start_model(says())
    # What is generated begins some tasks too, of which nothing is asked but how they are told of.
    agent = make_stand_in(tmp_path / "agent", [])
    machine.start_server(SANDBOX_ACCESS_REQUESTS_PER_MINUTE="0", PYTHONPATH=str(agent))
    machine.submit()
    assert machine.wait()["state"] == "completed", machine.tell()
    address = machine.server.said["http"]
    ran = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(SETTINGS),
            "run", f"{address}/openapi.json", "--max-examples", "8", "--seed", "1",
            "--no-shrink", "--continue-on-failure", "--request-timeout", "60", "--exclude-name", DRAINS,
        ],
        env={**os.environ, "SCHEMATHESIS_HOOKS": HOOKS, "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-3000:]
    assert int(re.search(r"(\d+) generated", ran.stdout)[1]) > 300
    operations = httpx.get(f"{address}/openapi.json").json()["paths"].values()
    assert f"Tested: {sum(map(len, operations)) - 1}\n" in ran.stdout
    assert "Traceback" not in machine.server.log.read_text()
