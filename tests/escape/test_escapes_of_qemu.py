"""The battery of attacks over the runtime qemu: a sample, unless it is to be asked everything."""

import pytest

from doubles.tiers import QEMU_WHOLE, need_parts_of_guests
from escape.battery_on_a_tier import Held
from escape.battlefield import ATTACKS, Battlefield

SAMPLE = {"network": ATTACKS["network"][::12], "credentials": ATTACKS["credentials"][::12], "resources": ()}


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    need_parts_of_guests()
    with Battlefield(tmp_path_factory.mktemp("qemu"), "qemu", attacks=ATTACKS if QEMU_WHOLE else SAMPLE) as played:
        yield played


class TestBatteryOnQemu(Held):
    pass
