"""Detects whether KVM works. The existence of the device is no proof, so KVM is tested. A failure is stored."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sandbox.model.fixed_limits import KILL_TIMEOUT_SECONDS

_FAILURE_FILE = "kvm-does-not-work"
_SELFTEST_PROGRAM = Path(__file__).with_name("kvm_selftest.py")
_SELFTEST_SECONDS = 20.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class KvmStatus:
    """Stores whether KVM failed, for all processes with this run directory, until a reboot or the next probe."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / _FAILURE_FILE

    def is_accessible(self) -> bool:
        """Return whether there is a usable device."""
        return os.access("/dev/kvm", os.R_OK | os.W_OK)

    def is_usable(self) -> bool:
        """Return whether there is a usable device and KVM has not failed since the machine booted."""
        if not self.is_accessible():
            return False
        try:
            return self._file.read_text() != _BOOT_ID.read_text()
        except OSError:
            return True

    async def is_too_slow(self, *arguments: str) -> bool:
        """Return whether a guest that runs a counting loop is too slow twice in a row. Takes up to 40 s.

        arguments: see `kvm_selftest.py`. The guest runs twice, because a pause of the whole machine can look like CPU
        use. A self-test that times out without using its CPU time is not considered too slow.
        """
        return await _is_selftest_too_slow(arguments) and await _is_selftest_too_slow(arguments)

    def record_failure(self) -> None:
        """Record a failure of KVM: no guest boots, even with more time, or guests are too slow."""
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(_BOOT_ID.read_text())

    def reset(self) -> None:
        """Remove a stored failure."""
        self._file.unlink(missing_ok=True)


async def _is_selftest_too_slow(arguments: Sequence[str]) -> bool:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-ISE", str(_SELFTEST_PROGRAM), *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={},
    )
    try:
        return await asyncio.wait_for(process.wait(), _SELFTEST_SECONDS) == -signal.SIGPROF
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            process.kill()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), KILL_TIMEOUT_SECONDS)
