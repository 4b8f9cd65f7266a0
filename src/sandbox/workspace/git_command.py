"""Runs git on the host as a child process that does not depend on the environment: its options, pipes and errors.

git's stderr contains data from the remote, and may quote settings of the server's user.

Design decisions:
- git runs confined if it reads untrusted data, and unconfined if it needs the server user's files.
- Only the settings in this module and those of the caller apply: configuration of the system and the user is disabled,
  and so are the machine's attributes and ignore rules. git's defaults are not repeated: protocol version 2, redirects
  of the first request only, no submodules, and no filters (no configuration names one).
- `prlimit` limits files and memory: a pack of 16 KB can contain an object of many gigabytes, and comparing lines takes
  forty times as much memory as the lines themselves. Core dumps are limited to one byte, because a `core_pattern` with
  a pipe ignores a limit of zero.
- git flushes nothing to disk, because the workspace is not flushed either. Flushing would take a third of the time of a
  small clone. The writer of the patch flushes the patch.
"""

import asyncio
import os
import select
import signal
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, TypeVar

from sandbox.interfaces.runtime import ConfinedCommand, Confinement
from sandbox.model.display_text import replace_unprintable
from sandbox.primitives.concurrency import StopFlag, run_in_thread, wait_readable
from sandbox.workspace.no_confinement import NoConfinement

_LINE_CHARACTERS_MAX = 300

SILENT_INDEX_PACK_ERROR = "fatal: fetch-pack: invalid index-pack output"
"""git's only message if a signal kills its index-pack, for example at the file size limit."""

DISK_FULL_MESSAGE = "not enough disk space; raise vm.disk, or free space in the server's data directory"


def last_error_line(stderr: str) -> str:
    """Return the last line that starts with `fatal:` or `error:`, otherwise the last line; printable and truncated."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    error_lines = [line for line in lines if line.startswith(("fatal:", "error:"))] or lines
    return replace_unprintable(error_lines[-1][:_LINE_CHARACTERS_MAX], lambda _: "?") if error_lines else ""


T = TypeVar("T")
_BROKEN_PIPE_SECONDS = 5.0


@contextmanager
def pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Yield the read and the write end of a pipe, unbuffered. Both are closed at the end of the block."""
    reader, writer = (os.fdopen(fd, mode, buffering=0) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    with reader, writer:
        yield reader, writer


def write_all(stream: IO[bytes], data: bytes) -> None:
    """Write everything; a single write to a pipe may be partial."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[stream.write(remaining) :]


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    """Read exactly `size` bytes. Raises BrokenPipeError if the stream ends earlier."""
    read = bytearray()
    while len(read) < size:
        chunk = stream.read(size - len(read))
        if not chunk:
            raise BrokenPipeError("git ended early")
        read += chunk
    return bytes(read)


async def wait_for_data(reader: IO[bytes]) -> bool:
    """Wait until a pipe has data or its write end is closed. Returns whether there is data."""
    await wait_readable(reader)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


async def run_thread_with_git(work: Callable[[StopFlag], T], *git_runs: Coroutine[Any, Any, bytes]) -> T:
    """Run `work` in a thread, and git at the other ends of its pipes. Returns the result of `work`.

    If one of them fails or the caller is cancelled, the others are stopped before the error propagates. If git failed,
    its error is raised: a broken pipe in the thread is only a consequence.
    """
    running = [asyncio.ensure_future(git) for git in git_runs]
    thread = asyncio.ensure_future(run_in_thread(work))
    try:
        await asyncio.wait([*running, thread], return_when=asyncio.FIRST_EXCEPTION)
        if thread.done() and isinstance(thread.exception(), BrokenPipeError) and running:
            await asyncio.wait(running, timeout=_BROKEN_PIPE_SECONDS)
    finally:
        for task in (*running, thread):
            task.cancel()
        results = await asyncio.gather(*running, thread, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return thread.result()


GitSetting = tuple[str, str]

_CLEAN_ENVIRONMENT = {
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
_NEUTRAL_SETTINGS: Sequence[GitSetting] = (
    ("core.hooksPath", "/dev/null"),
    ("core.fsmonitor", "false"),
    ("core.attributesFile", "/dev/null"),
    ("core.excludesFile", "/dev/null"),
    ("core.fsync", "none"),
    ("gc.auto", "0"),
    ("maintenance.auto", "false"),
)
MEMORY_BYTES_MAX = 3 * 1024**3
"""Maximum private memory of one git process; mapped packs do not count. Beyond it, git fails.

The limit is lower if the confinement has less memory (`Git.memory_bytes_max`).
"""

_MEMORY_SHARE = 0.75
"""Share of the confinement's memory that git may use, so git fails with a message before the kernel kills it."""

_NOT_FOUND_EXIT_CODE, _SIGNAL_EXIT_BASE = 127, 128
_DISK_FULL_PHRASES = ("no space left on device", "disk quota exceeded")
_KILLED_MESSAGE = b"\nfatal: out of memory: the kernel ended git"
_OUTPUT_BYTES_MAX = 1024 * 1024
_DRAIN_SECONDS = 1.0


class GitError(Exception):
    """git failed. `returncode`: 128+n after signal n. `stderr`: the end of its stderr, untrusted text."""

    def __init__(self, returncode: int, stderr: bytes) -> None:
        super().__init__(f"git exited with code {returncode}")
        self.returncode = returncode
        self.stderr = stderr.decode(errors="replace")

    @property
    def is_out_of_memory(self) -> bool:
        """Whether git reported a lack of memory or was OOM-killed."""
        return "out of memory" in self.stderr.lower()

    @property
    def is_possibly_killed(self) -> bool:
        """Whether git or a program that it started ended without giving a reason, as if killed."""
        return (
            self.returncode > _SIGNAL_EXIT_BASE
            or _KILLED_MESSAGE.decode() in self.stderr
            or SILENT_INDEX_PACK_ERROR in self.stderr
        )

    @property
    def is_inconclusive(self) -> bool:
        """Whether git was not found, was killed, or lacked memory or disk space, so its failure proves nothing."""
        is_missing_or_killed = self.returncode == _NOT_FOUND_EXIT_CODE or self.returncode > _SIGNAL_EXIT_BASE
        is_disk_full = any(words in self.stderr.lower() for words in _DISK_FULL_PHRASES)
        return is_missing_or_killed or self.is_out_of_memory or is_disk_full


class Git:
    """Runs git with a clean environment, to which the given settings and variables are added."""

    def __init__(
        self,
        path: str,
        settings: Sequence[GitSetting] = (),
        variables: Mapping[str, str | None] | None = None,
        confinement: Confinement | None = None,
        *,
        files: Mapping[str, bytes] | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Without a confinement, git runs unconfined.

        path: value of PATH. variables: environment variables; a None value removes the variable. files, descriptors: as
        in `ConfinedCommand`. Without a confinement, there are no files, and the descriptors keep their numbers.
        """
        variables_with_removals = {
            "PATH": path,
            **_CLEAN_ENVIRONMENT,
            **_settings_environment([*_NEUTRAL_SETTINGS, *settings]),
            **(variables or {}),
        }
        self._environment = {name: value for name, value in variables_with_removals.items() if value is not None}
        self._confinement = confinement or NoConfinement()
        self._files = files or {}
        self._descriptors = descriptors

    async def run(
        self,
        *arguments: str,
        directory: Path,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
        file_bytes_max: int | None = None,
        ok_exit_codes: Collection[int] = (0,),
    ) -> bytes:
        """Run git in `directory` until it exits. Returns its output (the last MiB) if no `stdout` is given.

        Given files are closed as soon as git has ended. No file that git writes grows beyond `file_bytes_max`. Raises
        GitError, and OSError if the machine lacks resources. On cancellation git and its children are killed.
        """
        # Close the given files even if git never starts; otherwise the other end of a pipe would wait forever.
        with stdin or nullcontext(), stdout or nullcontext():
            argv = [*_prlimit_arguments(self.memory_bytes_max, file_bytes_max), "git", *arguments]
            async with capture_output(stdout) as (out, output), capture_output() as (err, read_stderr):
                with open(os.devnull, "rb") as nothing, out, err, stdin or nothing as stdin_file:  # noqa: ASYNC230, PTH123
                    streams = (stdin_file.fileno(), out.fileno(), err.fileno())
                    command = ConfinedCommand(
                        argv, self._environment, directory, *streams, self._descriptors, self._files
                    )
                    code = await self._run(command)
        if code not in ok_exit_codes:
            raise GitError(code, read_stderr() + (_KILLED_MESSAGE if self._was_oom_killed(code) else b""))
        return output()

    @property
    def memory_bytes_max(self) -> int:
        """Maximum memory of one git process, in bytes."""
        allowed = self._confinement.memory_bytes
        return MEMORY_BYTES_MAX if allowed is None else min(MEMORY_BYTES_MAX, int(allowed * _MEMORY_SHARE))

    def _was_oom_killed(self, code: int) -> bool:
        """Return whether git or a program that it started was OOM-killed.

        SIGKILL counts as an OOM kill: any other process that kills git would soon kill the runner too.
        """
        return code == _SIGNAL_EXIT_BASE + signal.SIGKILL or self._confinement.was_oom_killed()

    async def _run(self, command: ConfinedCommand) -> int:
        try:
            return await self._confinement.run(command)
        except FileNotFoundError as error:
            raise GitError(_NOT_FOUND_EXIT_CODE, f"fatal: {error.filename} is not installed".encode()) from error


def _settings_environment(settings: Sequence[GitSetting]) -> dict[str, str]:
    variables = {"GIT_CONFIG_COUNT": str(len(settings))}
    for number, (key, value) in enumerate(settings):
        variables[f"GIT_CONFIG_KEY_{number}"] = key
        variables[f"GIT_CONFIG_VALUE_{number}"] = value
    return variables


def _prlimit_arguments(memory_bytes_max: int, file_bytes_max: int | None) -> Sequence[str]:
    files = () if file_bytes_max is None else (f"--fsize={file_bytes_max}",)
    return ("prlimit", f"--data={memory_bytes_max}", *files, "--core=1")


@asynccontextmanager
async def capture_output(target: IO[bytes] | None = None) -> AsyncIterator[tuple[IO[bytes], Callable[[], bytes]]]:
    """Yield the file for a program's output, and a function that returns the output after the block.

    If `target` is given, it is used as the file, and the function returns empty bytes.
    """
    if target is not None:
        yield target, bytes
        return
    with pipe() as (read_end, write_end):
        captured = bytearray()
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), read_end
        )
        task = asyncio.create_task(_read_tail(reader, captured))
        try:
            yield write_end, lambda: bytes(captured)
        finally:
            try:
                # A background process of ssh may hold the pipe long after git has exited, so the wait has a limit.
                await asyncio.wait([task], timeout=_DRAIN_SECONDS)
            finally:
                task.cancel()
                transport.close()


async def _read_tail(reader: asyncio.StreamReader, tail: bytearray) -> None:
    """Read to the end and keep the last MiB."""
    while chunk := await reader.read(64 * 1024):
        tail += chunk
        del tail[:-_OUTPUT_BYTES_MAX]
