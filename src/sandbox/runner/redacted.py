"""Events without the values of secrets."""

from typing import Any

import msgspec

from sandbox.contracts.redaction import Redaction
from sandbox.model.artifact import OWN_DIRECTORY
from sandbox.model.event import (
    AgentStarted,
    ArtifactCollected,
    Event,
    Output,
    SandboxCreated,
    Trouble,
    WorkspacePrepared,
)

_NOT_REDACTED = (Output, WorkspacePrepared, SandboxCreated, AgentStarted)


def redact_event(event: Event, redaction: Redaction) -> Event:
    """The same event with every text of it redacted; output is redacted as a stream, before it is an event.

    Codes stay, and names by which something is found again: of commit, image, session and stored artifact.
    """
    if isinstance(event, _NOT_REDACTED):
        return event
    if isinstance(event, ArtifactCollected):
        artifact = event.artifact
        is_own = artifact.path.startswith(f"{OWN_DIRECTORY}/")
        path = artifact.path if is_own else redaction.redact_text(artifact.path)
        return ArtifactCollected(msgspec.structs.replace(artifact, path=path))
    redacted: Event = _redact(event, redaction)
    return msgspec.structs.replace(redacted, error=event.error) if isinstance(event, Trouble) else redacted


def _redact(value: Any, redaction: Redaction) -> Any:
    """Exactly `str`: a code or a state is a word of ours, whatever a secret's value happens to be."""
    if type(value) is str:
        return redaction.redact_text(value)
    if isinstance(value, dict):
        return redaction.redact_value(value)
    if isinstance(value, msgspec.Struct):
        fields = {name: _redact(getattr(value, name), redaction) for name in value.__struct_fields__}
        return msgspec.structs.replace(value, **fields)
    return value
