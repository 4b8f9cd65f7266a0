"""Follows one run of Claude Code by its stdout, line by line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sandbox.agents.claude_code.outcome import judge
from sandbox.agents.claude_code.stream_json import (
    Block,
    Line,
    Retry,
    clean,
    read_beginning,
    read_blocks,
    read_line,
    read_message,
    read_result,
    read_retry,
)
from sandbox.interfaces.agent import AgentBegan, AgentEvent, Outcome, RetryTold, ToolEnded, ToolStarted, TurnBegan
from sandbox.interfaces.runtime import Exit

OPEN_CALLS_MAX = 10_000
"""Tool calls without an answer that are remembered; past it the oldest is forgotten."""

_SYNTHETIC_MODEL = "<synthetic>"


class ClaudeConversation:
    """Reads stream-json. Never raises, and holds a bounded amount, whatever it is fed.

    There can be several rounds, each with an init and a result (a background command that ends starts one). Only the
    last result counts, and only if the main conversation did not go on after it.
    """

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id
        self._open_calls: dict[str, str] = {}
        self._last_message_id = ""
        self._has_begun = False
        self._result_line: bytes | None = None

    def feed(self, line: bytes) -> Sequence[AgentEvent]:
        """What one whole line of stdout tells."""
        event = read_line(line)
        if event is None and not line.endswith(b"\n"):
            self._result_line = None  # stdout broke off: there was more to say
        if event is None or event.session_id != self._session_id:
            return ()
        match event.type:
            case "assistant":
                return tuple(self._hear_agent(event))
            case "user":
                return tuple(self._hear_tools(event))
            case "result":
                self._result_line = line
            case "system" if event.subtype == "init":
                return tuple(self._hear_beginning(line))
            case "system" if event.subtype == "api_retry":
                return (RetryTold(_retry_sentence(read_retry(line))),)
        return ()

    def outcome(self, exit_: Exit, stderr_tail: bytes) -> Outcome:
        """Judge the end: success only for exit 0 and a last result with `is_error: false`."""
        result = read_result(self._result_line) if self._result_line is not None else None
        return Outcome(result, judge(exit_, result, stderr_tail))

    def _hear_beginning(self, line: bytes) -> Iterator[AgentEvent]:
        self._result_line = None
        if self._has_begun:
            return
        self._has_begun = True
        told = read_beginning(line)
        servers = {clean(server.name): clean(server.status) for server in told.mcp_servers}
        yield AgentBegan(frozenset(map(clean, told.tools)), servers)

    def _hear_agent(self, event: Line) -> Iterator[AgentEvent]:
        message = read_message(event)
        if event.parent_tool_use_id is None:
            self._result_line = None
            if message.id != self._last_message_id and message.model != _SYNTHETIC_MODEL:
                self._last_message_id = message.id[:1024]
                yield TurnBegan()
        for block in read_blocks(message):
            if block.type == "tool_use" and block.id and clean(block.id) not in self._open_calls:
                yield self._open(block)

    def _hear_tools(self, event: Line) -> Iterator[AgentEvent]:
        if event.parent_tool_use_id is None:
            self._result_line = None
        for block in read_blocks(read_message(event)):
            tool_use_id = clean(block.tool_use_id)
            if block.type == "tool_result" and tool_use_id in self._open_calls:
                yield ToolEnded(tool_use_id, self._open_calls.pop(tool_use_id), is_error=block.is_error is True)

    def _open(self, block: Block) -> ToolStarted:
        if len(self._open_calls) >= OPEN_CALLS_MAX:
            del self._open_calls[next(iter(self._open_calls))]
        tool_use_id, tool = clean(block.id), clean(block.name)
        self._open_calls[tool_use_id] = tool
        return ToolStarted(tool_use_id, tool)


def _retry_sentence(retry: Retry) -> str:
    status = f" with status {clean(str(retry.error_status), 8)}" if retry.error_status is not None else ""
    reason = f" ({clean(retry.error, 64)})" if retry.error else ""
    attempt = f"{clean(str(retry.attempt), 8)} of {clean(str(retry.max_retries), 8)}"
    return f"A model request failed{status}{reason}; the agent tries again (retry {attempt})."
