"""KVM is disabled only if two self-test guests in a row are too slow."""

import asyncio
import time
from pathlib import Path

import pytest

from sandbox.runtimes.qemu import runtime

EXHAUSTS_CPU_TIME = "import os, signal; os.kill(os.getpid(), signal.SIGPROF)"


@pytest.fixture
def fails_speed_selftest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs a program as the self-test guest and returns whether KVM is too slow."""

    def run(program: str) -> bool:
        path = tmp_path / "guest.py"
        path.write_text(program)
        monkeypatch.setattr(runtime, "_SELFTEST_PROGRAM", path)
        return asyncio.run(runtime.KvmStatus(tmp_path / "run").fails_speed_selftest(str(tmp_path / "note")))

    return run


def test_two_slow_guests_disable_kvm(fails_speed_selftest):
    assert fails_speed_selftest(EXHAUSTS_CPU_TIME)


def test_one_slow_guest_does_not_disable_kvm(fails_speed_selftest):
    assert not fails_speed_selftest(
        f"import sys\ntry:\n    open(sys.argv[1], 'x')\nexcept OSError: sys.exit()\n{EXHAUSTS_CPU_TIME}"
    )


@pytest.mark.parametrize("program", ["import sys; sys.exit(0)", "raise OSError('no memory')"])
def test_guest_that_exits_does_not_disable_kvm(fails_speed_selftest, program):
    assert not fails_speed_selftest(program)


def test_hanging_guest_is_killed_and_does_not_disable_kvm(fails_speed_selftest, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "_SELFTEST_SECONDS", 1.0)
    waiting_program = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    started = time.monotonic()
    assert not fails_speed_selftest(waiting_program)
    assert time.monotonic() < started + 60
    assert not Path("/proc", (tmp_path / "note").read_text()).exists()
