"""What works on the machine that the tests run on."""

import asyncio
import os
from functools import cache
from pathlib import Path

import pytest

from sandbox.bootstrap.runtime import make_runtime
from sandbox.model.errors import AttemptError
from sandbox.runtimes.qemu.kvm import KvmStatus
from sandbox.runtimes.qemu.parts import find_components

QEMU_WHOLE = os.environ.get("SANDBOX_TESTS_QEMU") == "whole"
"""Whether qemu is asked everything, as by `script/test-qemu`, and not a sample: without KVM a guest boots for many
seconds, and all of its tests take an hour."""

_found = {}


def look_at_runtime(name, run_dir):
    """What this runtime can do here.

    A process of tests looks once: the machine is the same for all of them, and to look is to boot a guest.
    """
    if name not in _found:
        _found[name] = asyncio.run(make_runtime(name, run_dir).probe())
    return _found[name]


def need_runtime(name, run_dir):
    """Skips the test, with what to mend, where sandboxes of this runtime cannot be made; gives what was found."""
    found = look_at_runtime(name, run_dir)
    if not found.is_available:
        pytest.skip(f"{name} does not work here: {found.remedy}")
    return found


def need_parts_of_guests():
    """Skips the test where guests cannot be; where they can, one that does not boot is a failure, not skipped."""
    if os.getuid() != 0 or os.uname().machine != "x86_64":
        pytest.skip("qemu is for root, on x86_64")
    try:
        find_components()
    except AttemptError as error:
        pytest.skip(str(error))


def tell_of_kvm(run_dir):
    """As a probe tells the runners of its server, where KVM is too slow to boot a guest with."""
    finding = KvmStatus(run_dir)
    if finding.is_present() and _is_kvm_too_slow():
        finding.record_failure()


@cache
def _is_kvm_too_slow():
    return asyncio.run(KvmStatus(Path("/nonexistent")).is_too_slow())
