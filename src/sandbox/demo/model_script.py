"""What the scripted model says, turn by turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec


class Text(msgspec.Struct, frozen=True, tag="text"):
    """The model says something."""

    text: str


class ToolUse(msgspec.Struct, frozen=True, tag="tool_use"):
    """The model calls a tool; the server makes up the id."""

    name: str
    input: dict[str, Any]


Block = Text | ToolUse


class Fault(msgspec.Struct, frozen=True):
    """A request that goes wrong, `times` times in a row.

    error: an error answer with `status` · hang: no answer at all · cut: the stream breaks off half-way.
    """

    kind: Literal["error", "hang", "cut"] = "error"
    status: int = 500
    message: str = "The script wants this request to fail."
    times: int = 1


class Turn(msgspec.Struct, frozen=True):
    """One answer. `faults` come first, one after the other, each time the turn is asked for.

    stop_reason: `tool_use` or `end_turn` by the content when empty; `refusal` is one to try.
    delay_seconds: before the first byte; block_delay_seconds: before each block.
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
        """Why the answer ends, in the API's words."""
        calls_tool = any(isinstance(block, ToolUse) for block in self.content)
        return self.stop_reason or ("tool_use" if calls_tool else "end_turn")

    def fault(self, request_count: int) -> Fault | None:
        """The fault that meets whoever asks after `asked_before` others."""
        for fault in self.faults:
            if request_count < fault.times:
                return fault
            request_count -= fault.times
        return None


class Script(msgspec.Struct, frozen=True):
    """The turns of the main conversation, and of others, known by a word in their first user message (subagents)."""

    turns: tuple[Turn, ...]
    branches: dict[str, tuple[Turn, ...]] = {}

    def branch(self, first_user_message: str) -> str:
        """The branch a conversation belongs to; empty for the main one."""
        return next((word for word in self.branches if word in first_user_message), "")

    def turn(self, branch: str, index: int) -> Turn:
        """The turn at `index` (from 0); past the end the model has nothing more to say."""
        turns = self.branches[branch] if branch else self.turns
        return turns[index] if index < len(turns) else END_OF_SCRIPT


END_OF_SCRIPT = Turn((Text("The script is over."),), output_tokens=5)


def load_script(path: Path) -> Script:
    """Read a script from JSON. Raises OSError or msgspec.DecodeError."""
    return msgspec.json.decode(path.read_bytes(), type=Script)


def example_script() -> Script:
    """The script that goes with the example repository."""
    from importlib import resources

    return msgspec.json.decode(resources.files(__package__).joinpath("example_script.json").read_bytes(), type=Script)
