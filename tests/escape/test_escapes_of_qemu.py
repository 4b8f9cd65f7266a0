"""The battery of attacks over the runtime qemu: a sample by a stand-in, unless it is to be asked everything.

Claude Code takes a minute of an emulated guest before its first word; that it runs in one is asked beside the guests of
tests/integration/runtimes, and of all that it does there by `script/test-qemu`.
"""

import pytest

from doubles.runtimes import QEMU_WHOLE, need_parts_of_guests
from escape.attack_runner import ATTACKS, Battlefield
from escape.battery_on_a_runtime import Held

_SAMPLED = {
    "network": (
        "UDP to the metadata address",
        "the server's ports on loopback",
        "DNS for a name that is not allowed",
        "TLS for another name on an allowed address",
        "the model's door without the task's key",
        "a vsock to the host",
        "a Unix socket file of the host's",
    ),
    "credentials": (
        "the server's data",
        "the memory of the first process inside",
        "a file system over /etc, as root of a user namespace",
        "writing core_pattern",
        "a kernel module",
        "the host's memory or disks",
    ),
    "resources": (),
}
SAMPLE = {
    kind: tuple(next(one for one in ATTACKS[kind] if one.name == name) for name in names)
    for kind, names in _SAMPLED.items()
}
"""What meets the guest's own devices, network, files and kernel: the rest is decided by what all tiers have alike."""


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    need_parts_of_guests()
    sample = {} if QEMU_WHOLE else {"attacks": SAMPLE, "has_stand_in": True}
    with Battlefield(tmp_path_factory.mktemp("qemu"), "qemu", **sample) as played:
        yield played


class TestBatteryOnQemu(Held):
    pass
