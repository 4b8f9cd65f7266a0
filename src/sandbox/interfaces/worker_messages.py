"""The messages between the server and a worker. A worker connects to the server, over TLS.

The first message on a worker's connection is a `Claim`, a `JoinStream`, an `Upload` or a `FetchImage`. The server may
answer a `Claim` with `ProveHost`, and the worker sends `HostProof`. After the `Claim` is accepted, both sides send the
messages of `WorkerMessage` and `ServerMessage`. After a `JoinStream`, the connection carries the bytes of a runner's
control socket. After an `Upload`, the worker sends the file in `ArtifactPart` messages. After a `FetchImage`, the
server sends the image in `ImagePart` messages, or `ImageNotSent`, and the worker closes the connection.

Messages from a worker are untrusted: the host of a worker may be compromised. The size of each message is limited,
and an invalid message ends the worker.
"""

from typing import Annotated, Literal

import msgspec

from sandbox.interfaces.cluster_engine import IDENTITY_TOKEN_CHARACTERS_MAX
from sandbox.interfaces.images import ImageDigest, ImageReference
from sandbox.interfaces.runner import FinishAttempt, RunAttempt, RunDebugSession
from sandbox.interfaces.task_file_layout import AttemptId
from sandbox.interfaces.workspace import CredentialAnswer, CredentialRequest
from sandbox.model.artifacts import Artifact
from sandbox.model.fixed_limits import WORKER_RECORD_BYTES_MAX

PROTOCOL_VERSION = 2
"""The version of these messages. Increase it for every change that an earlier version cannot read.

A server and a worker with different versions can still exchange `Claim` and `WorkerDismissed`: their fields are never
removed, and new fields have defaults.
"""

FIRST_MESSAGE_BYTES_MAX = 8 * 1024
"""Maximum size of the messages before a claim is accepted. Anyone who can reach the server can send such messages."""

WORKER_MESSAGE_BYTES_MAX = WORKER_RECORD_BYTES_MAX + 1024**2
"""Maximum size of any other message from a worker, enough for its largest record."""

SERVER_RECORD_BYTES_MAX = 34 * 1024**2
"""Maximum size of a record that the server sends, enough for the largest submission."""

SERVER_MESSAGE_BYTES_MAX = 256 * 1024**2
"""Maximum size of a message from the server. A launch contains the secrets of a task."""

RECORD_BATCH_BYTES = 1024**2
"""Size of a batch of records, unless one record is larger."""

ARTIFACT_PART_BYTES = 256 * 1024
"""Maximum size of the data in an `ArtifactPart`."""

RUNNER_LOG_BYTES_MAX = 1024**2
"""Maximum number of bytes that are kept from the end of a runner's log."""

LEFTOVER_TASK_BATCH_MAX = 16
"""Maximum number of tasks in a `FindEndedTasks`. A worker with more leftover tasks sends several."""

HEARTBEAT_SECONDS_MAX = 2.0
"""Maximum interval between the heartbeats of a worker."""

NO_JOIN_TOKEN = bytes(32)
"""The token in the claim of a worker that has an identity token instead of a join token."""

HOST_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}"
"""The name of a host. It is also a valid name of a directory."""

HostName = Annotated[str, msgspec.Meta(pattern=rf"\A{HOST_NAME_PATTERN}\Z")]
_Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_ShortText = Annotated[str, msgspec.Meta(max_length=64)]
_TaskId = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?\Z")]
_OptionalDigest = Annotated[str, msgspec.Meta(pattern=r"\A(sha256:[0-9a-f]{64})?\Z")]
_Path = Annotated[str, msgspec.Meta(max_length=4096)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Version = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Za-z.+_-]{0,64}\Z")]


class Claim(msgspec.Struct, frozen=True, tag="claim", rename={"packages_digest": "packages"}):
    """A worker claims its attempt, or reconnects.

    token: the join token of the job, or NO_JOIN_TOKEN.
    nonce: a random number that a worker process sends with each of its claims.
    runtime: the runtime that works on the host.
    version: the version of Sandbox on the host. cpus, memory_bytes: the resources of the whole host, for display only.
        Workers of earlier versions send none of the three.
    protocol: the worker's `PROTOCOL_VERSION`.
    packages_digest: identifies the installed packages of the host and their versions; empty if they are unknown. For
        display only.
    """

    attempt_id: AttemptId
    token: _Bytes32
    nonce: _Bytes32
    host: HostName
    boot_id: _ShortText
    runtime: _ShortText
    version: _Version = ""
    cpus: _Number = 0
    memory_bytes: _Number = 0
    protocol: _Number = 1
    packages_digest: _OptionalDigest = ""

    def __repr__(self) -> str:
        """Omit the token."""
        return f"Claim({self.attempt_id!r}, {self.host!r})"


class JoinStream(msgspec.Struct, frozen=True, tag="join_stream"):
    """The connection carries the stream that an `OpenStream` requested."""

    session_key: _Bytes32
    stream_id: _Number


class Upload(msgspec.Struct, frozen=True, tag="upload"):
    """The connection carries an artifact of the worker's task."""

    session_key: _Bytes32
    artifact: Artifact


class FetchImage(msgspec.Struct, frozen=True, tag="fetch_image"):
    """The connection carries the image that this session's latest `PrepareImage` named."""

    session_key: _Bytes32
    digest: ImageDigest


FirstMessage = Claim | JoinStream | Upload | FetchImage


class HostProof(msgspec.Struct, frozen=True, tag="host_proof"):
    """The answer to `ProveHost`.

    proof: the result of `compute_host_proof`; None if the worker cannot read the host's key.
    identity_token: the token that the engine issued to the worker; empty if there is none.
    """

    proof: _Bytes32 | None
    identity_token: Annotated[str, msgspec.Meta(max_length=IDENTITY_TOKEN_CHARACTERS_MAX)] = ""

    def __repr__(self) -> str:
        """Omit the proof and the token."""
        return "HostProof()"


class ArtifactPart(msgspec.Struct, frozen=True, tag="artifact_part"):
    """A part of an artifact; an empty part marks the end."""

    data: Annotated[bytes, msgspec.Meta(max_length=ARTIFACT_PART_BYTES)]


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", rename={"lock_state": "liveness"}):
    """The state of the worker's runner and its journal. The server's answer extends the lease.

    lock_state: whether a runner holds the journal's lock. end_offset: the size of the journal, read after `lock_state`.
    launches: the number of launches that this worker has begun. is_launching: the last launch has not returned.
    """

    number: _Number
    lock_state: Literal["held", "free"]
    end_offset: _Number
    launches: _Number
    is_launching: bool


class Records(msgspec.Struct, frozen=True, tag="records"):
    """Whole records of the journal, from `offset` on. The worker sends further records after `RecordsReceived`."""

    offset: _Number
    data: bytes


class CallResult(msgspec.Struct, frozen=True, tag="result"):
    """The result of a `ServerCall` as JSON, or the name and message of its error."""

    call_id: _Number
    value: bytes = b"null"
    error: _ShortText = ""
    message: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class StreamRefused(msgspec.Struct, frozen=True, tag="stream_refused"):
    """No runner listens for the stream that an `OpenStream` requested."""

    stream_id: _Number


class RunnerLog(msgspec.Struct, frozen=True, tag="runner_log"):
    """The end of the log of an attempt's runner, for operators."""

    attempt_id: AttemptId
    data: Annotated[bytes, msgspec.Meta(max_length=RUNNER_LOG_BYTES_MAX)]


class WorkDone(msgspec.Struct, frozen=True, tag="done"):
    """The task has ended, the server has all records, and the worker has removed the task's files."""


class FindEndedTasks(msgspec.Struct, frozen=True, tag="find_ended"):
    """Other workers have left files of these tasks on the host. The server answers with `EndedTasks`."""

    task_ids: Annotated[tuple[_TaskId, ...], msgspec.Meta(max_length=LEFTOVER_TASK_BATCH_MAX)]


WorkerMessage = (
    Heartbeat | Records | CallResult | StreamRefused | RunnerLog | WorkDone | FindEndedTasks | CredentialRequest
)


class ProveHost(msgspec.Struct, frozen=True, tag="prove_host"):
    """The worker has to prove that it runs on a host of the cluster.

    challenge: a random number that the server uses once.
    """

    challenge: _Bytes32


class Claimed(msgspec.Struct, frozen=True, tag="claimed"):
    """The claim is accepted: the worker may run the attempt.

    session_key: authenticates further connections of this session.
    end_offset: the size of the server's copy of the journal.
    """

    session_key: bytes
    task_id: _TaskId
    lease_seconds: float
    end_offset: int

    def __repr__(self) -> str:
        """Omit the key."""
        return f"Claimed({self.task_id!r})"


class WorkerDismissed(msgspec.Struct, frozen=True, tag="fenced"):
    """The worker must kill its runner and exit, because it must not run the attempt or sent an invalid message."""

    reason: str


class HeartbeatAnswer(msgspec.Struct, frozen=True, tag="heartbeat_answer"):
    """Extends the lease, counted from the time when the worker sent the heartbeat with this number."""

    number: int


class RecordsReceived(msgspec.Struct, frozen=True, tag="records_received"):
    """The server's copy of the journal is on disk up to `end_offset`.

    is_accepted: false if the server cannot store the records now; the worker sends them again later.
    """

    end_offset: int
    is_accepted: bool = True


class EndedTasks(msgspec.Struct, frozen=True, tag="ended_tasks"):
    """The tasks of a `FindEndedTasks` that have ended, or that the server does not have."""

    task_ids: tuple[_TaskId, ...]


class UploadReceived(msgspec.Struct, frozen=True, tag="upload_received"):
    """The server has stored the artifact on disk, or cannot store it now."""

    is_accepted: bool


class ImagePart(msgspec.Struct, frozen=True, tag="image_part"):
    """A part of an image; an empty part marks the end."""

    data: bytes


class ImageNotSent(msgspec.Struct, frozen=True, tag="image_not_sent"):
    """The server sends no image, or stops before the end of the image. The worker retries later.

    code: the code of an `ImageTransfersBusyError` or an `ImageUnreadableError`. message: human-readable.
    """

    code: Annotated[str, msgspec.Meta(pattern=r"\A(image_transfers_busy|image_unreadable)\Z")]
    message: Annotated[str, msgspec.Meta(max_length=1024)]


class OpenStream(msgspec.Struct, frozen=True, tag="open_stream"):
    """The worker opens a new connection for the attempt's control socket, and sends `JoinStream` on that connection."""

    stream_id: int
    attempt_id: AttemptId


class TaskEnded(msgspec.Struct, frozen=True, tag="release_task"):
    """The task has ended: the worker exits once nothing is preserved."""


class ReceiveRecords(msgspec.Struct, frozen=True, tag="receive_records"):
    """Append records of the server to the journal on the worker's host. Returns the journal's new end offset."""

    offset: int
    data: bytes


class Launch(msgspec.Struct, frozen=True, tag="launch"):
    """Start a runner. Returns the number of launches so far."""

    order: RunAttempt | FinishAttempt


class ReadEndOffset(msgspec.Struct, frozen=True, tag="end_offset"):
    """Return the size of the journal on the worker's host."""


class IsResponsive(msgspec.Struct, frozen=True, tag="is_responsive"):
    """Return whether the runner of an attempt responds."""

    attempt_id: AttemptId


class KillRunner(msgspec.Struct, frozen=True, tag="kill_runner"):
    """Kill the runner that holds the journal's lock. Returns whether a runner held the lock."""


class PrepareImage(msgspec.Struct, frozen=True, tag="prepare_image"):
    """Return whether the host has this image, and start to fetch it if not. The result is an `ImagePreparationStatus`.

    image: the server's image of the profile; None if the server has none, so that sandboxes use the host's own /usr.
    """

    profile: str
    image: ImageReference | None


class PreparedImage(msgspec.Struct, frozen=True):
    """An image on the host of a worker.

    digest: as in `Image`. directory: the directory on this host.
    """

    digest: ImageDigest
    directory: _Path


class ImagePreparationStatus(msgspec.Struct, frozen=True):
    """The result of a `PrepareImage`.

    image: the image; None if it is not complete, or if the request named none.
    received_bytes: the size of what has been fetched.
    problem: why the last attempt to fetch it failed (human-readable); empty if there was none.
    """

    is_ready: bool
    image: PreparedImage | None = None
    received_bytes: _Number = 0
    problem: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class FindImage(msgspec.Struct, frozen=True, tag="find_image"):
    """Return the image that was last prepared for the task, as a `PreparedImage`; null for the host's own /usr."""

    profile: str


class HasDisk(msgspec.Struct, frozen=True, tag="has_disk"):
    """Return whether the disk of an attempt exists."""

    attempt_id: AttemptId


class HasDiskOrHandle(msgspec.Struct, frozen=True, tag="is_preserved"):
    """Return whether an attempt has a disk or a handle."""

    attempt_id: AttemptId


class HasSameSecrets(msgspec.Struct, frozen=True, tag="has_same_secrets"):
    """Return whether the agent that wrote an attempt's files had exactly these secret values."""

    attempt_id: AttemptId
    secrets: dict[str, str]

    def __repr__(self) -> str:
        """Omit the secrets."""
        return f"HasSameSecrets({self.attempt_id!r})"


class HasSandboxHandle(msgspec.Struct, frozen=True, tag="has_handle"):
    """Return whether any attempt of the task has a handle."""


class LockDisk(msgspec.Struct, frozen=True, tag="lock_disk"):
    """Lock the preserved disk of an attempt until `UnlockDisk` or the end of the session. Returns "held" or "free"."""

    lock_id: int
    attempt_id: AttemptId


class StartDebugSession(msgspec.Struct, frozen=True, tag="start_session"):
    """Start a debug session on a locked disk."""

    lock_id: int
    order: RunDebugSession


class RemoveDisk(msgspec.Struct, frozen=True, tag="remove_disk"):
    """Remove all files of the attempt whose disk is locked, except the runner's log."""

    lock_id: int


class UnlockDisk(msgspec.Struct, frozen=True, tag="unlock_disk"):
    """Release the lock of a disk."""

    lock_id: int


Request = (
    ReceiveRecords
    | Launch
    | ReadEndOffset
    | IsResponsive
    | KillRunner
    | PrepareImage
    | FindImage
    | HasDisk
    | HasDiskOrHandle
    | HasSameSecrets
    | HasSandboxHandle
    | LockDisk
    | StartDebugSession
    | RemoveDisk
    | UnlockDisk
)
"""The requests of the server to a worker. Each request is about the worker's task."""


class ServerCall(msgspec.Struct, frozen=True, tag="call"):
    """A request to the worker, which answers with a `CallResult`."""

    call_id: int
    request: Request


ServerMessage = (
    ProveHost
    | Claimed
    | WorkerDismissed
    | HeartbeatAnswer
    | RecordsReceived
    | UploadReceived
    | ImagePart
    | ImageNotSent
    | OpenStream
    | TaskEnded
    | ServerCall
    | EndedTasks
    | CredentialAnswer
)
