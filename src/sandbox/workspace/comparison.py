"""Finds what the agent changed: the workspace, walked beside the tree of the base commit."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from sandbox.workspace.base_tree import GITLINK, BaseEntry, BaseTree, canonical_mode, mode_of
from sandbox.workspace.files import Entry, Files, read_chunks
from sandbox.workspace.refused_names import is_refused
from sandbox.workspace.stoppable import Stop


class Changes(Protocol):
    """Takes every difference, in the order of the walk. Calls raise OSError, StoppedError."""

    def delete(self, path: bytes) -> None:
        """The file, link or gitlink of the base commit is gone."""
        ...

    def put(self, entry: Entry) -> None:
        """A file or symbolic link is new, or has another content or mode."""
        ...


class Rules(Protocol):
    """What the base commit ignores."""

    def ignored(self, entries: Sequence[Entry]) -> frozenset[bytes]:
        """The paths that are ignored among these of one directory, all of them untracked. Raises OSError."""
        ...


class Comparison:
    """One walk. What the base commit has is always compared, the rest only where no rule ignores it.

    Only the working tree counts: commits, branches and stashes that the agent made are in its `.git`, which is not
    read. A nested repository is ordinary files without its `.git`. A gitlink of the base commit stays as it is
    for as long as a directory is there; what lies in that directory cannot be told. FIFOs, sockets and devices
    are nothing to git. `left_out` says why no patch can carry what is at these paths.
    """

    def __init__(self, files: Files, base: BaseTree, rules: Rules, changes: Changes, stop: Stop) -> None:
        self._files = files
        self._base = base
        self._rules = rules
        self._changes = changes
        self._stop = stop
        self._gone = dict.fromkeys(base.entries)
        self.left_out: dict[bytes, str] = {}

    def run(self) -> None:
        """Tell every difference. Raises OSError, TooManyEntriesError, StoppedError."""
        pending = [b""]
        while pending:
            pending += self._visit(pending.pop())
        for path in self._gone:
            self._changes.delete(path)

    def _visit(self, directory: bytes) -> list[bytes]:
        """Compare one directory; gives the directories in it that are to be visited."""
        self._stop.check()
        entries = [entry for entry in self._files.entries(directory) if self._is_carried(entry)]
        ignored = self._rules.ignored([entry for entry in entries if not self._is_tracked(entry)])
        visited = [entry for entry in entries if entry.path not in ignored]
        for entry in visited:
            self._compare(entry)
        return [entry.path for entry in visited if entry.is_directory and not self._is_gitlink(entry)]

    def _is_carried(self, entry: Entry) -> bool:
        if entry.path == b".git":
            return False
        if is_refused(entry.path, is_link=entry.is_link):
            self.left_out[entry.path] = "git takes no such path"
        elif not entry.is_reachable:
            self.left_out[entry.path] = "its path is too long or too deep"
        return entry.path not in self.left_out

    def _is_tracked(self, entry: Entry) -> bool:
        if entry.is_directory:
            return entry.path in self._base.directories or self._is_gitlink(entry)
        return entry.path in self._base.entries

    def _is_gitlink(self, entry: Entry) -> bool:
        base = self._base.entries.get(entry.path)
        return base is not None and base.mode == GITLINK

    def _compare(self, entry: Entry) -> None:
        base = self._base.entries.get(entry.path)
        if entry.is_directory:
            if base is not None:
                self._replace_by_directory(entry)
        elif entry.is_file or entry.is_link:
            self._gone.pop(entry.path, None)
            if base is None or base.mode == GITLINK or not self._is_same(entry, base):
                self._changes.put(entry)

    def _replace_by_directory(self, entry: Entry) -> None:
        del self._gone[entry.path]
        if not self._is_gitlink(entry):
            # Said before what is in the directory: a deletion said later would take that along.
            self._changes.delete(entry.path)

    def _is_same(self, entry: Entry, base: BaseEntry) -> bool:
        if mode_of(entry) != canonical_mode(base.mode):
            return False
        if entry.is_link:
            target = self._files.read_link(entry.path)
            return _blob_name(base, len(target), [target]) == base.object_id
        with self._files.open_file(entry.path) as (file, size):
            # Sizes first: what is of another size, such as a huge sparse file, is not read at all.
            return (
                size == base.size_bytes
                and _blob_name(base, size, read_chunks(file, size, self._stop)) == base.object_id
            )


def _blob_name(base: BaseEntry, size: int, chunks: Iterable[bytes]) -> bytes:
    """Git's name of a blob, in the hash function of the base commit's repository."""
    algorithm = hashlib.sha1 if len(base.object_id) == 40 else hashlib.sha256
    digest = algorithm(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest().encode()
