"""The workspace: cloned by the host, worked on by the agent, read back by the host."""

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from sandbox.interfaces.runtime import Confine
from sandbox.model.events import Artifact
from sandbox.model.manifest.schema import Repository


class SkippedFile(msgspec.Struct, frozen=True):
    """A file that matched but was not collected, and why, for people."""

    path: str
    reason: str


class PatchResult(msgspec.Struct, frozen=True):
    """What became of a patch.

    unfinished: why not everything is in it, for people, None when it is.
    contains_secret: some file's content in it holds a value, which the patch itself may have in git's own encoding.
    """

    incomplete_reason: str | None = None
    contains_secret: bool = False


ContainsSecret = Callable[[Iterable[bytes]], bool]
"""Whether a value stands in the concatenation of the chunks; they need not be taken to their end."""


class Workspaces(Protocol):
    """Git and files. Every call is bounded by the caller (cancellation ends its children).

    What reads what is hostile does so in what `confine` makes.
    """

    async def stage(self, repository: Repository, attempt_dir: Path, confine: Confine, disk_bytes: int) -> str:
        """Clone into the `workspace` of an `AttemptLayout`, keep what `patch` needs in its `repository`.

        disk_bytes: of the attempt's disk; no file of the clone, and no commit's files together, may be larger.
        Gives the full base commit. Raises AttemptError (clone_failed). May be called again after a crash.
        """
        ...

    async def patch(
        self, attempt_dir: Path, base_commit: str, target: Path, confine: Confine, contains_secret: ContainsSecret
    ) -> PatchResult:
        """Write to `target` what the agent changed. Raises AttemptError (collect_failed)."""
        ...

    async def changed_files(self, attempt_dir: Path, base_commit: str, target: Path, confine: Confine) -> str | None:
        """Write to `target` a tar of the files that the agent made or changed, for a patch that does not hold them.

        Gives why not all are in it, for people, None when they are. Raises AttemptError (collect_failed).
        """
        ...

    def collect(
        self, workspace: Path, patterns: Sequence[str], target: Path, taken_names: frozenset[str]
    ) -> AsyncIterator[Artifact | SkippedFile]:
        """Copy each regular file that matches into `target/<artifact name>`, whole and flushed, one at a time."""
        ...
