"""Script of the scripted model: its turns and faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec


class Text(msgspec.Struct, frozen=True, tag="text"):
    """A text block in the model's response."""

    text: str


class ToolUse(msgspec.Struct, frozen=True, tag="tool_use"):
    """A tool call in the model's response; the server generates its id."""

    name: str
    input: dict[str, Any]


Block = Text | ToolUse


class Fault(msgspec.Struct, frozen=True):
    """A fault that affects `times` consecutive requests.

    kind: `error` sends an error response with `status`, `hang` sends no response, and `cut` aborts the stream halfway
    through.
    """

    kind: Literal["error", "hang", "cut"] = "error"
    status: int = 500
    message: str = "The script makes this request fail."
    times: int = 1


class Turn(msgspec.Struct, frozen=True):
    """One response of the model. Requests for this turn first get the turn's `faults` in order, one fault per request.

    stop_reason: for example `refusal`. If it is empty, the content determines the stop reason: `tool_use` or
    `end_turn`.
    delay_seconds: delay before the first byte.
    block_delay_seconds: delay before each block.
    """

    content: tuple[Block, ...] = ()
    stop_reason: str = ""
    input_tokens: int = 1000
    output_tokens: int = 50
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    delay_seconds: float = 0.0
    block_delay_seconds: float = 0.0
    faults: tuple[Fault, ...] = ()

    @property
    def effective_stop_reason(self) -> str:
        """The stop reason of the response, as in the API."""
        calls_tool = any(isinstance(block, ToolUse) for block in self.content)
        return self.stop_reason or ("tool_use" if calls_tool else "end_turn")

    def fault(self, request_count: int) -> Fault | None:
        """Return the fault for the request that follows `request_count` earlier ones for this turn, or None."""
        for fault in self.faults:
            if request_count < fault.times:
                return fault
            request_count -= fault.times
        return None


class Script(msgspec.Struct, frozen=True):
    """The turns of the main conversation and of its branches.

    A branch (a subagent's conversation) is identified by a word in its first user message.
    """

    turns: tuple[Turn, ...]
    branches: dict[str, tuple[Turn, ...]] = {}

    def branch(self, first_user_message: str) -> str:
        """Return the branch of a conversation; empty for the main one."""
        return next((word for word in self.branches if word in first_user_message), "")

    def turn(self, branch: str, index: int) -> Turn:
        """Return the turn at `index` (from 0); END_OF_SCRIPT after the last one."""
        turns = self.branches[branch] if branch else self.turns
        return turns[index] if index < len(turns) else END_OF_SCRIPT


END_OF_SCRIPT = Turn(
    (Text("This is the demo's scripted model. For other prompts, start the demo with your API key."),),
    output_tokens=20,
)


def load_script(path: Path) -> Script:
    """Read a script from JSON. Raises OSError or msgspec.DecodeError."""
    return msgspec.json.decode(path.read_bytes(), type=Script)


def example_script() -> Script:
    """Return the script for the example repository."""
    from importlib import resources

    return msgspec.json.decode(resources.files(__package__).joinpath("example_script.json").read_bytes(), type=Script)
