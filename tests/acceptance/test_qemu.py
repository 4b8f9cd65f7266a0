"""The main job in a guest of QEMU's, by the agent itself."""

import os

import pytest

from doubles.leftovers import left_behind
from doubles.live_server import SERVER_KEY, bash, says, until
from doubles.runtimes import QEMU_WHOLE, need_runtime

SCRIPT = """uname -r > kernel.txt; echo told >&2; echo more >> README.md
for n in 1 2; do echo forged > /proc/$PPID/fd/$n || echo refused >> refused.txt; done
head -c 1 /proc/$PPID/environ || echo hidden > hidden.txt
exit 3"""


@pytest.fixture
def machine(empty_world, world, tmp_path):
    """Makes a machine with QEMU, which is as it was before, 5 seconds after its task has ended."""
    if not QEMU_WHOLE:
        pytest.skip("qemu is asked for a sample; script/test-qemu asks it everything")
    need_runtime("qemu", tmp_path / "probe")
    empty_world.runtime = "qemu"
    yield world
    until(lambda: not left_behind(empty_world.data_dir), 5, "the guest to be gone without a trace")


@pytest.mark.timeout(400)
def test_the_agent_works_in_a_guest_and_its_changes_come_back(machine):
    here = machine(bash(SCRIPT), says("All done."))
    here.submit()
    status = here.wait(seconds=300)
    assert status["state"] == "completed", here.tell()
    assert (status["vm"]["runtime"], status["vm"]["tier"], status["exit_code"]) == ("qemu", "vm", 0)
    patch = here.artifact("task-1.patch").decode()
    assert "+more" in patch
    assert f"+{os.uname().release}\n" not in patch
    assert patch.count("+refused") == 2
    assert "+hidden" in patch
    assert status["progress"]["input_tokens"] > 0
    assert "Exit code 3" in here.tool_results()[0]
    assert SERVER_KEY not in here.logs()
