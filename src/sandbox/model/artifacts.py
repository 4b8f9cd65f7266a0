"""Artifacts of a task: their names, sizes and checksums, and the statistics of its diff."""

from typing import Annotated, Self

import msgspec

ArtifactName = Annotated[str, msgspec.Meta(pattern=r"\A(?!\.{1,2}\Z)[^/\x00]+\Z")]
"""A valid file name within one directory. Checked when a journal is read."""

Checksum = Annotated[str, msgspec.Meta(pattern=r"\Asha256:[0-9a-f]{1,64}\Z")]
"""A SHA-256 checksum, which is sent in response headers. Checked when a journal is read."""

GENERATED_DIRECTORY = ".sandbox"
"""Path prefix of the artifacts that Sandbox generates. No file that an agent wrote has this prefix."""

AGENT_SESSION_ARTIFACT = "agent-session.gz"
"""The internal artifact with the agent's session, for a task that continues this one."""

TRANSCRIPT_NAME = "transcript.ndjson"

METADATA_NAME = "metadata.json"
"""The artifact that is stored last. After a failure, other artifacts may be missing."""


class Artifact(msgspec.Struct, frozen=True):
    """A file that is kept after its sandbox is removed.

    name: unique in the task, without `/`.
    path: relative to the workspace root, or `.sandbox/<name>` if Sandbox generated it.
    size_bytes, checksum: size and SHA-256 of the stored bytes; `checksum` is `sha256:<64 hex digits>`.
    is_internal: only tasks that continue this one use the file; clients do not see it.
    """

    name: ArtifactName
    path: str
    size_bytes: int
    content_type: str
    checksum: Checksum
    contains_secret: bool = False
    is_internal: bool = False

    @property
    def is_generated(self) -> bool:
        """Whether Sandbox generated the file."""
        return self.path.startswith(f"{GENERATED_DIRECTORY}/")


def generated_artifact_names(task_id: str) -> frozenset[str]:
    """Return the names of the artifacts that Sandbox may generate for a task. Other files get other names."""
    own = (f"{task_id}.{suffix}" for suffix in ("patch", "chain.patch", "changes.tar"))
    return frozenset({*own, TRANSCRIPT_NAME, AGENT_SESSION_ARTIFACT, METADATA_NAME})


class DiffStatistics(msgspec.Struct, frozen=True):
    """The size of a patch: changed files, and added and deleted lines. Binary files count as having no lines."""

    files: int
    additions: int
    deletions: int


class Artifacts(tuple[Artifact, ...]):
    """The artifacts of a task, with unique names.

    Appending artifacts one by one is cheap: `with_artifact` moves the name index to the result, so the index is rebuilt
    only if the same instance is extended twice.
    """

    _by_name: dict[str, Artifact]

    def find(self, name: str) -> Artifact | None:
        """Return the artifact with this name."""
        return self._name_index().get(name)

    def with_artifact(self, artifact: Artifact) -> Self:
        """Return a copy with this artifact appended. It replaces an earlier artifact with the same name."""
        by_name = self._name_index()
        del self._by_name
        by_name.pop(artifact.name, None)
        by_name[artifact.name] = artifact
        added = type(self)(by_name.values())
        added._by_name = by_name
        return added

    def _name_index(self) -> dict[str, Artifact]:
        if "_by_name" not in self.__dict__:
            self._by_name = {known.name: known for known in self}
        return self._by_name
