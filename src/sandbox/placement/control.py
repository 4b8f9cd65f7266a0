"""Speaks to a runner on its control socket."""

import asyncio
import contextlib
import re
import socket
import stat
import time
from pathlib import Path

import msgspec

from sandbox.contracts.layout import runner_socket
from sandbox.contracts.placement import CancelOrder, Receipt, RunnerUnreachableError, TerminalOrder
from sandbox.model.limits import CONTROL_SECONDS
from sandbox.placement.terminal_line import UnixTerminalLine, open_line

LISTEN_SECONDS = 10.0
"""For a runner to listen at the socket that it has made; later one at which nobody listens is a dead one's."""

_OF_AN_ATTEMPT = re.compile(r"[a-z2-7]{12}\.sock")


class UnixRunnerControl:
    """Speaks to runners of this machine."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    async def cancel(self, attempt_id: str, order: CancelOrder) -> Receipt:
        """See `RunnerControl.cancel`."""
        try:
            async with asyncio.timeout(CONTROL_SECONDS):
                answer = await _exchange(runner_socket(self._run_dir, attempt_id), msgspec.json.encode(order))
            return msgspec.json.decode(answer, type=Receipt)
        except (OSError, TimeoutError, ValueError) as error:
            raise RunnerUnreachableError(f"The runner of attempt {attempt_id} does not answer.") from error

    async def open_terminal(self, attempt_id: str, order: TerminalOrder) -> UnixTerminalLine:
        """See `RunnerControl.open_terminal`."""
        return await open_line(runner_socket(self._run_dir, attempt_id), order)

    def forget_dead(self) -> None:
        """Remove the sockets that killed runners left behind. Blocks on the disk; what cannot be removed stays."""
        with contextlib.suppress(OSError):
            for path in self._run_dir.iterdir():
                if _OF_AN_ATTEMPT.fullmatch(path.name) and _is_dead(path):
                    path.unlink(missing_ok=True)


def _is_dead(path: Path) -> bool:
    """Whether it is a socket at which nobody listens any more; a runner that has just begun may not listen yet."""
    found = path.lstat()
    if not stat.S_ISSOCK(found.st_mode) or time.time() - found.st_mtime < LISTEN_SECONDS:
        return False
    with socket.socket(socket.AF_UNIX) as caller:
        caller.setblocking(False)
        try:
            caller.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


async def _exchange(path: Path, line: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(line + b"\n")
        await writer.drain()
        return await reader.readline()
    finally:
        writer.close()
