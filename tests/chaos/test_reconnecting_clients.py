"""Six follow two running tasks while the server is killed and ended, and nobody misses or repeats a word.

Once each here, with two followers of each kind; `script/chaos` plays fifty with twenty.
"""

import os

import pytest

from chaos.reconnecting_clients import CommandFollower
from chaos.restarts import FEW, play_restarts
from doubles.sample_tasks import seed

RESTARTS = 2


@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="other users' sandboxes have no control groups to find them by")
def test_each_has_the_journal(tmp_path):
    restarted = play_restarts(tmp_path, RESTARTS, seed(), tasks=2, kinds=FEW)
    assert restarted.broken == []
    assert restarted.followers == len(FEW)
    assert len(restarted.connections) == len(FEW) - FEW.count(CommandFollower)
    assert min(restarted.connections) > 1, "somebody never lost the server"
