"""JSON bodies of requests, except the manifest, which `model/manifest/` declares."""

from typing import Annotated

import msgspec
from annotated_types import MaxLen

from sandbox.model.manifest.field_formats import PROMPT, VISIBLE

REASON_LENGTH_MAX = 1024
OVERRIDES_MAX = 256


class CancelRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a cancellation."""

    reason: Annotated[str, MaxLen(REASON_LENGTH_MAX), VISIBLE] = ""
    """Why the task is cancelled; stored with the task. One line."""
    force: bool = False
    """Whether to kill the agent without a grace period."""


class ContinueRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The instructions for the task that continues this one."""

    prompt: Annotated[str, PROMPT]
    """The prompt of the new task."""
    overrides: Annotated[tuple[str, ...], MaxLen(OVERRIDES_MAX)] = ()
    """Fields to set, as `PATH=VALUE`, such as `lifecycle.timeout=2h`; none of `repository`."""


class RerunRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Changes to the manifest of the task that is run again."""

    overrides: Annotated[tuple[str, ...], MaxLen(OVERRIDES_MAX)] = ()
    """Fields to set, as `PATH=VALUE`, such as `vm.cpus=16` or `secrets[0].key=TOKEN`."""
    prompt: Annotated[str, PROMPT] | None = None
    """Another prompt for the agent; null for the same one."""
