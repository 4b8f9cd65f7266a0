"""Twenty follow five running tasks while the server is killed and ended, and nobody misses or repeats a word.

Three restarts here; `script/chaos` plays fifty.
"""

import os
import random

import pytest

from chaos.restarts import play_restarts

RESTARTS = 3


@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="other users' sandboxes have no control groups to find them by")
def test_each_has_the_journal(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    restarted = play_restarts(tmp_path, RESTARTS, seed)
    assert restarted.broken == []
    assert restarted.followers == 20
    assert restarted.connections > RESTARTS
