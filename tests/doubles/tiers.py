"""What works on the machine that the tests run on."""

import asyncio

import pytest

from sandbox.wiring.runtime import make_runtime


def need_runtime(name, run_dir):
    """Skips the test, with what to mend, where sandboxes of this runtime cannot be made."""
    probe = asyncio.run(make_runtime(name, run_dir).probe())
    if not probe.works:
        pytest.skip(f"{name} does not work here: {probe.mend}")
