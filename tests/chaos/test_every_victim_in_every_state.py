"""Whatever is killed, in whatever state a task is: what was promised of it is kept.

Once for each pair here; `script/chaos` plays many rounds. What a promise is stands in oracle.py.
"""

import os
import random

import pytest

from chaos.rounds import cells, play
from doubles.tiers import need_runtime

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0, reason="other users' sandboxes have no control groups to find them by"),
]


@pytest.mark.parametrize(
    ("runtime", "victim"),
    [("bubblewrap", "server"), ("bubblewrap", "each"), ("bubblewrap", "all"), ("gvisor", "each")],
)
def test_every_promise_is_kept(tmp_path, runtime, victim):
    need_runtime(runtime, tmp_path / "probe")
    # Not one that the order of the tests decides.
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    (tmp_path / "machine").mkdir()
    found = play(tmp_path / "machine", runtime, victim, seed)
    assert [str(broken) for broken in found.broken] == []
    assert found.met >= cells(victim)
