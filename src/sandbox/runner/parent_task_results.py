"""What an attempt inherits from an earlier task: changes, and the agent's session or the conversation as text."""

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from sandbox.model.artifacts import Artifact
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.fixed_limits import AGENT_SESSION_BYTES_MAX
from sandbox.model.manifest.schema import Manifest
from sandbox.runner.attempt_context import AttemptContext

_GZIP_WINDOW_BITS = 31
_READ_BYTES = 1024 * 1024
_CLOSING_TAG = "</earlier-conversation>"
_OPENING_BRACKETS = re.compile(r"<(?=\s*+/?+\s*+earlier-conversation)", re.IGNORECASE)


def compress_session(session: bytes) -> bytes:
    """Compress a session for storage. The same session always compresses to the same bytes."""
    return gzip.compress(session, compresslevel=6, mtime=0)


def find_inherited_patches(attempt: AttemptContext) -> list[Path]:
    """Return the files that contain earlier tasks' changes, oldest first. Raises AttemptError (clone_failed)."""
    parent = attempt.task.parent
    if parent is None:
        return []
    directory = attempt.task_layout.artifacts
    for patch in parent.patches:
        _check(directory / patch.name, patch, FailureCode.CLONE_FAILED)
    return [directory / patch.name for patch in parent.patches]


def read_inherited_session(attempt: AttemptContext) -> bytes | None:
    """Return the session that the agent continues. Raises AttemptError (provision_failed)."""
    parent = attempt.task.parent
    if parent is None or parent.session is None:
        return None
    path = attempt.task_layout.artifacts / parent.session.name
    _check(path, parent.session, FailureCode.PROVISION_FAILED)
    try:
        session = zlib.decompressobj(_GZIP_WINDOW_BITS).decompress(path.read_bytes(), AGENT_SESSION_BYTES_MAX + 1)
    except (OSError, zlib.error) as error:
        raise _damaged(parent.session, FailureCode.PROVISION_FAILED) from error
    if len(session) > AGENT_SESSION_BYTES_MAX:
        raise _damaged(parent.session, FailureCode.PROVISION_FAILED)
    return session


def manifest_with_earlier_conversation(attempt: AttemptContext) -> Manifest:
    """Return the manifest for the agent: its prompt begins with the earlier conversation unless a session is resumed.

    Raises AttemptError (provision_failed).
    """
    manifest, parent = attempt.task.manifest, attempt.task.parent
    if parent is None or parent.session is not None or parent.conversation is None:
        return manifest
    path = attempt.task_layout.artifacts / parent.conversation.name
    _check(path, parent.conversation, FailureCode.PROVISION_FAILED)
    conversation = _OPENING_BRACKETS.sub("[", path.read_text(errors="replace"))
    prompt = (
        "You are continuing earlier work on this repository. The workspace contains the changes that were made so far. "
        "This is the earlier conversation; long messages are shortened:\n\n"
        f"<earlier-conversation>\n{conversation}\n{_CLOSING_TAG}\n\n"
        f"This is the new request:\n\n{manifest.agent.prompt}"
    )
    return manifest.replace(agent=manifest.agent.with_prompt(prompt))


def _check(path: Path, artifact: Artifact, code: FailureCode) -> None:
    """Require that the file has the recorded checksum."""
    digest = hashlib.sha256()
    try:
        for chunk in _read(path):
            digest.update(chunk)
    except OSError as error:
        raise _damaged(artifact, code) from error
    if f"sha256:{digest.hexdigest()}" != artifact.checksum:
        raise _damaged(artifact, code)


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            yield chunk


def _damaged(artifact: Artifact, code: FailureCode) -> AttemptError:
    message = f"The file {artifact.name} of the task is missing or damaged on the server; restore it from a backup."
    return AttemptError(code, message)
