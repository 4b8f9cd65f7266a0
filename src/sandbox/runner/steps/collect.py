"""Collect step: stores artifacts before the workspace is removed."""

import asyncio
import errno
import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from sandbox.interfaces.agent import AgentDriver
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.runtime import Confine
from sandbox.interfaces.secrets import Redactor, StreamRedactor
from sandbox.interfaces.workspace import DetectSecret, PatchResult, SkippedFile, Workspaces
from sandbox.model.artifacts import (
    AGENT_SESSION_ARTIFACT,
    GENERATED_DIRECTORY,
    METADATA_NAME,
    TRANSCRIPT_NAME,
    Artifact,
    Artifacts,
    DiffStatistics,
)
from sandbox.model.display_text import format_timestamp
from sandbox.model.events import ArtifactCollected, AttemptFailed, EgressDenied, ErrorReported, Output
from sandbox.model.failure import AttemptError, Failure, FailureCode
from sandbox.model.fixed_limits import AGENT_SESSION_BYTES_MAX, SECRET_SCAN_SECONDS_MIN
from sandbox.model.resources import transient_disk_error
from sandbox.model.state_machine import final_state
from sandbox.model.task import Task, reserved_artifact_names
from sandbox.model.wire.task_conversion import attempt_bodies, task_failure_body
from sandbox.primitives.files import fsync_path, remove_on_failure, replace_durably
from sandbox.primitives.secret_digests import matches_fingerprint
from sandbox.runner.attempt_context import AttemptContext, read_records
from sandbox.runner.attempt_recorder import HostDiskSpace
from sandbox.runner.parent_task_results import compress_session

_WITHHELD_REASON = "the reason is withheld, because the values of the secrets are unknown"


class DeadlineRedactor:
    """Implements `interfaces.secrets.Redactor`. Data that is not scanned in time counts as containing a secret.

    seconds: total time limit for all scans, excluding the time spent waiting for chunks.
    monotonic: returns seconds.
    """

    def __init__(self, redactor: Redactor, seconds: float, monotonic: Callable[[], float]) -> None:
        self._redactor = redactor
        self._seconds_left = seconds
        self._monotonic = monotonic

    @property
    def unsearchable_secret_names(self) -> tuple[str, ...]:
        """See `Redactor.unsearchable_secret_names`."""
        return self._redactor.unsearchable_secret_names

    def redact(self, data: bytes) -> bytes:
        """See `Redactor.redact`."""
        return self._redactor.redact(data)

    def redact_text(self, text: str) -> str:
        """See `Redactor.redact_text`."""
        return self._redactor.redact_text(text)

    def redact_json(self, value: Any) -> Any:
        """See `Redactor.redact_json`."""
        return self._redactor.redact_json(value)

    def contains(self, chunks: Iterable[bytes]) -> bool:
        """Return whether the chunks contain a secret value or were not all scanned in time."""
        deadline = self._monotonic() + self._seconds_left
        is_cut = False

        def until_deadline() -> Iterator[bytes]:
            nonlocal deadline, is_cut
            started_at = self._monotonic()
            for chunk in chunks:
                deadline += self._monotonic() - started_at
                if self._monotonic() >= deadline:
                    is_cut = True
                    return
                yield chunk
                started_at = self._monotonic()
            deadline += self._monotonic() - started_at

        contains_secret = self._redactor.contains(until_deadline())
        self._seconds_left = deadline - self._monotonic()
        return contains_secret or is_cut

    def stream(self) -> StreamRedactor:
        """See `Redactor.stream`."""
        return self._redactor.stream()


class ArtifactRecorder(msgspec.Struct, frozen=True):
    """Stores files as artifacts of an attempt and records them.

    redactor: finds secret values in the files; None if there are no secrets or their values are unknown.
    """

    attempt: AttemptContext
    redactor: Redactor | None

    @property
    def directory(self) -> Path:
        """The directory of the task's artifacts."""
        return self.attempt.task_layout.artifacts

    @property
    def is_unredactable(self) -> bool:
        """Whether the task has secrets that may be in any file and cannot be detected."""
        return self.redactor is None and bool(self.attempt.task.manifest.secrets)

    def reason_or_placeholder(self, reason: str) -> str:
        """Return the reason, or a replacement if the reason may contain a secret and cannot be redacted."""
        return _WITHHELD_REASON if self.is_unredactable else reason

    def detect_secret(self, chunks: Iterable[bytes]) -> bool:
        """Return whether the chunks contain a secret value or were not all scanned in time."""
        return self.redactor is not None and self.redactor.contains(chunks)

    def partial_path(self, name: str) -> Path:
        """Return the path for an artifact that is being written."""
        return self.attempt.layout.root / name

    async def store_chunks(
        self, name: str, content_type: str, chunks: Iterable[bytes], partial_suffix: str = ""
    ) -> None:
        """Write the chunks to a file and store it."""
        partial = self.partial_path(f"{name}{partial_suffix}")
        abandoned = threading.Event()
        try:
            await asyncio.to_thread(_write_chunks, partial, chunks, abandoned)
        finally:
            abandoned.set()
        # Journal content was redacted when it was written, and a session is scanned before it is stored.
        await self.store_file(name, content_type, partial, contains_secret=False)

    async def store_file(
        self, name: str, content_type: str, partial: Path, *, contains_secret: bool, diff: DiffStatistics | None = None
    ) -> None:
        """Compute the checksum, flush and rename the file, then record it."""
        abandoned = threading.Event()
        try:
            checksum, size_bytes = await asyncio.to_thread(_finalize_file, partial, self.directory / name, abandoned)
        finally:
            abandoned.set()
        artifact = Artifact(
            name,
            f"{GENERATED_DIRECTORY}/{name}",
            size_bytes,
            content_type,
            f"sha256:{checksum}",
            contains_secret=contains_secret,
            is_internal=name == AGENT_SESSION_ARTIFACT,
        )
        await self.record(artifact, diff)

    async def record(self, artifact: Artifact, diff: DiffStatistics | None = None) -> None:
        """Scan a stored artifact for secrets and record it, unless an earlier try recorded the same artifact."""
        flagged = await self._flag_secrets(artifact)
        if self.find(artifact.name) != flagged:
            self.attempt.recorder.record(ArtifactCollected(flagged, diff))

    def find(self, name: str) -> Artifact | None:
        """Return the artifact with this name that this or an earlier try collected, or None."""
        collected = self.attempt.task.artifacts
        return (collected if isinstance(collected, Artifacts) else Artifacts(collected)).find(name)

    async def record_matching_file(self, artifact: Artifact) -> None:
        """Record a file that matches a pattern.

        If scanning is impossible, trust only an earlier record with the same name, path and content.
        """
        collected = self.find(artifact.name)
        if collected is not None and self.is_unredactable:
            if collected.path != artifact.path:
                artifact = msgspec.structs.replace(artifact, path=artifact.name)
            elif collected.checksum == artifact.checksum:
                await self.record(collected)
                return
        await self.record(msgspec.structs.replace(artifact, contains_secret=self.is_unredactable))

    async def record_renamed(self, artifact: Artifact, name: str) -> None:
        """Rename a file that matches a pattern but whose name contains a secret value, and record it."""
        (self.directory / artifact.name).rename(self.directory / name)
        fsync_path(self.directory)
        path = name if self.is_unredactable else artifact.path
        await self.record(msgspec.structs.replace(artifact, name=name, path=path, contains_secret=self.is_unredactable))

    def has_secret_in_name(self, artifact: Artifact) -> bool:
        """Return whether the name contains a secret value, or the end of a value that starts in the path.

        Returns True if this is unknown. Names may be truncated, and a value may contain slashes.
        """
        if self.redactor is None:
            return self.is_unredactable
        path, name = artifact.path, artifact.name
        if self.redactor.redact_text(name) != name:
            return True
        redacted_path = self.redactor.redact_text(path)
        return redacted_path != path and not redacted_path.endswith(f"/{name}")

    async def _flag_secrets(self, artifact: Artifact) -> Artifact:
        """Flag an artifact that contains a secret value or was not scanned in time."""
        if self.redactor is None or artifact.contains_secret:
            return artifact
        contains_secret = await _scan_for_secrets(self.detect_secret, _read_chunks(self.directory / artifact.name))
        return msgspec.structs.replace(artifact, contains_secret=contains_secret)


class CollectStep(msgspec.Struct, frozen=True):
    """Stores the artifacts of an attempt.

    confine: confines git. disk_space: free space of the data directory. driver: reads the session that is kept for
    tasks that continue this one; None if this version does not have the task's agent.
    """

    attempt: AttemptContext
    journals: Journals
    workspaces: Workspaces
    confine: Confine
    disk_space: HostDiskSpace
    clock: Clock
    driver: AgentDriver | None = None

    async def run(self) -> None:
        """Store the patch, the transcript, the agent's session, the files that match the patterns, and the metadata.

        Everything that can be stored is stored, even if the patch fails; the metadata comes last and includes the
        failure. If the secret values have changed since the agent started, files on its disk may contain unknown
        values. In that case, all files are flagged, and their names are replaced.

        Once the metadata exists, even after an incomplete collection, nothing is collected again, because part of the
        workspace may be removed already. Raises OSError, or an AttemptError caused by one, if the server's disk
        rejected a write; in that case, a retry is possible.
        """
        attempt = self.attempt
        if attempt.task.is_collected:
            return
        artifacts = ArtifactRecorder(attempt, await asyncio.to_thread(self._make_deadline_redactor))
        artifacts.directory.mkdir(mode=0o700, exist_ok=True)
        fsync_path(artifacts.directory.parent)
        try:
            await self._collect_patch(artifacts)
        except AttemptError as error:
            if transient_disk_error(error) is not None:
                raise
            if self.disk_space.is_short():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            message = f"The patch could not be created; {_WITHHELD_REASON}."
            failure = Failure(error.failure.code, message) if artifacts.is_unredactable else error.failure
            attempt.recorder.record_once(AttemptFailed(failure))
        await self._store_transcript(artifacts)
        if self.driver is not None:
            await self._store_session(artifacts, self.driver)
        await self._collect_pattern_matches(artifacts)
        await self._store_metadata()

    async def store_metadata(self) -> None:
        """Store the metadata, which is always available, after a collection that did not finish. Raises OSError."""
        self.attempt.task_layout.artifacts.mkdir(mode=0o700, exist_ok=True)
        # Use another name for the partial file: an abandoned thread may still be writing the one with the usual name.
        await self._store_metadata(".last")

    def _make_deadline_redactor(self) -> DeadlineRedactor | None:
        """Create the secret scanner for collected files; None if there are no secrets or their values have changed."""
        redactor = self.attempt.redactor
        if redactor is None or not self._has_same_secrets():
            return None
        seconds = max(SECRET_SCAN_SECONDS_MIN, self._seconds(_SCAN_SHARE))
        return DeadlineRedactor(redactor, seconds, self.clock.monotonic)

    def _has_same_secrets(self) -> bool:
        """Return whether the agent had the current secret values. Returns True if there is no disk."""
        layout = self.attempt.layout
        return not layout.disk.exists() or matches_fingerprint(layout.secret_fingerprint, self.attempt.secrets)

    def _seconds(self, share: float) -> float:
        """Return a share of the timeout."""
        return self.attempt.task.manifest.lifecycle.collect_timeout_seconds * share

    async def _collect_patch(self, artifacts: ArtifactRecorder) -> None:
        task = self.attempt.task
        base_commit, is_ended = task.base_commit, task.failure is not None or task.cancel is not None
        if base_commit is None or (is_ended and not self.attempt.layout.host_git_directory.is_dir()):  # removed already
            return
        name = f"{task.id}.patch"
        patch = await self._write_patch(artifacts, name, base_commit, _PATCH_SHARE)
        has_secret = patch.contains_secret or artifacts.is_unredactable
        partial = artifacts.partial_path(name)
        await artifacts.store_file(name, "text/x-diff", partial, contains_secret=has_secret, diff=patch.diff)
        if patch.incomplete_reason is None:
            await self._collect_chain_patch(artifacts)
        else:
            reason = artifacts.reason_or_placeholder(patch.incomplete_reason)
            await self._collect_changed_files(artifacts, base_commit, reason)

    async def _collect_chain_patch(self, artifacts: ArtifactRecorder) -> None:
        """If the task continues another one, store the changes of the whole chain as one patch."""
        parent = self.attempt.task.parent
        if parent is None:
            return
        name = self._chain_patch_name
        patch = await self._write_patch(artifacts, name, parent.chain_base_commit, _CHANGED_FILES_SHARE)
        has_secret = patch.contains_secret or artifacts.is_unredactable
        await artifacts.store_file(name, "text/x-diff", artifacts.partial_path(name), contains_secret=has_secret)
        if patch.incomplete_reason is not None:
            reason = artifacts.reason_or_placeholder(patch.incomplete_reason)
            message = f"{name} is incomplete: {reason}. Apply the patches of the chain one by one."
            self.attempt.recorder.record_once(ErrorReported("chain_patch_truncated", message))

    async def _write_patch(self, artifacts: ArtifactRecorder, name: str, base_commit: str, share: float) -> PatchResult:
        """Write the changes since a commit within a share of the timeout."""
        root, partial, seconds = self.attempt.layout.root, artifacts.partial_path(name), self._seconds(share)
        try:
            async with asyncio.timeout(seconds):
                return await self.workspaces.write_patch(
                    root, base_commit, partial, self.confine, artifacts.detect_secret
                )
        except TimeoutError:
            reason = f"creating it took longer than {seconds:.1f} s"
            partial.write_text(f"# truncated: {reason}\n")
            return PatchResult(incomplete_reason=reason)

    async def _collect_changed_files(self, artifacts: ArtifactRecorder, base_commit: str, reason: str) -> None:
        """Store the files that the patch lacks. The task does not fail if some of these files cannot be stored."""
        name = self._tar_name
        root, partial, seconds = (
            self.attempt.layout.root,
            artifacts.partial_path(name),
            self._seconds(_CHANGED_FILES_SHARE),
        )
        try:
            async with asyncio.timeout(seconds):
                missing = await self.workspaces.write_changed_files_archive(root, base_commit, partial, self.confine)
        except TimeoutError:
            problem = f"The patch is incomplete: {reason}. Storing the changed files took longer than "
            limit = f"{seconds:.1f} s; raise lifecycle.collect_timeout."
            raise AttemptError(FailureCode.COLLECT_FAILED, problem + limit) from None
        await artifacts.store_file(name, "application/x-tar", partial, contains_secret=artifacts.is_unredactable)
        exceptions = f" {name} lacks some of them: {missing}." if missing else ""
        message = f"The patch is incomplete: {reason}. The new and changed files are in {name}.{exceptions}"
        self.attempt.recorder.record_once(ErrorReported("patch_truncated", message))

    async def _store_session(self, artifacts: ArtifactRecorder, driver: AgentDriver) -> None:
        """Store the agent's session for a task that continues this one, unless it may contain a secret value.

        An interactive session is not stored: users may have typed anything into it.
        """
        attempt, home, present = self.attempt, self.attempt.layout.home, self.attempt.task.attempt
        if not attempt.keeps_session or present is None or present.session_id is None:
            return
        if attempt.task.manifest.agent.is_interactive or artifacts.is_unredactable or not home.is_dir():
            return
        content = await asyncio.to_thread(driver.read_session, home, present.session_id, AGENT_SESSION_BYTES_MAX)
        if content is None or await _scan_for_secrets(artifacts.detect_secret, _split_chunks(content)):
            return
        compressed = await asyncio.to_thread(compress_session, content)
        await artifacts.store_chunks(AGENT_SESSION_ARTIFACT, "application/gzip", [compressed])

    async def _collect_pattern_matches(self, artifacts: ArtifactRecorder) -> None:
        attempt, task = self.attempt, self.attempt.task
        patterns = task.manifest.lifecycle.artifact_patterns
        if not patterns or not attempt.layout.workspace.is_dir():
            return
        reserved_names = reserved_artifact_names(task)
        secret_named: list[Artifact] = []
        names: set[str] = set()
        matches = self.workspaces.collect(attempt.layout.workspace, patterns, artifacts.directory, reserved_names)
        async for artifact in matches:
            if isinstance(artifact, SkippedFile):
                path = "a file" if artifacts.is_unredactable else artifact.path
                attempt.recorder.record_once(
                    ErrorReported("artifact_left_out", f"{path}: {artifact.reason}"), subject=artifact.path
                )
                continue
            names.add(artifact.name)
            if artifacts.find(artifact.name) is None and artifacts.has_secret_in_name(artifact):
                secret_named.append(artifact)
            else:
                await artifacts.record_matching_file(artifact)
        for artifact, name in zip(secret_named, _redacted_names(names), strict=False):
            await artifacts.record_renamed(artifact, name)

    @property
    def _chain_patch_name(self) -> str:
        return f"{self.attempt.task.id}.chain.patch"

    @property
    def _tar_name(self) -> str:
        return f"{self.attempt.task.id}.changes.tar"

    async def _store_transcript(self, artifacts: ArtifactRecorder) -> None:
        """Store the transcript, or reuse the one that an earlier try stored.

        The stored transcript is complete, because the agent had ended. The disk may have no space for another one.
        """
        collected = artifacts.find(TRANSCRIPT_NAME)
        if collected is not None and (artifacts.directory / TRANSCRIPT_NAME).is_file():
            await artifacts.record(collected)
        else:
            await artifacts.store_chunks(TRANSCRIPT_NAME, "application/x-ndjson", self._read_transcript())

    def _read_transcript(self) -> Iterator[bytes]:
        """Yield the agent's own events: its stdout, or the transcript if stdout is rendered from the events."""
        if not self._has_space_for_transcript():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield from self._read_agent_output()

    def _read_agent_output(self) -> Iterator[bytes]:
        """Yield the recorded output.

        Yields nothing for an interactive agent, because any process in the sandbox can write to its terminal.
        """
        agent = self.attempt.task.manifest.agent
        if agent.is_interactive:
            return
        for record in read_records(self.journals, self.attempt.task.id):
            if isinstance(record.event, Output) and record.event.stream == agent.recorded_stream:
                yield record.event.data

    def _has_space_for_transcript(self) -> bool:
        """Return whether the disk has space for the transcript: storing it must not fill the disk and then fail.

        The transcript is no longer than the journal, so reading the journal is rarely necessary.
        """
        if self.disk_space.has_space_for(self.journals.size_bytes(self.attempt.task.id)):
            return True
        size_bytes = sum(map(len, self._read_agent_output()))
        return size_bytes <= _SMALL_TRANSCRIPT_BYTES or self.disk_space.has_space_for(size_bytes)

    async def _store_metadata(self, partial_suffix: str = "") -> None:
        """Store the metadata, which is short enough to scan without a deadline."""
        artifacts = ArtifactRecorder(self.attempt, self.attempt.redactor)
        await artifacts.store_chunks(METADATA_NAME, "application/json", self._encode_metadata(), partial_suffix)

    def _encode_metadata(self) -> Iterator[bytes]:
        task = self.attempt.task
        refusals, denied_count = self._read_egress_denials()
        total = max(denied_count, task.progress.egress_denied)
        content = {**_summarize(task), "refusals": refusals, "refusals_total": total}
        yield msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"

    def _read_egress_denials(self) -> tuple[list[dict[str, object]], int]:
        """Return the first recorded denials, and the number of recorded ones: all may be too many for memory."""
        first: list[dict[str, object]] = []
        count = 0
        for record in read_records(self.journals, self.attempt.task.id):
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


def _redacted_names(names: Collection[str]) -> Iterator[str]:
    """Yield names that are not taken, always in the same order, so a repeated collection chooses the same names."""
    return (name for number in itertools.count(1) if (name := f"redacted-{number}") not in names)


def _write_chunks(partial: Path, chunks: Iterable[bytes], abandoned: threading.Event) -> None:
    """Write the file; remove it if it cannot be written completely, or if the caller is no longer waiting."""
    with remove_on_failure(partial), partial.open("wb") as file:
        for chunk in chunks:
            if abandoned.is_set():
                raise TimeoutError("The file is no longer needed")
            file.write(chunk)


def _finalize_file(partial: Path, target: Path, abandoned: threading.Event) -> tuple[str, int]:
    """Rename the file unless the caller is no longer waiting; return its SHA-256 in hex and its size."""
    with remove_on_failure(partial):
        with partial.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            size_bytes = os.fstat(file.fileno()).st_size
        fsync_path(partial)
        if abandoned.is_set():
            raise TimeoutError("The file is no longer needed")
        replace_durably(partial, target)
    return checksum, size_bytes


async def _scan_for_secrets(detect_secret: DetectSecret, chunks: Iterable[bytes]) -> bool:
    abandoned = threading.Event()
    try:
        return await asyncio.to_thread(detect_secret, itertools.takewhile(lambda _: not abandoned.is_set(), chunks))
    finally:
        abandoned.set()  # after a cancellation the thread continues, but scans only the chunk that it has started


def _split_chunks(content: bytes) -> Iterator[bytes]:
    return (content[start : start + _CHUNK_BYTES] for start in range(0, len(content), _CHUNK_BYTES))


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


_DENIALS_MAX = 1000
_PATCH_SHARE, _CHANGED_FILES_SHARE, _SCAN_SHARE = 0.5, 0.3, 0.2
"""Shares of collect_timeout for the patch, the tar of changed files or the chain's patch, and the secret scan."""

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
        "error": task_failure_body(task),
        "exit_code": task.exit_code,
        "states": [{"state": entry.state, "at": format_timestamp(entry.at)} for entry in task.history],
        "repository": {
            "url": manifest.repository.url,
            "branch": manifest.repository.branch,
            "base_commit": task.base_commit,
        },
        "attempts": attempt_bodies(task),
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
