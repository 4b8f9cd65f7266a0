"""Speaks to a runner on its control socket."""

import asyncio
import errno
from pathlib import Path

import msgspec

from sandbox.contracts.layout import runner_socket
from sandbox.contracts.placement import CancelOrder, Receipt, RunnerUnreachableError, TerminalOrder
from sandbox.model.limits import CONTROL_SECONDS
from sandbox.placement.terminal_line import UnixTerminalLine, open_line

_BLAMES_NO_RUNNER = frozenset(
    {errno.ENOENT, errno.ECONNREFUSED, errno.EACCES, errno.ENOTDIR, errno.ELOOP}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
)
"""Nobody listens, somebody else has taken the place, or this process has nothing to ask with. Everything else (a
connection past the runner's backlog is reset, though it seemed to be made) comes from somebody who listens and does not
take what comes."""


class UnixRunnerControl:
    """Speaks to runners of this machine."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    async def answers(self, attempt_id: str) -> bool:
        """See `RunnerControl.answers`. A runner has a receipt for everything, also for what is no order."""
        try:
            async with asyncio.timeout(CONTROL_SECONDS):
                await _exchange(runner_socket(self._run_dir, attempt_id), b"{}")
        except OSError as error:
            return error.errno in _BLAMES_NO_RUNNER
        return True

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


async def _exchange(path: Path, line: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(line + b"\n")
        await writer.drain()
        return await reader.readline()
    finally:
        writer.close()
