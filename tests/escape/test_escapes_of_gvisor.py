"""The battery of attacks over the runtime gvisor, without those that bubblewrap's passes to the same gateway.

There a system call costs a hundred times what it costs elsewhere; `script/escape-battery` plays all of them.
"""

import pytest

from escape.attack_runner import ATTACKS_ON_A_TIER
from escape.battery_on_a_runtime import Held, fought


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    with fought(tmp_path_factory.mktemp("gvisor"), "gvisor", ATTACKS_ON_A_TIER) as played:
        yield played


class TestBatteryOnGvisor(Held):
    pass
