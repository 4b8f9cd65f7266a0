"""Git on the host: a child process that takes nothing from its surroundings.

Decisions:
- No configuration but what stands here and what a caller adds: system and user files are switched off, attributes and
  ignore rules of the machine too. Git's own defaults already give protocol version 2, redirects of the first request
  only, no submodules and no filters (no configuration names one), so they are not repeated.
- `setpriv --pdeathsig` lets the kernel kill git when its runner dies, even by SIGKILL. Git's own children (transport,
  index-pack, ssh) live on pipes from git and end with the next byte when these close; a transport whose server is
  silent ends by its own bound (`staging` sets it). `prlimit` bounds the files and the memory: a pack of 16 KB can hold
  an object of many gigabytes, and comparing lines takes forty times the bytes of the lines. Each is one more exec of
  less than a millisecond; a `preexec_fn` would not be safe in a process with threads.
- Nothing is flushed to disk: what git writes here is worth as much as the workspace beside it, whose files nobody
  flushes either, and flushing costs a small clone a third of its time. The patch itself is flushed by its writer.
- A session of its own, so that a cancelled call can kill git together with its children.
"""

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

Setting = tuple[str, str]

_SURROUNDINGS = {
    "LC_ALL": "C",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "",
    "SSH_ASKPASS": "",
    "GIT_ALLOW_PROTOCOL": "https:http:ssh",
    "GIT_DEFAULT_REF_FORMAT": "files",
}
_NEUTRAL: Sequence[Setting] = (
    ("core.hooksPath", "/dev/null"),
    ("core.fsmonitor", "false"),
    ("core.attributesFile", "/dev/null"),
    ("core.excludesFile", "/dev/null"),
    ("core.fsync", "none"),
    ("gc.auto", "0"),
    ("maintenance.auto", "false"),
)
_PARENT_DEATH = ("setpriv", "--pdeathsig", "KILL")
MEMORY_BYTES_MAX = 3 * 1024**3
"""Memory of one git process that is its own; what it maps of a pack does not count. Past it git gives up."""

_OUTPUT_BYTES_MAX = 1024 * 1024
_DRAIN_SECONDS = 1.0


class GitError(Exception):
    """Git failed (-n after signal n). `complaint` is the end of its stderr: hostile text."""

    def __init__(self, returncode: int, complaint: bytes) -> None:
        super().__init__(f"git ended with {returncode}")
        self.returncode = returncode
        self.complaint = complaint.decode(errors="replace")

    @property
    def is_out_of_memory(self) -> bool:
        """Git said that it was given no more memory."""
        return "out of memory" in self.complaint.lower()


class Git:
    """Runs git with a clean environment, some settings and a few variables added."""

    def __init__(
        self, path: str, settings: Sequence[Setting] = (), variables: Mapping[str, str | None] | None = None
    ) -> None:
        """`path` is where programs are looked for; a variable that is None is taken away."""
        wanted = {"PATH": path, **_SURROUNDINGS, **_as_variables([*_NEUTRAL, *settings]), **(variables or {})}
        self._environment = {name: value for name, value in wanted.items() if value is not None}

    async def run(
        self,
        *arguments: str,
        directory: Path,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
        file_bytes_max: int | None = None,
        good_codes: Collection[int] = (0,),
    ) -> bytes:
        """Run git in `directory`, to its end; gives its output when no `stdout` is given (the last MiB of it).

        Files given are closed here as soon as git has them. No file that git writes grows past `file_bytes_max`.
        Raises GitError, and OSError when the machine is out of something. Cancelled, it kills git and its children.
        """
        command = [*_PARENT_DEATH, *_limits(file_bytes_max), "git", *arguments]
        process = await self._start(command, directory, stdin, stdout)
        reading = [asyncio.create_task(_read_end(pipe)) for pipe in (process.stdout, process.stderr)]
        try:
            await process.wait()
        finally:
            await _kill(process)
            # A background process of ssh may hold the pipe for long after git is gone, so the wait has a bound.
            await asyncio.wait(reading, timeout=_DRAIN_SECONDS)
            for task in reading:
                task.cancel()
        output, complaint = (task.result() if task.done() else b"" for task in reading)
        if process.returncode not in good_codes:
            raise GitError(process.returncode or 0, complaint)
        return output

    async def _start(
        self, command: Sequence[str], directory: Path, stdin: IO[bytes] | None, stdout: IO[bytes] | None
    ) -> Process:
        try:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=stdin or DEVNULL,
                stdout=stdout or PIPE,
                stderr=PIPE,
                cwd=directory,
                env=self._environment,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise GitError(127, f"fatal: {error.filename} is not installed".encode()) from error
        finally:
            for given in (stdin, stdout):
                if given is not None:
                    given.close()


def _as_variables(settings: Sequence[Setting]) -> dict[str, str]:
    variables = {"GIT_CONFIG_COUNT": str(len(settings))}
    for number, (key, value) in enumerate(settings):
        variables[f"GIT_CONFIG_KEY_{number}"] = key
        variables[f"GIT_CONFIG_VALUE_{number}"] = value
    return variables


def _limits(file_bytes_max: int | None) -> Sequence[str]:
    files = () if file_bytes_max is None else (f"--fsize={file_bytes_max}",)
    return ("prlimit", f"--data={MEMORY_BYTES_MAX}", *files, "--core=0")


async def _kill(process: Process) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def _read_end(pipe: asyncio.StreamReader | None) -> bytes:
    """Everything up to the pipe's end, of which the last MiB is kept."""
    kept = bytearray()
    while pipe and (chunk := await pipe.read(64 * 1024)):
        kept += chunk
        del kept[:-_OUTPUT_BYTES_MAX]
    return bytes(kept)
