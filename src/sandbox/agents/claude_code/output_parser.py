"""Parses the stdout of one run of Claude Code, line by line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sandbox.agents.claude_code.outcome import determine_failure
from sandbox.agents.claude_code.stream_json import (
    ApiRetryEvent,
    ContentBlock,
    StreamEvent,
    read_blocks,
    read_event,
    read_init,
    read_message,
    read_result,
    read_retry,
    sanitize,
)
from sandbox.interfaces.agent import (
    AgentEvent,
    AgentOutcome,
    AgentReady,
    ApiRetry,
    ToolFinished,
    ToolStarted,
    TurnStarted,
)
from sandbox.interfaces.runtime import ExitStatus

OPEN_CALLS_MAX = 10_000
"""Maximum number of unanswered tool calls that are kept. Above it, the oldest one is dropped."""

INIT_TOOLS_MAX = 10_000
"""Maximum number of the agent's tools that are kept; each is compared with every pattern of `allowed_tools`."""

_SYNTHETIC_MODEL = "<synthetic>"


class ClaudeOutputParser:
    """Parses stream-json. Never raises and uses bounded memory, for any input.

    A run can have several rounds, each with an init and a result: the end of a background command starts a new round.
    Only the last result counts, and only if the main conversation did not continue after it.
    """

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id
        self._open_calls: dict[str, str] = {}
        self._last_message_id = ""
        self._is_initialized = False
        self._result_line: bytes | None = None

    def parse_line(self, line: bytes) -> Sequence[AgentEvent]:
        """Return the events of one line of stdout."""
        event = read_event(line)
        if event is None and not line.endswith(b"\n"):
            self._result_line = None  # stdout ended within a line, so the last result was not the end
        if event is None or event.session_id != self._session_id:
            return ()
        match event.type:
            case "assistant":
                return tuple(self._handle_assistant_message(event))
            case "user":
                return tuple(self._handle_tool_results(event))
            case "result":
                self._result_line = line
            case "system" if event.subtype == "init":
                return tuple(self._handle_init(line))
            case "system" if event.subtype == "api_retry":
                return (ApiRetry(_retry_message(read_retry(line))),)
        return ()

    def outcome(self, exit_: ExitStatus, stderr_tail: bytes) -> AgentOutcome:
        """Return the outcome: success only for exit code 0 and a last result with `is_error: false`."""
        result = read_result(self._result_line) if self._result_line is not None else None
        return AgentOutcome(result, determine_failure(exit_, result, stderr_tail))

    def _handle_init(self, line: bytes) -> Iterator[AgentEvent]:
        self._result_line = None
        if self._is_initialized:
            return
        self._is_initialized = True
        init = read_init(line)
        servers = {sanitize(server.name): sanitize(server.status) for server in init.mcp_servers}
        yield AgentReady(frozenset(map(sanitize, init.tools[:INIT_TOOLS_MAX])), servers)

    def _handle_assistant_message(self, event: StreamEvent) -> Iterator[AgentEvent]:
        message = read_message(event)
        if event.parent_tool_use_id is None:
            self._result_line = None
            if message.id != self._last_message_id and message.model != _SYNTHETIC_MODEL:
                self._last_message_id = message.id[:1024]
                yield TurnStarted()
        for block in read_blocks(message):
            if block.type == "tool_use" and block.id and sanitize(block.id) not in self._open_calls:
                yield self._start_tool_call(block)

    def _handle_tool_results(self, event: StreamEvent) -> Iterator[AgentEvent]:
        if event.parent_tool_use_id is None:
            self._result_line = None
        for block in read_blocks(read_message(event)):
            tool_use_id = sanitize(block.tool_use_id)
            if block.type == "tool_result" and tool_use_id in self._open_calls:
                yield ToolFinished(tool_use_id, self._open_calls.pop(tool_use_id), is_error=block.is_error is True)

    def _start_tool_call(self, block: ContentBlock) -> ToolStarted:
        if len(self._open_calls) >= OPEN_CALLS_MAX:
            del self._open_calls[next(iter(self._open_calls))]
        tool_use_id, tool = sanitize(block.id), sanitize(block.name)
        self._open_calls[tool_use_id] = tool
        return ToolStarted(tool_use_id, tool)


def _retry_message(retry: ApiRetryEvent) -> str:
    status = f" with status {sanitize(str(retry.error_status), 8)}" if retry.error_status is not None else ""
    reason = f" ({sanitize(retry.error, 64)})" if retry.error else ""
    attempt = f"{sanitize(str(retry.attempt), 8)} of {sanitize(str(retry.max_retries), 8)}"
    return f"A model request failed{status}{reason}; the agent tries again (retry {attempt})."
