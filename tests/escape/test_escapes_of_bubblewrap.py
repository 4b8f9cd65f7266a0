"""The battery of attacks over the runtime bubblewrap."""

import pytest

from escape.battery_on_a_runtime import Held, fought


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    with fought(tmp_path_factory.mktemp("bubblewrap"), "bubblewrap") as played:
        yield played


class TestBatteryOnBubblewrap(Held):
    pass
