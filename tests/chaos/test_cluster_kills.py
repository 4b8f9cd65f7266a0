"""The guarantees of oracle.py hold on the hosts of a Slurm cluster.

This is a sample: a fault in each state, and the loss of the server. `script/chaos --engine slurm` applies all faults.
Set SANDBOX_TEST_SEED to the printed seed to repeat a choice.
"""

import random

import pytest

from chaos.cluster_rounds import TASK_TARGETS, create_cluster, run_cluster_round, task_faults
from doubles.random_seed import seed
from doubles.slurm_cluster import require_slurm


def one_target_per_state(rng):
    by_state = {}
    for target, state, retries in task_faults(TASK_TARGETS):
        by_state.setdefault(state, []).append((target, state, retries))
    return [rng.choice(faults) for faults in by_state.values()]


@pytest.mark.timeout(600)
def test_faults_on_hosts_violate_no_guarantee(tmp_path):
    require_slurm()
    number = seed()
    chosen_faults = one_target_per_state(random.Random(number))
    with create_cluster() as cluster:
        result = run_cluster_round(tmp_path, cluster, [chosen_faults, "server"], number)
    assert [str(violation) for violation in result.violations] == []
    affected = {(target, state) for target, state, _ in result.outcomes}
    assert affected >= {(target, state) for target, state, _ in chosen_faults}
    assert ("server", "running") in affected
