"""A data directory like that of a server, with the journals, artifacts and index of tasks that the test creates."""

import contextlib
import hashlib
import sqlite3
from datetime import UTC, datetime, timedelta

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING
from sandbox.interfaces.store import IndexedTask
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import JournalRecorder
from sandbox.model.artifacts import Artifact
from sandbox.model.events import AgentExited, ArtifactCollected, AttemptStarted, Output, TaskFinished, TaskSubmitted
from sandbox.store.sqlite import SqliteStore
from sandbox.workspace.artifacts import content_type

START_TIME = datetime(2026, 1, 29, 10, 0, tzinfo=UTC)


class StoredTasks:
    """Writes tasks to `data_dir`, one minute apart in creation time. `index` updates the index like a server."""

    def __init__(self, data_dir):
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.data_dir = data_dir
        self.journals = FileJournals(data_dir)
        self.current_time = START_TIME
        self.last_recorder = None

    @classmethod
    def with_three_tasks(cls, data_dir):
        """Store and index the completed tasks task-1, task-2 and task-3."""
        tasks = cls(data_dir)
        for number in (1, 2, 3):
            tasks.add_completed_task(f"task-{number}")
        tasks.index()
        return tasks

    def _now(self):
        self.current_time += timedelta(milliseconds=1)
        return self.current_time

    def add_task(self, task_id, *events, parent=None, rerun_of=None, **sections):
        """Submit a task and record events; return the recorder with its open writer."""
        self.current_time += timedelta(minutes=1)
        recorder = JournalRecorder(self.journals.create(task_id), None, self._now)
        submitted = TaskSubmitted(task_id, manifest(task_id, **sections), None, parent, rerun_of)
        for event in (submitted, *events):
            recorder.record(event)
        return recorder

    def add_running_task(
        self,
        task_id,
        *,
        lines=3,
        line_bytes=0,
        attempt_id="a" * 12,
        host="here",
        artifacts=(("notes.txt", b"kept\n"),),
        **sections,
    ):
        """Create a running task; return its recorder. line_bytes: minimum size of each output line."""
        recorder = self.add_task(
            task_id, AttemptStarted(attempt_id, "bubblewrap", host, "boot"), *TO_RUNNING, **sections
        )
        for number in range(lines):
            recorder.record(
                Output.from_bytes("stdout", f"line {number} of {task_id}".ljust(line_bytes).encode() + b"\n")
            )
        for name, content in artifacts:
            recorder.record(self.store_artifact(task_id, name, content))
        return recorder

    def add_completed_task(self, task_id, **options):
        """Create a completed task with a closed writer; return the task."""
        return self.complete(self.add_running_task(task_id, **options))

    def complete(self, recorder):
        """Complete a running task and close its writer; return the task."""
        for event in TO_COMPLETED:
            recorder.record(event)
        recorder.writer.close()
        return recorder.task

    def add_failed_task(self, task_id, failure, **options):
        """Create a failed task with a closed writer; return the task."""
        return self.fail(self.add_running_task(task_id, **options), failure)

    def fail(self, recorder, failure):
        """Fail a running task and close its writer; return the task."""
        for event in (AgentExited(1, None, failure), TaskFinished()):
            recorder.record(event)
        recorder.writer.close()
        return recorder.task

    def store_artifact(self, task_id, name, content):
        """Store an artifact; return its event."""
        directory = TaskLayout(self.data_dir, task_id).artifacts
        directory.mkdir(mode=0o700, exist_ok=True)
        (directory / name).write_bytes(content)
        checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
        return ArtifactCollected(Artifact(name, f".sandbox/{name}", len(content), content_type(name), checksum))

    def index(self, *task_ids):
        """Add these tasks, or all tasks, to the index."""
        store = self.open_store()
        for task_id in task_ids or self.journals.task_ids():
            replay = self.journals.replay(task_id)
            store.save(IndexedTask(replay.task, replay.offset))
        store.close()

    def open_store(self):
        return SqliteStore(self.data_dir / "index.sqlite")

    def damage_row(self, task_id, column="task", value=b"{"):
        """Damage a row of the index."""
        with contextlib.closing(sqlite3.connect(self.data_dir / "index.sqlite")) as connection, connection:
            connection.execute(f"UPDATE tasks SET {column} = ? WHERE id = ?", (value, task_id))

    def records(self, task_id):
        return TaskLayout(self.data_dir, task_id).root / "journal" / "records"
