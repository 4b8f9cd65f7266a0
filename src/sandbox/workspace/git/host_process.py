"""Programs that run with this process's own rights: those that need the server user's files, and, on machines where
nothing can be confined, all others too.

- `setpriv --pdeathsig` lets the kernel kill a program when its runner dies, even by SIGKILL. Git's own children
  (transport, index-pack, ssh) live on pipes from git and end with the next byte when these close; a transport whose
  server is silent ends by its own bound (`staging` sets it). It is one more exec of less than a millisecond; a
  `preexec_fn` would not be safe in a process with threads.
- A session of its own, so that a cancelled call can kill a program together with its children.
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
    """Implements `contracts.confinement.Confinement` without confining; descriptors and files are not given."""

    proxy_listener = None
    memory_bytes = None

    def was_oom_killed(self) -> bool:
        """Nobody counts."""
        return False

    async def run(self, command: ConfinedCommand) -> int:
        """Its exit code, 128+n after signal n. Raises OSError, FileNotFoundError when setpriv is not installed."""
        process = await asyncio.create_subprocess_exec(
            *_DIE_WITH_PARENT,
            *command.argv,
            stdin=command.stdin,
            stdout=command.stdout,
            stderr=command.stderr,
            cwd=command.directory,
            env=command.environment,
            start_new_session=True,
        )
        try:
            code = await process.wait()
        finally:
            await _kill(process)
        return code if code >= 0 else 128 - code


@asynccontextmanager
async def no_confinement(_directories: Sequence[Path], _read_only: Sequence[Path]) -> AsyncIterator[NoConfinement]:
    """Is a `Confine` for machines where nothing can be confined."""
    yield NoConfinement()


async def _kill(process: Process) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
