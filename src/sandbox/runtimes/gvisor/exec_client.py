"""Runs runsc against a running sandbox. Client of programs/runsc_exec.py."""

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from sandbox.interfaces.runtime import TerminalSize
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runtimes import launcher_client
from sandbox.runtimes.exec_client import ExecProcess, start_program
from sandbox.runtimes.programs import launcher

_SIGNAL_SECONDS = 10.0
_RUNSC_EXEC_PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); import runsc_exec; runsc_exec.main(sys.argv[1:])"
PROCESS_FD, LOG_FD, STARTED_FD = range(launcher.FIRST_DESCRIPTOR, launcher.FIRST_DESCRIPTOR + 3)
"""Descriptors of a runsc that runs on a pty."""


async def run_runsc(attempt_id: str, runsc_pidfd: int, argv: Sequence[str]) -> bool:
    """Run runsc to its end, within 10 s. Returns whether it succeeded. Raises OSError."""
    process, control = start_program(_RUNSC_EXEC_PROGRAM, attempt_id, 0, 0)
    ended_fd = os.pidfd_open(process.pid)
    try:
        with control, suppress(OSError):
            _send(control, runsc_pidfd, argv)
            async with asyncio.timeout(_SIGNAL_SECONDS):
                await launcher_client.wait_readable(ended_fd)
    finally:
        # The wait does not block: the process has ended or was just killed.
        process.kill()
        os.close(ended_fd)
        code = process.wait()
    return code == 0


async def start_runsc_on_pty(
    attempt_id: str,
    runsc_pidfd: int,
    add_to_group: Callable[[int], None],
    argv: Sequence[str],
    process_config: bytes,
    size: TerminalSize,
) -> tuple[ExecProcess, int, int]:
    """Start runsc on a pty. Returns its process, the pty's master and runsc's pidfd.

    process_config: content of process.json, which runsc reads from PROCESS_FD. Raises AttemptError (sandbox_lost).
    """
    try:
        started, control = start_program(_RUNSC_EXEC_PROGRAM, attempt_id, size.rows, size.columns)
    except OSError as error:
        raise AttemptError(FailureCode.SANDBOX_LOST, f"No process could be started: {error}; try again.") from error
    exec_process = ExecProcess(started, control)
    try:
        await asyncio.to_thread(add_to_group, exec_process.pid)
        contents = {"process": process_config, "messages": b"", "begun": b""}
        _send(
            control,
            runsc_pidfd,
            argv,
            *(launcher_client.create_memfd(name, content) for name, content in contents.items()),
        )
        return exec_process, *await exec_process.wait_opened()
    except BaseException as error:
        await exec_process.kill()
        if isinstance(error, OSError):
            reason = f"The sandbox could not be entered: {error}; it may have ended."
            raise AttemptError(FailureCode.SANDBOX_LOST, reason) from error
        raise


def _send(control: socket.socket, runsc_pidfd: int, argv: Sequence[str], *files: int) -> None:
    """Send the command and `files`, and close the files. Raises OSError if the process is gone."""
    words_file = launcher_client.create_memfd("words", "\0".join(argv).encode(errors="surrogateescape"))
    try:
        socket.send_fds(control, [b"join"], [runsc_pidfd, words_file, *files])
    finally:
        for file in (words_file, *files):
            os.close(file)
