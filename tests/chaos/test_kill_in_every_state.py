"""The guarantees of oracle.py hold for any kill target in any state.

These tests choose one random kill target per state; `script/chaos` tests all of them in many rounds. Set
SANDBOX_TEST_SEED to the printed seed to repeat a choice.
"""

import os
import random

import pytest

from chaos.rounds import pick_pairs, run_round, target_state_pairs
from doubles.random_seed import seed
from doubles.runtime_availability import require_runtime

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sandbox processes are found by their control groups"),
]


def one_target_per_state(rng):
    """Return one kill target per state, and one that kills everything while an agent is running."""
    return {*pick_pairs(rng, "server", "each", "all"), ("all", "running")}


def gvisor_pairs(rng):
    """Return the kills whose outcome depends on gVisor.

    These are kills of a sandbox, and of a runner whose sandbox another process must end.
    """
    return {rng.choice(sorted(target_state_pairs("sandbox"))), ("runner", "running")}


@pytest.mark.parametrize(("runtime", "choose_pairs"), [("bubblewrap", one_target_per_state), ("gvisor", gvisor_pairs)])
def test_kills_violate_no_guarantee(tmp_path, runtime, choose_pairs):
    require_runtime(runtime, tmp_path / "probe")
    (tmp_path / "deployment").mkdir()
    number = seed()
    chosen_pairs = choose_pairs(random.Random(number))
    result = run_round(tmp_path / "deployment", runtime, chosen_pairs, number)
    assert [str(violation) for violation in result.violations] == []
    assert result.covered >= chosen_pairs
