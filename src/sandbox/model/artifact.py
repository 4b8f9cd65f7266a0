"""One collected result of a task."""

from typing import Annotated, Self

import msgspec

ArtifactName = Annotated[str, msgspec.Meta(pattern=r"\A(?!\.{1,2}\Z)[^/\x00]+\Z")]
"""What can be a file's name in one directory; journals are held to it when they are read."""


OWN_DIRECTORY = ".sandbox"
"""Where the paths of what Sandbox itself made begin; nothing that an agent wrote has such a path."""

METADATA = "metadata.json"
"""The name of the artifact that is kept last: no other follows it. After a failure some may be missing."""


class Artifact(msgspec.Struct, frozen=True):
    """A file kept after the sandbox is gone.

    name: unique in the task, never has a `/`.
    path: relative to the workspace root, or `.sandbox/<name>` for what Sandbox itself made.
    size_bytes, checksum: of the bytes as stored; checksum is `sha256:<64 hex digits>`.
    """

    name: ArtifactName
    path: str
    size_bytes: int
    content_type: str
    checksum: str
    contains_secret: bool = False

    @property
    def is_own(self) -> bool:
        """Whether Sandbox itself made it."""
        return self.path.startswith(f"{OWN_DIRECTORY}/")


class Artifacts(tuple[Artifact, ...]):
    """A task's artifacts, each name once, that many can be added to one after the other.

    What finds a name is handed on to the next ones: only who adds to the same artifacts twice looks at all of them.
    """

    _by_name: dict[str, Artifact]

    def named(self, name: str) -> Artifact | None:
        """The one of this name."""
        return self._found().get(name)

    def collected(self, artifact: Artifact) -> Self:
        """With this one as the last, in the place of an earlier one of its name."""
        by_name = self._found()
        del self._by_name
        by_name.pop(artifact.name, None)
        by_name[artifact.name] = artifact
        added = type(self)(by_name.values())
        added._by_name = by_name
        return added

    def _found(self) -> dict[str, Artifact]:
        if "_by_name" not in self.__dict__:
            self._by_name = {known.name: known for known in self}
        return self._by_name
