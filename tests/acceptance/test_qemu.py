"""End-to-end test of a task in a QEMU guest, with the real agent."""

import os

import pytest

from doubles.deployment import SERVER_KEY, bash_turn, reply_turn, wait_until
from doubles.leftovers import find_leftovers
from doubles.runtime_availability import RUN_ALL_QEMU_TESTS, require_runtime

SCRIPT = """uname -r > kernel.txt; echo told >&2; echo more >> README.md
for n in 1 2; do echo forged > /proc/$PPID/fd/$n || echo refused >> refused.txt; done
head -c 1 /proc/$PPID/environ || echo hidden > hidden.txt
exit 3"""


@pytest.fixture
def deploy_qemu(deployment, deploy, tmp_path):
    """Like `deploy` with QEMU; fails if leftovers of the task remain 5 seconds after its end."""
    if not RUN_ALL_QEMU_TESTS:
        pytest.skip("only a sample runs with QEMU; script/test-qemu runs all tests")
    require_runtime("qemu", tmp_path / "probe")
    deployment.runtime = "qemu"
    yield deploy
    wait_until(lambda: not find_leftovers(deployment.data_dir), 5, "the removal of the guest")


@pytest.mark.timeout(400)
def test_agent_runs_in_a_guest_and_its_patch_is_collected(deploy_qemu):
    deployment = deploy_qemu(bash_turn(SCRIPT), reply_turn("All done."))
    deployment.submit()
    status = deployment.wait(seconds=300)
    assert status["state"] == "completed", deployment.diagnostics()
    assert (status["vm"]["runtime"], status["vm"]["tier"], status["exit_code"]) == ("qemu", "vm", 0)
    patch = deployment.artifact("task-1.patch").decode()
    assert "+more" in patch
    assert f"+{os.uname().release}\n" not in patch
    assert patch.count("+refused") == 2
    assert "+hidden" in patch
    assert status["progress"]["input_tokens"] > 0
    assert "Exit code 3" in deployment.tool_results()[0]
    assert SERVER_KEY not in deployment.logs()
