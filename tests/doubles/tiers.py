"""What works on the machine that the tests run on."""

import asyncio
import os

import pytest

from sandbox.wiring.runtime import make_runtime

QEMU_WHOLE = os.environ.get("SANDBOX_TESTS_QEMU") == "whole"
"""Whether qemu is asked everything, as by `script/test-qemu`, and not a sample: without KVM a guest boots for half a
minute, and all of its tests take an hour."""


def need_runtime(name, run_dir):
    """Skips the test, with what to mend, where sandboxes of this runtime cannot be made."""
    probe = asyncio.run(make_runtime(name, run_dir).probe())
    if not probe.works:
        pytest.skip(f"{name} does not work here: {probe.mend}")
