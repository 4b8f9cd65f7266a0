"""Files of stored artifacts."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sandbox.interfaces.file_layout import TaskLayout
from sandbox.interfaces.tasks import ArtifactNotFoundError, StoredArtifact
from sandbox.model.events import Artifact
from sandbox.model.task import Task


class ArtifactStore:
    """Finds the files of recorded artifacts. File names come from the journal, never from a request."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def list_artifacts(self, task: Task) -> Sequence[StoredArtifact]:
        """Return a task's existing artifacts, in the order they were collected."""
        stored = (self._locate(task, artifact) for artifact in task.artifacts)
        return [each for each in stored if each is not None]

    def find_artifact(self, task: Task, name: str) -> StoredArtifact:
        """Find an artifact by name, else by path. Raises ArtifactNotFoundError."""
        for key in ("name", "path"):
            for artifact in task.artifacts:
                if getattr(artifact, key) == name and (stored := self._locate(task, artifact)) is not None:
                    return stored
        raise ArtifactNotFoundError(task.id, name)

    def _locate(self, task: Task, artifact: Artifact) -> StoredArtifact | None:
        file = TaskLayout(self._data_dir, task.id).artifacts / artifact.name
        try:
            modified = file.stat().st_mtime
        except FileNotFoundError:
            return None
        return StoredArtifact(artifact, file, datetime.fromtimestamp(modified, UTC))
