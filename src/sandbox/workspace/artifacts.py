"""Collects artifacts: matches paths against glob patterns, names files and copies them.

Names are unique in the task. They contain only visible characters and no slash.
"""

import fnmatch
import hashlib
import os
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate, takewhile
from pathlib import Path

from sandbox.interfaces.workspace import SkippedFile
from sandbox.model.artifacts import GENERATED_DIRECTORY, Artifact
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.fixed_limits import MATCHED_FILES_BYTES_MAX
from sandbox.primitives.concurrency import StopFlag, run_in_thread
from sandbox.primitives.files import create_private_file, fold_name, fsync_path
from sandbox.workspace.rooted_files import (
    Entry,
    RootedFiles,
    TooManyEntriesError,
    UnreadableError,
    printable_path,
    read_chunks,
)

_Segment = re.Pattern[str] | None
GlobState = int
"""A set of positions in all patterns, with one bit for each position. A million sets may be in memory."""


class GlobSet:
    """Several glob patterns, matched against a path segment by segment.

    Matching takes bounded time: each segment's regular expression never backtracks (fnmatch uses atomic groups), and
    `**` is handled by tracking the set of positions in each pattern.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._segments: list[_Segment] = []
        self._closures: list[GlobState] = []
        """For each position, the position itself and those after each `**` there, because `**` may match no segment."""
        self._ends = 0
        self.start: GlobState = 0
        """The state at the root."""
        for pattern in patterns:
            self._add(_parse_pattern(pattern))

    def _add(self, segments: list[_Segment]) -> None:
        begin, end = len(self._segments), len(self._segments) + len(segments)
        closures = [1 << end]
        for index in range(len(segments) - 1, -1, -1):
            own = 1 << (begin + index)
            closures.append(own if segments[index] is not None else own | closures[-1])
        self._segments += [*segments, _END]
        self._closures += reversed(closures)
        self._ends |= 1 << end
        self.start |= self._closures[begin]

    def advance(self, state: GlobState, name: str) -> GlobState:
        """Return the state inside a directory. If the state is empty, nothing under the directory can match."""
        advanced = 0
        for position in _positions(state & ~self._ends):
            segment = self._segments[position]
            if segment is None:
                advanced |= 0 if name.startswith(".") else self._closures[position]
            elif segment.match(name):
                advanced |= self._closures[position + 1]
        return advanced

    def is_match(self, state: GlobState) -> bool:
        """Return whether a file matches a pattern. state: the result of `advance` for the file's name."""
        return bool(state & self._ends)


_END = re.compile("")
"""Fills the position at the end of a pattern, where nothing is compared."""


def _positions(state: GlobState) -> Iterator[int]:
    return (position for position, bit in enumerate(reversed(f"{state:b}")) if bit == "1")


def _parse_pattern(pattern: str) -> list[_Segment]:
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if pattern.endswith("/"):
        parts.append("**")
    if parts[-1:] == ["**"]:
        parts.append("*")  # a pattern for the content of a directory does not match the directory's own name
    return [None if part == "**" else _compile_segment(part) for part in parts]


def _compile_segment(part: str) -> re.Pattern[str]:
    hidden = "" if part.startswith(".") else r"(?!\.)"
    return re.compile(hidden + fnmatch.translate(part))


TEMPORARY_FILE_NAME = ".sandbox.part"
"""Name of a file while it is being copied; no artifact gets this name."""

_RESERVED_NAMES = (TEMPORARY_FILE_NAME, ".git", "commondir", "head")
"""Names in lower case that no artifact gets. With `.git`, or with `HEAD` and other files, git would run commands from
files in the directory to which a user downloads the artifacts.
"""

_NAME_BYTES_MAX = 200


class ArtifactNames:
    """Allocates artifact names that are unique, also on file systems that ignore case or Unicode normalization."""

    def __init__(self, used_names: frozenset[str]) -> None:
        self._used_names = {fold_name(name) for name in used_names}
        self._next_number: dict[str, int] = {}

    def allocate(self, path: bytes) -> str:
        """Return the base name if it is free, otherwise the path with `__` for `/`, numbered if necessary."""
        base = _truncate(printable_path(path.rpartition(b"/")[2]))
        whole = _truncate(printable_path(path).replace("/", "__"))
        name, folded = base if self._is_free(base) else whole, fold_name(whole)
        while not self._is_free(name):
            number = self._next_number.get(folded, 2)
            name = _numbered(whole, number)
            self._next_number[folded] = number + 1
        self._used_names.add(fold_name(name))
        return name

    def _is_free(self, name: str) -> bool:
        folded = fold_name(name)
        return folded not in self._used_names and folded not in _RESERVED_NAMES


def _truncate(name: str) -> str:
    """Cut long names at the start, to keep the last part and the suffix."""
    return _cut_start(printable_path(_cut_start(name).encode()))  # the name may now start with a combining mark


def _cut_start(name: str) -> str:
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
    """Return the content type for the name's suffix; application/octet-stream if the suffix is unknown."""
    stem, _, suffix = name.rpartition(".")
    return _TYPES.get(suffix.lower(), "application/octet-stream") if stem else "application/octet-stream"


ARTIFACTS_MAX = 10_000
"""Maximum number of files collected from one workspace; the rest is skipped."""

ARTIFACT_PATHS_BYTES_MAX = 4 * 1024**2
"""Maximum total size of the printable paths of collected files, and, separately, of those of skipped files.

The paths are in the journal, in the index and in every list of the artifacts.
"""

GLOB_STATES_BYTES_MAX = 128 * 1024**2
"""Maximum total size of the states of directories still to be searched. Ten patterns need a few bytes per directory."""

_EXCLUDED_DIRECTORIES = frozenset({b".git", GENERATED_DIRECTORY.encode()})
"""Directories that are excluded at the root of the workspace."""


async def collect(
    workspace: Path, patterns: Sequence[str], target: Path, taken_names: frozenset[str]
) -> AsyncIterator[Artifact | SkippedFile]:
    """Collect matching files, sorted by path. See `interfaces.workspace.Workspaces.collect`.

    Raises AttemptError if a file cannot be stored in `target`.
    """
    names = ArtifactNames(taken_names)
    bytes_left = MATCHED_FILES_BYTES_MAX
    paths, skipped = await run_in_thread(lambda stop: _find_matches(workspace, patterns, stop))
    for path in paths:
        collected = await run_in_thread(partial(_collect_file, workspace, path, target, names, bytes_left))
        if isinstance(collected, Artifact):
            bytes_left -= collected.size_bytes
        yield collected
    for skipped_file in skipped:
        yield skipped_file


def _find_matches(workspace: Path, patterns: Sequence[str], stop: StopFlag) -> tuple[list[bytes], list[SkippedFile]]:
    """Return the paths of matching regular files, sorted, and the matches that were skipped."""
    search = _MatchSearch(GlobSet(patterns), stop)
    try:
        with RootedFiles(workspace) as files:
            search.run(files)
    except TooManyEntriesError as error:
        reason = f"there are {error}, and the rest were not examined; narrow the patterns"
        search.skipped.append(SkippedFile(".", reason))
    except OSError as error:
        search.skipped.append(SkippedFile(".", f"the workspace could not be read: {error.strerror or error}"))
    result = sorted(search.matches)
    count = _count_within_limits(result)
    if len(result) > count:
        limit = f"{ARTIFACTS_MAX} files" if count == ARTIFACTS_MAX else f"{ARTIFACT_PATHS_BYTES_MAX} bytes of paths"
        more = len(result) - count - 1
        search.skipped.append(
            SkippedFile(printable_path(result[count]), f"this file and {more} more exceed the limit of {limit}")
        )
    return result[:count], search.skipped


def _count_within_limits(paths: Sequence[bytes]) -> int:
    """Return how many paths, starting with the first, are within the limits."""
    lengths = accumulate(_printable_bytes(path) for path in paths[:ARTIFACTS_MAX])
    return sum(1 for _ in takewhile(lambda length: length <= ARTIFACT_PATHS_BYTES_MAX, lengths))


def _printable_bytes(path: bytes) -> int:
    return len(printable_path(path).encode())


class _MatchSearch:
    def __init__(self, globs: GlobSet, stop: StopFlag) -> None:
        self._globs = globs
        self._stop = stop
        self._skipped_path_bytes_left = ARTIFACT_PATHS_BYTES_MAX
        self._state_bytes = 0
        self.matches: list[bytes] = []
        self.skipped: list[SkippedFile] = []

    def run(self, files: RootedFiles) -> None:
        pending = [(b"", self._globs.start)]
        while pending:
            self._stop.raise_if_requested()
            directory, state = pending.pop()
            self._state_bytes -= _size_bytes(state) if directory else 0
            for entry in self._entries(files, directory):
                next_state = self._globs.advance(state, os.fsdecode(entry.name))
                if entry.is_directory and next_state and entry.path not in _EXCLUDED_DIRECTORIES:
                    pending += self._reachable(entry, next_state)
                elif not entry.is_directory and self._globs.is_match(next_state):
                    self._add(entry)

    def _entries(self, files: RootedFiles, directory: bytes) -> Sequence[Entry]:
        try:
            return files.entries(directory)
        except OSError as error:
            self._skip(directory, f"the directory could not be read: {error.strerror or error}")
            return ()

    def _reachable(self, entry: Entry, state: GlobState) -> list[tuple[bytes, GlobState]]:
        if entry.is_within_limits:
            self._state_bytes += _size_bytes(state)
            if self._state_bytes > GLOB_STATES_BYTES_MAX:
                raise TooManyEntriesError("too many directories for these patterns")
            return [(entry.path, state)]
        self._skip(entry.path, "the directory is nested too deeply")
        return []

    def _add(self, entry: Entry) -> None:
        if not entry.is_within_limits:
            self._skip(entry.path, "the path is too long")
        elif not entry.is_file:
            self._skip(entry.path, "it is not a regular file")
        else:
            self.matches.append(entry.path)

    def _skip(self, path: bytes, reason: str) -> None:
        if len(self.skipped) < ARTIFACTS_MAX and self._skipped_path_bytes_left > 0:
            self._skipped_path_bytes_left -= _printable_bytes(path)
            self.skipped.append(SkippedFile(printable_path(path) or ".", reason))


def _size_bytes(state: GlobState) -> int:
    return state.bit_length() // 8 + 1


def _collect_file(
    workspace: Path, path: bytes, target: Path, names: ArtifactNames, bytes_left: int, stop: StopFlag
) -> Artifact | SkippedFile:
    try:
        with RootedFiles(workspace) as files, files.open_file(path) as (file, size):
            if size > bytes_left:
                bound = f"{MATCHED_FILES_BYTES_MAX // 1024**2} MiB"
                return SkippedFile(
                    printable_path(path), f"with its {size} bytes, the matching files would exceed {bound}"
                )
            name = names.allocate(path)
            checksum = _store(read_chunks(file, size, stop), target, name)
            return Artifact(name, printable_path(path), size, content_type(name), f"sha256:{checksum}")
    except OSError as error:
        return SkippedFile(printable_path(path), f"it could not be read: {error.strerror or error}")


def _store(chunks: Iterable[bytes], target: Path, name: str) -> str:
    """Write a file, flush it, then rename it: no incomplete file gets an artifact's name. Returns the SHA-256 (hex)."""
    digest = hashlib.sha256()
    part = target / TEMPORARY_FILE_NAME
    try:
        with create_private_file(part) as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target / name)
        fsync_path(target)
    except UnreadableError:
        raise
    except OSError as error:
        reason = f"The artifact {name} could not be stored: {error.strerror or error}."
        raise AttemptError(FailureCode.COLLECT_FAILED, reason) from error
    finally:
        with suppress(OSError):
            part.unlink()
    return digest.hexdigest()
