"""Whatever is killed, in whatever state a task is: what was promised of it is kept.

For every state one of its victims here, by chance; `script/chaos` plays them all in many rounds. What a promise is
stands in oracle.py. SANDBOX_TEST_SEED=N, as printed, deals the same again.
"""

import os
import random

import pytest

from chaos.rounds import cells, deal, play
from doubles.runtimes import need_runtime
from doubles.sample_tasks import seed

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0, reason="other users' sandboxes have no control groups to find them by"),
]


def every_state(chance):
    """Each with one of all victims; and the loss of all that knows of an agent at work."""
    return {*deal(chance, "server", "each", "all"), ("all", "running")}


def every_sandbox(chance):
    """What gVisor answers for: that a sandbox ends, and that somebody else can end it and keep the agent's work."""
    return {chance.choice(sorted(cells("sandbox"))), ("runner", "running")}


@pytest.mark.parametrize(("runtime", "choose"), [("bubblewrap", every_state), ("gvisor", every_sandbox)])
def test_every_promise_is_kept(tmp_path, runtime, choose):
    need_runtime(runtime, tmp_path / "probe")
    (tmp_path / "machine").mkdir()
    number = seed()
    chosen = choose(random.Random(number))
    found = play(tmp_path / "machine", runtime, chosen, number)
    assert [str(broken) for broken in found.broken] == []
    assert found.met >= chosen
