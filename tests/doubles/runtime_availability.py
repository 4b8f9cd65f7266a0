"""Availability of runtimes on the test machine."""

import asyncio
import os
from functools import cache
from pathlib import Path

import pytest

from sandbox.bootstrap.runtime_selection import make_runtime
from sandbox.model.failure import AttemptError
from sandbox.runtimes.qemu.guest_components import find_components
from sandbox.runtimes.qemu.runtime import KvmStatus

RUN_ALL_QEMU_TESTS = os.environ.get("SANDBOX_TESTS_QEMU") == "whole"
"""Whether all QEMU tests run, as in `script/test-qemu`, or only a sample. Without KVM, all tests take an hour, since a
guest takes many seconds to boot."""

_probes = {}


def probe_runtime(name, run_dir):
    """Probe a runtime once per test process, since a probe may boot a guest."""
    if name not in _probes:
        _probes[name] = asyncio.run(make_runtime(name, run_dir).probe())
    return _probes[name]


def require_runtime(name, run_dir):
    """Return the runtime's probe result. If the runtime is not available, skip the test and give the remedy."""
    probe = probe_runtime(name, run_dir)
    if not probe.is_available:
        pytest.skip(f"{name} does not work here: {probe.remedy}")
    return probe


def require_qemu_components():
    """Skip the test if QEMU's components are missing. If they are present, a guest must boot."""
    if os.getuid() != 0 or os.uname().machine != "x86_64":
        pytest.skip("QEMU needs root and x86_64")
    try:
        find_components()
    except AttemptError as error:
        pytest.skip(str(error))


def record_slow_kvm(run_dir):
    """Record that KVM is too slow to boot a guest, as a probe does for the server's runners."""
    status = KvmStatus(run_dir)
    if status.is_accessible() and _is_kvm_too_slow():
        status.record_failure()


@cache
def _is_kvm_too_slow():
    return asyncio.run(KvmStatus(Path("/nonexistent")).fails_speed_selftest())
