"""Collecting: the files that match a task's patterns become artifacts."""

import hashlib
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from sandbox.contracts.workspace import LeftOut
from sandbox.model.artifact import OWN_DIRECTORY, Artifact
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.limits import ARTIFACT_BYTES_MAX
from sandbox.workspace.artifact_names import TEMPORARY_NAME, ArtifactNames
from sandbox.workspace.content_types import content_type
from sandbox.workspace.files import Entry, Files, TooManyEntriesError, UnreadableError, read_chunks
from sandbox.workspace.globs import Globs, State
from sandbox.workspace.new_file import create, flush
from sandbox.workspace.stoppable import Stop, run_in_thread
from sandbox.workspace.visible_path import show

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
