"""Runs programs with this process's privileges.

These are programs that need the server user's files and, on machines without confinement, all programs.

- `setpriv --pdeathsig` makes the kernel kill a program when its runner dies, even if SIGKILL ended the runner. git's
  children (transport, index-pack, ssh) use git's pipes and exit on the next read or write after the pipes close. A
  transport whose server is silent exits after its timeout (set in clone/clone_and_checkout.py). `setpriv` costs one
  extra exec, which takes less than a millisecond; a `preexec_fn` would not be safe in a process with threads.
- Each program gets its own session, so a cancelled call can kill it together with its children.
"""

import asyncio
import os
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from sandbox.interfaces.runtime import ConfinedCommand

_DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")


class NoConfinement:
    """Implements `interfaces.runtime.Confinement` without confining.

    Descriptors keep their numbers. Files are not passed.
    """

    proxy_listener = None
    memory_bytes = None

    def was_oom_killed(self) -> bool:
        """Return False, because OOM kills are not detected without a confinement."""
        return False

    async def run(self, command: ConfinedCommand) -> int:
        """Run the command and return its exit code, 128+n after signal n.

        Raises OSError; FileNotFoundError if setpriv is not installed.
        """
        process = await asyncio.create_subprocess_exec(
            *_DIE_WITH_PARENT,
            *command.argv,
            stdin=command.stdin,
            stdout=command.stdout,
            stderr=command.stderr,
            cwd=command.directory,
            env=command.environment,
            start_new_session=True,
            pass_fds=command.descriptors,
        )
        try:
            code = await process.wait()
        finally:
            await _kill(process)
        return code if code >= 0 else 128 - code

    async def transfer_ownership(self, directory: Path) -> None:
        """Do nothing: the programs run with this process's uid."""


@asynccontextmanager
async def no_confinement(
    _directories: Sequence[Path], _read_only_directories: Sequence[Path]
) -> AsyncIterator[NoConfinement]:
    """Yield a confinement without restrictions. Implements `Confine` for machines that cannot confine programs."""
    yield NoConfinement()


async def _kill(process: Process) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
