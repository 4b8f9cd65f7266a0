"""The battery of attacks over the runtime qemu: a sample, unless it is to be asked everything."""

import pytest

from doubles.tiers import QEMU_WHOLE
from escape.battery_on_a_tier import Held, fought
from escape.battlefield import ATTACKS

SAMPLE = {"network": ATTACKS["network"][::8], "credentials": ATTACKS["credentials"][::8], "resources": ()}


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    with fought(tmp_path_factory.mktemp("qemu"), "qemu", attacks=ATTACKS if QEMU_WHOLE else SAMPLE) as played:
        yield played


class TestBatteryOnQemu(Held):
    pass
