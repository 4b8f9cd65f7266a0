"""The workspace: cloned by the host with credentials, changed by the agent, read back by the host.

A runner on a host of a cluster requests the credentials for a clone from its worker, which requests them from the
server.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from sandbox.interfaces.runtime import Confine
from sandbox.interfaces.task_file_layout import AttemptId
from sandbox.model.artifacts import Artifact, DiffStatistics
from sandbox.model.manifest.schema import Repository

CREDENTIAL_REQUESTS_MAX = 8
"""Maximum number of requests per clone. Additional requests get no credentials."""

CREDENTIAL_BYTES_MAX = 16 * 1024
"""Maximum size of a user name, and of a password."""

CREDENTIAL_MESSAGE_BYTES_MAX = 3 * CREDENTIAL_BYTES_MAX
"""Maximum size of a message between a runner and its worker."""

CREDENTIAL_ANSWER_SECONDS = 120.0
"""How long a runner waits for an answer. A server may be restarted in this time."""


class NoCredentialsError(Exception):
    """There are no credentials. The message says why. is_transient: a later attempt may get them."""

    def __init__(self, reason: str, *, is_transient: bool = False) -> None:
        super().__init__(reason)
        self.is_transient = is_transient


class CredentialQuery(msgspec.Struct, frozen=True):
    """The protocol, and the host with the port, for which git needs credentials."""

    protocol: str
    host: str


class Credentials(msgspec.Struct, frozen=True):
    """A user name and a password, in the encoding of git's user."""

    username: Annotated[bytes, msgspec.Meta(max_length=CREDENTIAL_BYTES_MAX)]
    password: Annotated[bytes, msgspec.Meta(max_length=CREDENTIAL_BYTES_MAX)]

    def __repr__(self) -> str:
        """Omit the user name and the password."""
        return f"{type(self).__name__}()"


FindCredentials = Callable[[CredentialQuery], Awaitable[Credentials]]
"""Finds the credentials for a host. Raises NoCredentialsError."""


class CredentialRequest(msgspec.Struct, frozen=True, tag="credential_request"):
    """An attempt needs credentials for its clone. number: repeated in the `CredentialAnswer`."""

    number: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    attempt_id: AttemptId
    protocol: Annotated[str, msgspec.Meta(pattern=r"\Ahttps?\Z")]
    host: Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x20\x7f-\x9f]{1,300}\Z")]


class CredentialAnswer(msgspec.Struct, frozen=True, tag="credential_answer"):
    """The credentials, or the reason why there are none; see `NoCredentialsError`."""

    number: int
    credentials: Credentials | None = None
    reason: str = ""
    is_transient: bool = False


class SkippedFile(msgspec.Struct, frozen=True):
    """A file that matched a pattern but was not collected, and the human-readable reason."""

    path: str
    reason: str


class PatchResult(msgspec.Struct, frozen=True):
    """The result of making a patch.

    incomplete_reason: why the patch lacks changes that a patch can contain (human-readable); None if it lacks none.
        Comments in the patch list the paths that no patch can contain.
    contains_secret: the content of a file in the patch contains a secret value. The patch
        itself may contain the value in git's binary encoding.
    diff: the size of the patch; None if it is incomplete or its size is unknown.
    """

    incomplete_reason: str | None = None
    contains_secret: bool = False
    diff: DiffStatistics | None = None


DetectSecret = Callable[[Iterable[bytes]], bool]
"""Returns whether the concatenated chunks contain a secret value; may stop reading before the last chunk."""


class Workspaces(Protocol):
    """Git and file operations. The caller sets time limits. Cancelling a call ends its child processes.

    `confine` creates the confinement of programs that read untrusted data.
    """

    async def stage(
        self,
        repository: Repository,
        attempt_dir: Path,
        confine: Confine,
        disk_bytes: int,
        patches: Sequence[Path] = (),
    ) -> str:
        """Clone into the `workspace` of an `AttemptLayout`; store what `write_patch` needs in its `host_git_directory`.

        patches: files with further changes, which become one commit each, in this order, after `repository.patch`.
        disk_bytes: size of the attempt's disk. It limits the size of each file of the clone, and the total size of the
            files of one commit.

        Returns the full base commit. Raises AttemptError (clone_failed, provision_failed, sandbox_lost). May be called
        again after a crash.
        """
        ...

    async def write_patch(
        self, attempt_dir: Path, base_commit: str, target: Path, confine: Confine, detect_secret: DetectSecret
    ) -> PatchResult:
        """Write the agent's changes to `target`. Raises AttemptError (collect_failed)."""
        ...

    async def write_changed_files_archive(
        self, attempt_dir: Path, base_commit: str, target: Path, confine: Confine
    ) -> str | None:
        """Write a tar of the files that the agent created or changed, for use when the patch lacks some of these files.

        Returns why the tar lacks some files (human-readable), or None. The tar always lacks paths that no patch can
        contain, such as those that are too long. Raises AttemptError (collect_failed).
        """
        ...

    def collect(
        self, workspace: Path, patterns: Sequence[str], target: Path, taken_names: frozenset[str]
    ) -> AsyncIterator[Artifact | SkippedFile]:
        """Copy each matching regular file to `target/<artifact name>`, complete and flushed, one at a time."""
        ...
