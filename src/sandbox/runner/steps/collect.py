"""Collect step: stores artifacts before the workspace is removed."""

import asyncio
import errno
import hashlib
import itertools
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import msgspec

from sandbox.interfaces.agent import AgentDriver
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.runtime import Confine
from sandbox.interfaces.workspace import FindSecret, PatchResult, SkippedFile, Workspaces
from sandbox.model.disk_space import transient_disk_error
from sandbox.model.events import (
    GENERATED_DIRECTORY,
    METADATA_NAME,
    SESSION_NAME,
    Artifact,
    ArtifactCollected,
    Artifacts,
    AttemptFailed,
    DiffStatistics,
    EgressDenied,
    ErrorReported,
    Output,
)
from sandbox.model.failure import AttemptError, Failure, FailureCode
from sandbox.model.limits import SECRET_SCAN_SECONDS_MIN, SESSION_BYTES_MAX
from sandbox.model.state_machine import final_state
from sandbox.model.task import Task
from sandbox.model.wire.events import attempts_fields, error_fields, format_timestamp
from sandbox.runner.attempt_context import AttemptContext, read_records
from sandbox.runner.attempt_recorder import HostDiskSpace
from sandbox.runner.inheritance import compress_session
from sandbox.runner.redaction import DeadlineRedactor
from sandbox.system.files import fsync_path, remove_on_failure, replace_durably
from sandbox.system.secret_fingerprint import matches_fingerprint


class CollectStep(msgspec.Struct, frozen=True):
    """Stores the artifacts of an attempt.

    confine: confines git. disk_space: free space of the data directory. agent: reads the session that is kept for
    tasks that continue this one; None if this version does not have the task's agent.
    """

    attempt: AttemptContext
    journals: Journals
    workspaces: Workspaces
    confine: Confine
    disk_space: HostDiskSpace
    clock: Clock
    agent: AgentDriver | None = None

    async def run(self) -> None:
        """Store the patch, the transcript, the files that match the patterns, and the metadata.

        Everything that can be stored is stored, even if the patch fails; the metadata comes last and includes the
        failure. If the secret values have changed since the agent started, files on its disk may contain unknown
        values: then all files are flagged, and their names are replaced.

        Once the metadata exists, even after an incomplete collection, nothing is collected again, because part of the
        workspace may be removed already. Raises OSError, or an AttemptError caused by one, if the server's disk
        rejected a write; then a retry is possible.
        """
        attempt = self.attempt
        if attempt.task.is_collected:
            return
        redactor = await asyncio.to_thread(self._make_deadline_redactor)
        deadline_attempt = msgspec.structs.replace(attempt, redaction=redactor)
        directory = attempt.task_layout.artifacts
        directory.mkdir(mode=0o700, exist_ok=True)
        fsync_path(directory.parent)
        try:
            await _collect_patch(deadline_attempt, directory, self.workspaces, self.confine)
        except AttemptError as error:
            if transient_disk_error(error) is not None:
                raise
            if self.disk_space.is_short():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            message = (
                "The patch could not be created; the reason is withheld, because the values of the secrets are unknown."
            )
            failure = Failure(error.failure.code, message) if _is_unredactable(deadline_attempt) else error.failure
            attempt.recorder.record_once(AttemptFailed(failure))
        await _store_transcript(deadline_attempt, directory, self.journals, self.disk_space)
        if self.agent is not None:
            await _store_session(deadline_attempt, directory, self.agent)
        await _collect_pattern_matches(deadline_attempt, directory, self.workspaces)
        # Short enough to scan without a deadline.
        metadata = _encode_metadata(attempt, self.journals)
        await _store_chunks(attempt, directory, METADATA_NAME, "application/json", metadata)

    async def store_metadata(self) -> None:
        """Store the metadata, which is always available, after a collection that did not finish. Raises OSError."""
        directory = self.attempt.task_layout.artifacts
        directory.mkdir(mode=0o700, exist_ok=True)
        metadata = _encode_metadata(self.attempt, self.journals)
        # An abandoned thread may still write the part file with the usual name.
        await _store_chunks(self.attempt, directory, METADATA_NAME, "application/json", metadata, ".last")

    def _make_deadline_redactor(self) -> DeadlineRedactor | None:
        """Create the secret scanner for collected files; None if there are no secrets or their values differ."""
        attempt = self.attempt
        if attempt.redaction is None or not _has_same_secrets(attempt):
            return None
        seconds = max(SECRET_SCAN_SECONDS_MIN, attempt.task.manifest.lifecycle.collect_timeout_seconds * _SCAN_SHARE)
        return DeadlineRedactor(attempt.redaction, seconds, self.clock.monotonic)


def _has_same_secrets(attempt: AttemptContext) -> bool:
    """Return whether this disk's agent had the same secret values. True if the disk does not exist."""
    return not attempt.layout.disk.exists() or matches_fingerprint(attempt.layout.secret_fingerprint, attempt.secrets)


async def _collect_patch(attempt: AttemptContext, directory: Path, workspaces: Workspaces, confine: Confine) -> None:
    base_commit, is_ended = (
        attempt.task.base_commit,
        attempt.task.failure is not None or attempt.task.cancel is not None,
    )
    if base_commit is None or (is_ended and not attempt.layout.repository.is_dir()):  # removed already
        return
    name = f"{attempt.task.id}.patch"
    part = attempt.layout.root / name
    seconds = attempt.task.manifest.lifecycle.collect_timeout_seconds * _PATCH_SHARE
    try:
        async with asyncio.timeout(seconds):
            patch = await workspaces.patch(attempt.layout.root, base_commit, part, confine, _secret_scanner(attempt))
    except TimeoutError:
        patch = PatchResult(incomplete_reason=f"creating it took longer than {seconds:.1f} s")
        part.write_text(f"# truncated: {patch.incomplete_reason}\n")
    has_secret = patch.contains_secret or _is_unredactable(attempt)
    await _store_file(attempt, directory, name, "text/x-diff", part, contains_secret=has_secret, diff=patch.diff)
    if patch.incomplete_reason is None:
        await _collect_chain_patch(attempt, directory, workspaces, confine)
    else:
        await _collect_changed_files(attempt, directory, base_commit, patch.incomplete_reason, workspaces, confine)


async def _collect_chain_patch(
    attempt: AttemptContext, directory: Path, workspaces: Workspaces, confine: Confine
) -> None:
    """Store the changes of the whole chain as one patch, if the task continues another one."""
    parent = attempt.task.parent
    if parent is None:
        return
    name = _chain_patch_name(attempt)
    part = attempt.layout.root / name
    seconds = attempt.task.manifest.lifecycle.collect_timeout_seconds * _CHANGED_FILES_SHARE
    arguments = (attempt.layout.root, parent.first_commit, part, confine, _secret_scanner(attempt))
    try:
        async with asyncio.timeout(seconds):
            patch = await workspaces.patch(*arguments)
    except TimeoutError:
        patch = PatchResult(incomplete_reason=f"creating it took longer than {seconds:.1f} s")
        part.write_text(f"# truncated: {patch.incomplete_reason}\n")
    has_secret = patch.contains_secret or _is_unredactable(attempt)
    await _store_file(attempt, directory, name, "text/x-diff", part, contains_secret=has_secret)
    if patch.incomplete_reason is not None:
        message = f"{name} is incomplete: {patch.incomplete_reason}. Apply the patches of the chain one by one."
        attempt.recorder.record_once(ErrorReported("chain_patch_truncated", message))


def _secret_scanner(attempt: AttemptContext) -> FindSecret:
    return (lambda _: False) if attempt.redaction is None else attempt.redaction.contains


async def _collect_changed_files(
    attempt: AttemptContext, directory: Path, base_commit: str, reason: str, workspaces: Workspaces, confine: Confine
) -> None:
    """Store the files that the patch lacks. The task does not fail if some of them cannot be stored."""
    name = _tar_name(attempt)
    part = attempt.layout.root / name
    seconds = attempt.task.manifest.lifecycle.collect_timeout_seconds * _CHANGED_FILES_SHARE
    try:
        async with asyncio.timeout(seconds):
            missing = await workspaces.changed_files(attempt.layout.root, base_commit, part, confine)
    except TimeoutError:
        problem = f"The patch is incomplete: {reason}. Storing the changed files took longer than "
        limit = f"{seconds:.1f} s; raise lifecycle.collect_timeout."
        raise AttemptError(FailureCode.COLLECT_FAILED, problem + limit) from None
    await _store_file(attempt, directory, name, "application/x-tar", part, contains_secret=_is_unredactable(attempt))
    exceptions = f" except some: {missing}" if missing else ""
    message = f"The patch is incomplete: {reason}. The new and changed files are in {name}{exceptions}."
    attempt.recorder.record_once(ErrorReported("patch_truncated", message))


async def _store_session(attempt: AttemptContext, directory: Path, agent: AgentDriver) -> None:
    """Store the agent's session for a task that continues this one, unless it may contain a secret value.

    An interactive session is not stored: users may have typed anything into it.
    """
    present = attempt.task.attempt
    if not attempt.keeps_session or present is None or present.session_id is None:
        return
    if attempt.task.manifest.agent.is_interactive or _is_unredactable(attempt) or not attempt.layout.home.is_dir():
        return
    content = await asyncio.to_thread(agent.read_session, attempt.layout.home, present.session_id, SESSION_BYTES_MAX)
    if content is None or await _scan_for_secrets(_secret_scanner(attempt), _split_chunks(content)):
        return
    part = attempt.layout.root / SESSION_NAME
    compressed = await asyncio.to_thread(compress_session, content)
    await asyncio.to_thread(_write_chunks, part, [compressed], threading.Event())
    await _store_file(attempt, directory, SESSION_NAME, "application/gzip", part, contains_secret=False)


async def _collect_pattern_matches(attempt: AttemptContext, directory: Path, workspaces: Workspaces) -> None:
    patterns = attempt.task.manifest.lifecycle.artifact_patterns
    if not patterns or not attempt.layout.workspace.is_dir():
        return
    parent = attempt.task.parent
    reserved_names = frozenset(
        {
            *(f"{attempt.task.id}.patch", _chain_patch_name(attempt), _tar_name(attempt)),
            *(_TRANSCRIPT, SESSION_NAME, METADATA_NAME),
            *(file.name for file in (parent.files if parent is not None else ())),
        }
    )
    secret_named: list[Artifact] = []
    names: set[str] = set()
    async for artifact in workspaces.collect(attempt.layout.workspace, patterns, directory, reserved_names):
        if isinstance(artifact, SkippedFile):
            path = "a file" if _is_unredactable(attempt) else artifact.path
            attempt.recorder.record_once(
                ErrorReported("artifact_left_out", f"{path}: {artifact.reason}"), subject=artifact.path
            )
        elif (collected := _find_collected(attempt, artifact.name)) is None and _has_secret_in_name(attempt, artifact):
            secret_named.append(artifact)
        else:
            names.add(artifact.name)
            _record_artifact(
                attempt, await _flag_secrets(attempt, directory, _reuse_collected(attempt, artifact, collected))
            )
    for artifact, name in zip(
        secret_named, _redacted_names(names.union(one.name for one in secret_named)), strict=False
    ):
        renamed = _rename(directory, artifact, name)
        if _is_unredactable(attempt):
            renamed = msgspec.structs.replace(renamed, path=name)
        _record_artifact(attempt, await _flag_secrets(attempt, directory, _flag_if_unredactable(attempt, renamed)))


def _chain_patch_name(attempt: AttemptContext) -> str:
    return f"{attempt.task.id}.chain.patch"


def _tar_name(attempt: AttemptContext) -> str:
    return f"{attempt.task.id}.changes.tar"


def _is_unredactable(attempt: AttemptContext) -> bool:
    """Return whether the task's secrets may occur anywhere and cannot be detected."""
    return attempt.redaction is None and bool(attempt.task.manifest.secrets)


def _flag_if_unredactable(attempt: AttemptContext, artifact: Artifact) -> Artifact:
    """Flag an artifact that cannot be scanned."""
    return msgspec.structs.replace(artifact, contains_secret=_is_unredactable(attempt))


def _reuse_collected(attempt: AttemptContext, artifact: Artifact, collected: Artifact | None) -> Artifact:
    """If scanning is impossible, trust only an earlier record with the same name, path and content."""
    if collected is None or not _is_unredactable(attempt):
        return _flag_if_unredactable(attempt, artifact)
    if collected.path != artifact.path:
        return _flag_if_unredactable(attempt, msgspec.structs.replace(artifact, path=artifact.name))
    return collected if collected.checksum == artifact.checksum else _flag_if_unredactable(attempt, artifact)


def _has_secret_in_name(attempt: AttemptContext, artifact: Artifact) -> bool:
    """Return whether the name contains a secret value, or the end of one that starts in the path. True if unknown.

    Names may be cut, and a value may contain slashes.
    """
    redaction = attempt.redaction
    if redaction is None:
        return _is_unredactable(attempt)
    path, name = artifact.path, artifact.name
    if redaction.redact_text(name) != name:
        return True
    redacted_path = redaction.redact_text(path)
    return redacted_path != path and not redacted_path.endswith(f"/{name}")


def _redacted_names(names: Collection[str]) -> Iterator[str]:
    """Yield unused names in a fixed order, so a repeated collection reuses them."""
    return (name for number in itertools.count(1) if (name := f"redacted-{number}") not in names)


def _rename(directory: Path, artifact: Artifact, name: str) -> Artifact:
    (directory / artifact.name).rename(directory / name)
    fsync_path(directory)
    return msgspec.structs.replace(artifact, name=name)


async def _store_chunks(
    attempt: AttemptContext,
    directory: Path,
    name: str,
    content_type: str,
    chunks: Iterable[bytes],
    part_suffix: str = "",
) -> None:
    part = attempt.layout.root / f"{name}{part_suffix}"
    abandoned = threading.Event()
    try:
        await asyncio.to_thread(_write_chunks, part, chunks, abandoned)
    finally:
        abandoned.set()
    # Journal content was already redacted when it was written.
    await _store_file(attempt, directory, name, content_type, part, contains_secret=False)


def _write_chunks(part: Path, chunks: Iterable[bytes], abandoned: threading.Event) -> None:
    """Write the file; remove it if it cannot be written completely, or if the caller no longer waits."""
    with remove_on_failure(part), part.open("wb") as file:
        for chunk in chunks:
            if abandoned.is_set():
                raise TimeoutError("The file is no longer needed")
            file.write(chunk)


async def _store_file(
    attempt: AttemptContext,
    directory: Path,
    name: str,
    content_type: str,
    part: Path,
    *,
    contains_secret: bool,
    diff: DiffStatistics | None = None,
) -> None:
    """Compute the checksum, flush and rename the file, then record it."""
    abandoned = threading.Event()
    try:
        checksum, size_bytes = await asyncio.to_thread(_finalize_file, part, directory / name, abandoned)
    finally:
        abandoned.set()
    path = f"{GENERATED_DIRECTORY}/{name}"
    artifact = Artifact(
        name,
        path,
        size_bytes,
        content_type,
        f"sha256:{checksum}",
        contains_secret=contains_secret,
        is_internal=name == SESSION_NAME,
    )
    _record_artifact(attempt, await _flag_secrets(attempt, directory, artifact), diff)


def _finalize_file(part: Path, target: Path, abandoned: threading.Event) -> tuple[str, int]:
    """Return the SHA-256 in hex and the size. Do not rename a file if the caller no longer waits."""
    with remove_on_failure(part):
        with part.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            size_bytes = os.fstat(file.fileno()).st_size
        fsync_path(part)
        if abandoned.is_set():
            raise TimeoutError("The file is no longer needed")
        replace_durably(part, target)
    return checksum, size_bytes


def _record_artifact(attempt: AttemptContext, artifact: Artifact, diff: DiffStatistics | None = None) -> None:
    """Record an artifact unless an earlier try recorded the same."""
    if _find_collected(attempt, artifact.name) != artifact:
        attempt.recorder.record(ArtifactCollected(artifact, diff))


def _find_collected(attempt: AttemptContext, name: str) -> Artifact | None:
    """Return the artifact with this name that this or an earlier try collected, or None."""
    collected = attempt.task.artifacts
    return (collected if isinstance(collected, Artifacts) else Artifacts(collected)).find(name)


async def _flag_secrets(attempt: AttemptContext, directory: Path, artifact: Artifact) -> Artifact:
    """Flag an artifact that contains a secret value or was not scanned in time."""
    redaction = attempt.redaction
    if redaction is None or artifact.contains_secret:
        return artifact
    contains_secret = await _scan_for_secrets(redaction.contains, _read_chunks(directory / artifact.name))
    return msgspec.structs.replace(artifact, contains_secret=contains_secret)


async def _scan_for_secrets(find_secret: FindSecret, chunks: Iterable[bytes]) -> bool:
    abandoned = threading.Event()
    try:
        return await asyncio.to_thread(find_secret, itertools.takewhile(lambda _: not abandoned.is_set(), chunks))
    finally:
        abandoned.set()  # after a cancellation the thread continues, but scans only the chunk that it has started


def _split_chunks(content: bytes) -> Iterator[bytes]:
    return (content[start : start + _CHUNK_BYTES] for start in range(0, len(content), _CHUNK_BYTES))


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


async def _store_transcript(
    attempt: AttemptContext, directory: Path, journals: Journals, disk_space: HostDiskSpace
) -> None:
    """Store the transcript, or reuse the one that an earlier try stored.

    The stored transcript is complete, because the agent had ended. The disk may have no space for another one.
    """
    collected = _find_collected(attempt, _TRANSCRIPT)
    if collected is not None and (directory / _TRANSCRIPT).is_file():
        _record_artifact(attempt, await _flag_secrets(attempt, directory, collected))
    else:
        transcript = _read_transcript(attempt.task, journals, disk_space)
        await _store_chunks(attempt, directory, _TRANSCRIPT, "application/x-ndjson", transcript)


def _read_transcript(task: Task, journals: Journals, disk_space: HostDiskSpace) -> Iterator[bytes]:
    """Yield the agent's own events: its stdout, or the transcript if stdout is rendered from them."""
    if not _has_space_for_transcript(task, journals, disk_space):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    yield from _read_agent_output(task, journals)


def _read_agent_output(task: Task, journals: Journals) -> Iterator[bytes]:
    """Yield the recorded output; none of an interactive agent, because any process inside may write to its terminal."""
    agent = task.manifest.agent
    if agent.is_interactive:
        return
    for record in read_records(journals, task.id):
        if isinstance(record.event, Output) and record.event.stream == agent.recorded_stream:
            yield record.event.data


def _has_space_for_transcript(task: Task, journals: Journals, disk_space: HostDiskSpace) -> bool:
    """Return whether the disk has space for the transcript: a large one must not fill the disk and then fail.

    The transcript is no longer than the journal, so reading the journal is rarely necessary.
    """
    if disk_space.has_space_for(journals.size_bytes(task.id)):
        return True
    size_bytes = sum(map(len, _read_agent_output(task, journals)))
    return size_bytes <= _SMALL_TRANSCRIPT_BYTES or disk_space.has_space_for(size_bytes)


def _encode_metadata(attempt: AttemptContext, journals: Journals) -> Iterator[bytes]:
    refusals, denied_count = _read_egress_denials(journals, attempt.task.id)
    total = max(denied_count, attempt.task.progress.egress_denied)
    content = {**_summarize(attempt.task), "refusals": refusals, "refusals_total": total}
    yield msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _read_egress_denials(journals: Journals, task_id: str) -> tuple[list[dict[str, object]], int]:
    """Return the first denials and the total number; a runner's memory may be too small for all denials."""
    first: list[dict[str, object]] = []
    count = 0
    for record in read_records(journals, task_id):
        if isinstance(denied := record.event, EgressDenied):
            count += 1
            if count <= _DENIALS_MAX:
                denial = {
                    "at": format_timestamp(record.at),
                    "host": denied.host,
                    "port": denied.port,
                    "reason": denied.reason,
                }
                first.append(denial)
    return first, count


_TRANSCRIPT = "transcript.ndjson"
_DENIALS_MAX = 1000
_PATCH_SHARE, _CHANGED_FILES_SHARE, _SCAN_SHARE = 0.5, 0.3, 0.2
"""Shares of collect_timeout for the patch, the tar of changed files, and the secret scan."""

_CHUNK_BYTES = 256 * 1024
_SMALL_TRANSCRIPT_BYTES = 4 * 1024**2
"""Below this size, try the write even if the disk looks full: root may use reserved blocks."""


def _summarize(task: Task) -> dict[str, object]:
    state, message = final_state(task)
    manifest, attempt, progress = task.manifest, task.attempt, task.progress
    return {
        "task_id": task.id,
        "name": manifest.metadata.name,
        "labels": manifest.metadata.labels,
        "state": state,
        "state_message": message,
        "error": error_fields(task),
        "exit_code": task.exit_code,
        "states": [{"state": entry.state, "at": format_timestamp(entry.at)} for entry in task.history],
        "repository": {
            "url": manifest.repository.url,
            "branch": manifest.repository.branch,
            "base_commit": task.base_commit,
        },
        "attempts": attempts_fields(task),
        "usage": {
            "model": manifest.agent.model,
            "turns": progress.turns,
            "tool_calls": progress.tool_calls,
            "input_tokens": progress.input_tokens,
            "output_tokens": progress.output_tokens,
            "cost_usd": progress.cost_usd,
        },
        "sandbox": {
            "attempt_id": attempt.id if attempt else None,
            "runtime": attempt.runtime if attempt else None,
            "image": attempt.image if attempt else None,
            "cpus": manifest.vm.cpus,
            "memory_bytes": manifest.vm.memory_bytes,
        },
        "policy": {"network_mode": manifest.vm.network_mode, "allowed_hosts": manifest.vm.allowed_hosts},
    }
