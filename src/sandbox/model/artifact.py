"""One collected result of a task."""

from typing import Annotated

import msgspec

ArtifactName = Annotated[str, msgspec.Meta(pattern=r"\A(?!\.{1,2}\Z)[^/\x00]+\Z")]
"""What can be a file's name in one directory; journals are held to it when they are read."""


OWN_DIRECTORY = ".sandbox"
"""Where the paths of what Sandbox itself made begin; nothing that an agent wrote has such a path."""


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
