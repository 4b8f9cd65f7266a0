"""JSON bodies of requests, except the manifest, which `model/manifest/` declares."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import MaxLen

from sandbox.model.manifest.field_formats import NO_CONTROL_CHARACTERS, PROMPT
from sandbox.model.manifest.schema import FORBID_EXTRA

REASON_LENGTH_MAX = 1024
OVERRIDES_MAX = 256


@dataclass(frozen=True, kw_only=True)
class CancelRequest:
    """Options of a cancellation."""

    __pydantic_config__ = FORBID_EXTRA
    reason: Annotated[str, MaxLen(REASON_LENGTH_MAX), NO_CONTROL_CHARACTERS] = ""
    """Why the task is cancelled; stored with the task. One line."""
    force: bool = False
    """Whether to kill the agent without a grace period."""


@dataclass(frozen=True, kw_only=True)
class ContinueRequest:
    """The instructions for the task that continues this one."""

    __pydantic_config__ = FORBID_EXTRA
    prompt: Annotated[str, PROMPT]
    """The prompt of the new task."""
    overrides: Annotated[tuple[str, ...], MaxLen(OVERRIDES_MAX)] = ()
    """Fields to set, as `PATH=VALUE`, such as `lifecycle.timeout=2h`. Fields of `repository` cannot be set."""


@dataclass(frozen=True, kw_only=True)
class RerunRequest:
    """Changes to the manifest of the task that is run again."""

    __pydantic_config__ = FORBID_EXTRA
    overrides: Annotated[tuple[str, ...], MaxLen(OVERRIDES_MAX)] = ()
    """Fields to set, as `PATH=VALUE`, such as `vm.cpus=16` or `secrets[0].key=TOKEN`."""
    prompt: Annotated[str, PROMPT] | None = None
    """Another prompt for the agent; null for the same one."""
