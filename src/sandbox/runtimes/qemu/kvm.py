"""Whether KVM works here. That its device is there says little, so it is tried, and a failure is kept in mind."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sandbox.model.limits import KILL_SECONDS

_FAILURE_FILE = "kvm-does-not-work"
_SELFTEST_PROGRAM = Path(__file__).with_name("kvm_selftest.py")
_SELFTEST_SECONDS = 20.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class KvmStatus:
    """Shared by all processes that have the run directory, until the machine boots again or it is probed."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / _FAILURE_FILE

    def is_present(self) -> bool:
        """There is a device."""
        return os.access("/dev/kvm", os.R_OK | os.W_OK)

    def is_usable(self) -> bool:
        """There is a device, and it has not failed since the machine was booted."""
        if not self.is_present():
            return False
        try:
            return self._file.read_text() != _BOOT_ID.read_text()
        except OSError:
            return True

    async def is_too_slow(self, *arguments: str) -> bool:
        """A guest that counts does not come to its end soon, twice; within 40 s. arguments: see `counting_guest.py`.

        Twice, because a pause of the whole machine can look like work. One that only waits tells nothing.
        """
        return await _is_selftest_too_slow(arguments) and await _is_selftest_too_slow(arguments)

    def record_failure(self) -> None:
        """No guest boots with it, however much time it has."""
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(_BOOT_ID.read_text())

    def reset(self) -> None:
        """Try again."""
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
                await asyncio.wait_for(process.wait(), KILL_SECONDS)
