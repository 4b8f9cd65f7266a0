"""One collected result of a task."""

import msgspec


class Artifact(msgspec.Struct, frozen=True):
    """A file kept after the sandbox is gone.

    name: unique in the task, never has a `/`.
    path: relative to the workspace root, or `.sandbox/<name>` for what Sandbox itself made.
    size_bytes, checksum: of the bytes as stored; checksum is `sha256:<64 hex digits>`.
    """

    name: str
    path: str
    size_bytes: int
    content_type: str
    checksum: str
    contains_secret: bool = False
