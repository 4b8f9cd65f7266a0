"""The attacks with the QEMU runtime: a sample with a fake agent, unless all QEMU tests are enabled.

Claude Code takes a minute to start in an emulated guest. tests/integration/runtimes checks that Claude Code runs in a
guest, and `script/test-qemu` runs all attacks with it.
"""

import pytest

from doubles.runtime_availability import RUN_ALL_QEMU_TESTS, require_qemu_components
from escape.attack_run import ATTACKS, AttackRun
from escape.escape_tests import EscapeTests

_SAMPLED = {
    "network": (
        "UDP to the metadata address",
        "the server's ports on loopback",
        "DNS query for a name that is not allowed",
        "TLS with another server name (SNI)",
        "model gateway without the task's key",
        "a vsock connection to the host",
        "a Unix socket file of the host",
    ),
    "credentials": (
        "the server's data directory",
        "the memory of the init process",
        "a mount over /etc, as root of a user namespace",
        "writing core_pattern",
        "a kernel module",
        "the host's memory or disk devices",
    ),
    "resources": (),
}
SAMPLE = {
    kind: tuple(next(attack for attack in ATTACKS[kind] if attack.name == name) for name in names)
    for kind, names in _SAMPLED.items()
}
"""Attacks on the guest's devices, network, files and kernel; the others do not depend on the runtime."""


@pytest.fixture(scope="module")
def attack_run(tmp_path_factory):
    require_qemu_components()
    sample = {} if RUN_ALL_QEMU_TESTS else {"attacks": SAMPLE, "has_fake_agent": True}
    with AttackRun(tmp_path_factory.mktemp("qemu"), "qemu", **sample) as run:
        yield run


class TestEscapesOfQemu(EscapeTests):
    pass
