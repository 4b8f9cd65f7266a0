"""Integrity check of index, journals and artifacts. Read-only; may run while a server is running."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sandbox.interfaces.journal import JournalDamagedError, Journals, LockState, ReplayState
from sandbox.interfaces.store import IndexDamagedError, IndexedTask, Store
from sandbox.interfaces.task_file_layout import TaskLayout, tasks_root
from sandbox.model.artifacts import Artifact
from sandbox.model.state_machine import IllegalEventError, replay
from sandbox.model.task import Task
from sandbox.model.task_names_and_ids import is_task_id
from sandbox.server.derived_tasks import has_own_artifacts

_BATCH_BYTES = 1024 * 1024


class DiscrepancyKind(StrEnum):
    """The kinds of discrepancies. The values are stable, because scripts branch on them."""

    INDEX_UNUSABLE = "index_unusable"
    NOT_IN_INDEX = "not_in_index"
    INDEX_DIFFERS = "index_differs"
    INDEX_AHEAD = "index_ahead"
    JOURNAL_MISSING = "journal_missing"
    JOURNAL_DAMAGED = "journal_damaged"
    JOURNAL_UNREADABLE = "journal_unreadable"
    JOURNAL_TORN = "journal_torn"
    ARTIFACT_MISSING = "artifact_missing"
    ARTIFACT_DAMAGED = "artifact_damaged"


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """One discrepancy and what to do about it. task_id: empty if the discrepancy concerns the whole index."""

    task_id: str
    kind: DiscrepancyKind
    message: str


class IntegrityCheck:
    """One check of a whole data directory. deep: also compare the content of artifacts with their checksums."""

    def __init__(
        self, journals: Journals, store: Store, data_dir: Path, *, deep: bool, wait_for_indexing: Callable[[], None]
    ) -> None:
        """wait_for_indexing: waits until a running server has indexed newly accepted tasks."""
        self._journals = journals
        self._store = store
        self._data_dir = data_dir
        self._deep = deep
        self._wait_for_indexing = wait_for_indexing
        self.tasks_count = 0
        """Number of checked tasks."""

    def find_discrepancies(self) -> Iterator[Discrepancy]:
        """Yield every discrepancy, ordered by task id. Raises StoreError, OSError."""
        with_artifacts = self._find_tasks_with_artifacts()  # first, because tasks may end during the check
        written, indexed = set(self._journals.task_ids()), self._store.task_ids()
        if written - indexed:
            self._wait_for_indexing()
            indexed = self._store.task_ids()
        for task_id in sorted(written | indexed | with_artifacts):
            self.tasks_count += 1
            try:
                yield from self._check_task(task_id, is_in_index=task_id in indexed)
            except FileNotFoundError:
                if self._store.load(task_id) is not None:
                    message = (
                        "The index contains this task, but its journal does not exist; restore the journal "
                        "from a backup, or discard the task with: sandbox admin rebuild"
                    )
                    yield Discrepancy(task_id, DiscrepancyKind.JOURNAL_MISSING, message)
                elif self._has_own_artifacts(task_id):
                    message = (
                        "The task has results, but its journal does not exist; restore the journal from a backup, or "
                        f"remove {TaskLayout(self._data_dir, task_id).root}"
                    )
                    yield Discrepancy(task_id, DiscrepancyKind.JOURNAL_MISSING, message)
            except IndexDamagedError as error:
                yield Discrepancy(task_id, DiscrepancyKind.INDEX_DIFFERS, error.message)
            except JournalDamagedError as error:
                yield Discrepancy(task_id, DiscrepancyKind.JOURNAL_DAMAGED, error.message)
            except IllegalEventError as error:
                message = (
                    f"The journal's records are inconsistent ({error.message}); restore the journal from a backup."
                )
                yield Discrepancy(task_id, DiscrepancyKind.JOURNAL_DAMAGED, message)
            except OSError as error:
                message = f"The journal cannot be read ({error}); check the data directory's disk, or restore a backup."
                yield Discrepancy(task_id, DiscrepancyKind.JOURNAL_UNREADABLE, message)

    def _find_tasks_with_artifacts(self) -> set[str]:
        """Return the tasks that themselves have artifacts, or may have some. Only accepted tasks have artifacts."""
        root = tasks_root(self._data_dir)
        names = {path.name for path in root.iterdir() if is_task_id(path.name)} if root.exists() else set()
        return set(filter(self._has_own_artifacts, names))

    def _has_own_artifacts(self, task_id: str) -> bool:
        """Return whether the task itself, not only an earlier task, has artifacts. Returns True if this is unknown."""
        try:
            return has_own_artifacts(TaskLayout(self._data_dir, task_id))
        except OSError:
            return True

    def _check_task(self, task_id: str, *, is_in_index: bool) -> Iterator[Discrepancy]:
        indexed = self._store.load(task_id) if is_in_index else None
        at_index = self._replay(task_id, ReplayState(None, 0), indexed.offset if indexed else 0)
        at_end = self._replay(task_id, at_index, None)
        if at_end.task is None:
            raise JournalDamagedError(
                "The journal does not begin with an intact record; restore the journal from a backup."
            )
        if indexed is not None:
            yield from _compare_with_index(indexed, at_index, at_end)
        elif is_in_index:
            return  # pruned in the meantime
        else:
            message = "The journal is not in the index; start a server, or run: sandbox admin rebuild"
            yield Discrepancy(task_id, DiscrepancyKind.NOT_IN_INDEX, message)
        yield from self._check_torn_tail(task_id, at_end)
        for artifact in at_end.task.stored_files if at_end.task else ():
            yield from self._check_artifact(task_id, artifact)

    def _replay(self, task_id: str, start: ReplayState, end: int | None) -> ReplayState:
        """Replay from `start` to the first record boundary at or after offset `end` (None: to the current end)."""
        task, offset, last_seq = start.task, start.offset, start.task.last_seq if start.task else 0
        while end is None or offset < end:
            bytes_max = _BATCH_BYTES if end is None else min(_BATCH_BYTES, end - offset)
            batch = self._journals.read(task_id, offset, bytes_max=bytes_max)
            if not batch.records:
                break
            for record in batch.records:
                if record.seq != last_seq + 1:
                    raise JournalDamagedError(
                        f"Record {record.seq} follows record {last_seq}; restore the journal from a backup."
                    )
                task, last_seq = replay(task, record), record.seq
            offset = batch.next_offset
        return ReplayState(task, offset)

    def _check_torn_tail(self, task_id: str, replay_state: ReplayState) -> Iterator[Discrepancy]:
        """Report bytes after the last whole record if no process could be writing them."""
        if self._journals.lock_state(task_id) is not LockState.FREE:
            return
        torn_bytes = self._journals.size_bytes(task_id) - self._replay(task_id, replay_state, None).offset
        if torn_bytes > 0:
            message = f"The journal ends with {torn_bytes} bytes of an incomplete record; the next writer removes them."
            yield Discrepancy(task_id, DiscrepancyKind.JOURNAL_TORN, message)

    def _check_artifact(self, task_id: str, artifact: Artifact) -> Iterator[Discrepancy]:
        kind = DiscrepancyKind.ARTIFACT_DAMAGED
        try:
            fault = self._describe_fault(TaskLayout(self._data_dir, task_id).artifacts / artifact.name, artifact)
        except FileNotFoundError:
            kind, fault = DiscrepancyKind.ARTIFACT_MISSING, "is gone" if self._store.load(task_id) is not None else ""
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault:
            yield Discrepancy(task_id, kind, f"Artifact {artifact.name!r} {fault}; restore it from a backup.")

    def _describe_fault(self, file: Path, artifact: Artifact) -> str:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != artifact.size_bytes:
            return f"is not a file of {artifact.size_bytes} bytes"
        if self._deep and checksum(file) != artifact.checksum:
            return "does not match its checksum"
        return ""


def checksum(file: Path) -> str:
    """Return `sha256:` and hex digits, the format of artifact checksums."""
    with file.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def _compare_with_index(indexed: IndexedTask, at_index: ReplayState, at_end: ReplayState) -> Iterator[Discrepancy]:
    """Report differences up to the index's offset. Only an unfinished task's journal may have more records after it."""
    task_id = indexed.task.id
    if at_index.offset < indexed.offset:
        message = "The index is ahead of the journal; start a server, or run: sandbox admin rebuild"
        yield Discrepancy(task_id, DiscrepancyKind.INDEX_AHEAD, message)
    elif at_index.offset > indexed.offset or at_index.task != indexed.task:
        difference = f"The index has {_summarize(indexed.task)}, the journal {_summarize(at_index.task)}"
        message = f"{difference}{_describe_difference(indexed.task, at_index.task)}; run: sandbox admin rebuild"
        yield Discrepancy(task_id, DiscrepancyKind.INDEX_DIFFERS, message)
    elif indexed.task.state.is_final and at_end.offset > indexed.offset:
        message = "The journal continues after the task's end; run: sandbox admin rebuild"
        yield Discrepancy(task_id, DiscrepancyKind.INDEX_DIFFERS, message)


def _describe_difference(indexed: Task, replayed: Task | None) -> str:
    names = [name for name in Task.__struct_fields__ if replayed and getattr(indexed, name) != getattr(replayed, name)]
    return f", with different values of {', '.join(names)}" if names else ""


def _summarize(task: Task | None) -> str:
    return f"{task.state} at record {task.last_seq}" if task is not None else "nothing"
