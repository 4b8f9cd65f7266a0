"""Names for collected files: unique in the task, without a slash, and nothing but visible characters."""

import fnmatch
import hashlib
import os
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from sandbox.interfaces.workspace import LeftOut
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.events import OWN_DIRECTORY, Artifact
from sandbox.model.limits import ARTIFACT_BYTES_MAX
from sandbox.system.files import create, flush
from sandbox.workspace.cancellable_thread import Stop, run_in_thread
from sandbox.workspace.files import Entry, Files, TooManyEntriesError, UnreadableError, read_chunks, show

TEMPORARY_NAME = ".sandbox.part"
"""What a file is called while it is copied; no artifact gets this name."""

_NAME_BYTES_MAX = 200


class ArtifactNames:
    """Gives names, each one once."""

    def __init__(self, taken: frozenset[str]) -> None:
        self._taken = {*taken, TEMPORARY_NAME}
        self._next_number: dict[str, int] = {}

    def claim(self, path: bytes) -> str:
        """The base name, else the path with `__` for `/`, else that with a number."""
        base = _cut(show(path.rpartition(b"/")[2]))
        whole = _cut(show(path).replace("/", "__"))
        name = base if base not in self._taken else whole
        while name in self._taken:
            number = self._next_number.get(whole, 2)
            name = _numbered(whole, number)
            self._next_number[whole] = number + 1
        self._taken.add(name)
        return name


def _cut(name: str) -> str:
    """Long names lose their beginning, so that what they are called last, and their suffix, stays."""
    return _end(show(_end(name).encode()))  # the new beginning may be a combining mark


def _end(name: str) -> str:
    return name.encode()[-_NAME_BYTES_MAX:].decode(errors="ignore")


def _numbered(name: str, number: int) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{number}{dot}{suffix}" if stem else f"{name}-{number}"


_TYPES = {
    "bz2": "application/x-bzip2",
    "css": "text/css",
    "csv": "text/csv",
    "diff": "text/x-diff",
    "gif": "image/gif",
    "gz": "application/gzip",
    "htm": "text/html",
    "html": "text/html",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "js": "text/javascript",
    "json": "application/json",
    "jsonl": "application/x-ndjson",
    "log": "text/plain",
    "md": "text/markdown",
    "ndjson": "application/x-ndjson",
    "patch": "text/x-diff",
    "pdf": "application/pdf",
    "png": "image/png",
    "py": "text/x-python",
    "sarif": "application/sarif+json",
    "sh": "text/x-shellscript",
    "svg": "image/svg+xml",
    "tar": "application/x-tar",
    "tgz": "application/gzip",
    "toml": "application/toml",
    "tsv": "text/tab-separated-values",
    "txt": "text/plain",
    "webp": "image/webp",
    "xml": "application/xml",
    "xz": "application/x-xz",
    "yaml": "application/yaml",
    "yml": "application/yaml",
    "zip": "application/zip",
    "zst": "application/zstd",
}


def content_type(name: str) -> str:
    """The type of a file of that name; bytes when the suffix is not known."""
    stem, _, suffix = name.rpartition(".")
    return _TYPES.get(suffix.lower(), "application/octet-stream") if stem else "application/octet-stream"


_Part = re.Pattern[str] | None
State = frozenset[tuple[int, int]]


class Globs:
    """Several patterns, matched part by part down a path.

    Each part is matched by a regular expression that never backtracks (fnmatch makes atomic groups) and `**` by keeping
    the set of places where a pattern may be, so no pattern takes long.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [_parts(pattern) for pattern in patterns]

    @property
    def start(self) -> State:
        """The state at the root."""
        return self._closed({(number, 0) for number in range(len(self._patterns))})

    def enter(self, state: State, name: str) -> State:
        """The state inside a directory; when it is empty, nothing below can match."""
        moved = set()
        for number, place in state:
            if place == len(self._patterns[number]):
                continue
            part = self._patterns[number][place]
            if part is None and not name.startswith("."):
                moved.add((number, place))
            elif part is not None and part.match(name):
                moved.add((number, place + 1))
        return self._closed(moved)

    def is_match(self, state: State) -> bool:
        """Whether a file that was entered as a directory would be is at the end of a pattern."""
        return any(place == len(self._patterns[number]) for number, place in state)

    def _closed(self, state: set[tuple[int, int]]) -> State:
        """With the places behind each `**`, which may stand for no part at all."""
        closed = set(state)
        for number, place in state:
            parts = self._patterns[number]
            behind = next((at for at in range(place, len(parts)) if parts[at] is not None), len(parts))
            closed.update((number, at) for at in range(place, behind + 1))
        return frozenset(closed)


def _parts(pattern: str) -> list[_Part]:
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if pattern.endswith("/"):
        parts.append("**")
    if parts[-1:] == ["**"]:
        parts.append("*")  # what is below a directory is not the directory's own name
    return [None if part == "**" else _compile(part) for part in parts]


def _compile(part: str) -> re.Pattern[str]:
    hidden = "" if part.startswith(".") else r"(?!\.)"
    return re.compile(hidden + fnmatch.translate(part))


ARTIFACTS_MAX = 10_000
"""Files that are collected from one workspace; the rest is left out."""

_NOT_ENTERED = frozenset({b".git", OWN_DIRECTORY.encode()})
"""At the top of the workspace."""


async def collect(
    workspace: Path, patterns: Sequence[str], target: Path, taken_names: frozenset[str]
) -> AsyncIterator[Artifact | LeftOut]:
    """As in the contract, in the order of the paths. Raises AttemptError when `target` is not writable."""
    names = ArtifactNames(taken_names)
    bytes_left = ARTIFACT_BYTES_MAX
    found, left_out = await run_in_thread(lambda stop: _find(workspace, patterns, stop))
    for path in found:
        taken = await run_in_thread(partial(_take, workspace, path, target, names, bytes_left))
        if isinstance(taken, Artifact):
            bytes_left -= taken.size_bytes
        yield taken
    for problem in left_out:
        yield problem


def _find(workspace: Path, patterns: Sequence[str], stop: Stop) -> tuple[list[bytes], list[LeftOut]]:
    """Paths of matching regular files, sorted, and what matches but is none."""
    search = _Search(Globs(patterns), stop)
    try:
        with Files(workspace) as files:
            search.run(files)
    except TooManyEntriesError as error:
        reason = f"there are {error}, and only the first were looked at; narrow the patterns"
        search.left_out.append(LeftOut(".", reason))
    except OSError as error:
        search.left_out.append(LeftOut(".", f"the workspace could not be read: {error.strerror or error}"))
    found = sorted(search.found)
    if len(found) > ARTIFACTS_MAX:
        more = len(found) - ARTIFACTS_MAX
        search.left_out.append(LeftOut(show(found[ARTIFACTS_MAX]), f"and {more - 1} more: over {ARTIFACTS_MAX} files"))
    return found[:ARTIFACTS_MAX], search.left_out


class _Search:
    def __init__(self, globs: Globs, stop: Stop) -> None:
        self._globs = globs
        self._stop = stop
        self.found: list[bytes] = []
        self.left_out: list[LeftOut] = []

    def run(self, files: Files) -> None:
        pending = [(b"", self._globs.start)]
        while pending:
            self._stop.check()
            directory, state = pending.pop()
            for entry in self._entries(files, directory):
                inside = self._globs.enter(state, os.fsdecode(entry.name))
                if entry.is_directory and inside and entry.path not in _NOT_ENTERED:
                    pending += self._reachable(entry, inside)
                elif not entry.is_directory and self._globs.is_match(inside):
                    self._add(entry)

    def _entries(self, files: Files, directory: bytes) -> Sequence[Entry]:
        try:
            return files.entries(directory)
        except OSError as error:
            self._leave_out(directory, f"the directory could not be read: {error.strerror or error}")
            return ()

    def _reachable(self, entry: Entry, inside: State) -> list[tuple[bytes, State]]:
        if entry.is_reachable:
            return [(entry.path, inside)]
        self._leave_out(entry.path, "the directory is nested too deeply")
        return []

    def _add(self, entry: Entry) -> None:
        if not entry.is_reachable:
            self._leave_out(entry.path, "its path is too long")
        elif not entry.is_file:
            self._leave_out(entry.path, "it is not a regular file")
        else:
            self.found.append(entry.path)

    def _leave_out(self, path: bytes, reason: str) -> None:
        if len(self.left_out) < ARTIFACTS_MAX:
            self.left_out.append(LeftOut(show(path) or ".", reason))


def _take(
    workspace: Path, path: bytes, target: Path, names: ArtifactNames, bytes_left: int, stop: Stop
) -> Artifact | LeftOut:
    try:
        with Files(workspace) as files, files.open_file(path) as (file, size):
            if size > bytes_left:
                bound = f"{ARTIFACT_BYTES_MAX // 1024**2} MiB"
                return LeftOut(show(path), f"with its {size} bytes the files that match would be over {bound}")
            name = names.claim(path)
            checksum = _store(read_chunks(file, size, stop), target, name)
            return Artifact(name, show(path), size, content_type(name), f"sha256:{checksum}")
    except OSError as error:
        return LeftOut(show(path), f"it could not be read: {error.strerror or error}")


def _store(chunks: Iterable[bytes], target: Path, name: str) -> str:
    """Write, flush, then name: a file with an artifact's name is whole. Gives the SHA-256 in hex."""
    digest = hashlib.sha256()
    part = target / TEMPORARY_NAME
    try:
        with create(part) as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target / name)
        flush(target)
    except UnreadableError:
        raise
    except OSError as error:
        problem = f"The artifact {name} could not be stored: {error.strerror or error}."
        raise AttemptError(FailureCode.COLLECT_FAILED, problem) from error
    finally:
        with suppress(OSError):
            part.unlink()
    return digest.hexdigest()
