"""KVM is given up only where two guests, one after the other, have worked for nothing."""

import asyncio
import time
from pathlib import Path

import pytest

from sandbox.runtimes.qemu import kvm

WORKS_IN_VAIN = "import os, signal; os.kill(os.getpid(), signal.SIGPROF)"


@pytest.fixture
def is_too_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whether KVM is, where this program plays the guest."""

    def ask(program: str) -> bool:
        place = tmp_path / "guest.py"
        place.write_text(program)
        monkeypatch.setattr(kvm, "_SELFTEST_PROGRAM", place)
        return asyncio.run(kvm.KvmStatus(tmp_path / "run").is_too_slow(str(tmp_path / "note")))

    return ask


def test_two_that_work_in_vain_are_enough(is_too_slow):
    assert is_too_slow(WORKS_IN_VAIN)


def test_one_is_not_when_the_next_comes_to_its_end(is_too_slow):
    assert not is_too_slow(f"import sys\ntry:\n    open(sys.argv[1], 'x')\nexcept OSError: sys.exit()\n{WORKS_IN_VAIN}")


@pytest.mark.parametrize("ending", ["import sys; sys.exit(0)", "raise OSError('no memory')"])
def test_one_that_ends_by_itself_is_none(is_too_slow, ending):
    assert not is_too_slow(ending)


def test_one_that_only_waits_is_ended_and_tells_nothing(is_too_slow, tmp_path, monkeypatch):
    monkeypatch.setattr(kvm, "_SELFTEST_SECONDS", 1.0)
    waits = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    began = time.monotonic()
    assert not is_too_slow(waits)
    assert time.monotonic() < began + 60
    assert not Path("/proc", (tmp_path / "note").read_text()).exists()
