"""Parses the stdout of one run of Claude Code, line by line, and determines how the run ended."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from sandbox.agents.claude_code.allowed_tools import ClaudeReady
from sandbox.agents.claude_code.stream_json import (
    SHORT_TEXT_CHARACTERS_MAX,
    ApiRetryEvent,
    ClaudeTaskEvent,
    ContentBlock,
    InitEvent,
    StreamEvent,
    content_text,
    read_all_result_fields,
    read_blocks,
    read_claude_task,
    read_displayed_result_fields,
    read_event,
    read_fields,
    read_init,
    read_integer,
    read_message,
    read_number,
    read_retry,
    read_string,
    replace_lone_surrogates,
    sanitize,
    sanitize_name,
    to_text,
)
from sandbox.interfaces.agent import AgentEvent, AgentOutcome, ApiRetry, ParsedToolCallEnd, TurnStarted
from sandbox.interfaces.runtime import SANDBOX_WORKSPACE, ExitStatus
from sandbox.model.events import AgentMessage, AgentResult, ConversationEvent, FileEdit, ToolCallStarted, ToolResult
from sandbox.model.failure import Failure, FailureCode, FailureReason
from sandbox.model.fixed_limits import CONVERSATION_TEXT_CHARACTERS_MAX, OUTPUT_LINE_BYTES_MAX
from sandbox.model.manifest.schema import Manifest

_QUOTE_CHARACTERS_MAX = 500
_NOISE_PREFIXES = ("[claude-code:", "Warning:")
_SANDBOX_LOST_MESSAGE = "The sandbox was lost before the agent's result was recorded; submit the task again."
_SEE_LOGS = "the task's logs may contain the reason."
_NO_RESULT_MESSAGE = f"without a final result; {_SEE_LOGS}"
_AFTER_RESULT_MESSAGE = f"after it reported success; {_SEE_LOGS}"


def determine_failure(exit_status: ExitStatus, result: dict[str, Any] | None, stderr_tail: bytes) -> Failure | None:
    """Return the failure; None for exit code 0 together with a last result that has `is_error: false`."""
    if exit_status.code == 0 and result is not None and result.get("is_error") is False:
        return None
    # An error that the agent reports takes precedence over an OOM kill, which may have happened long before the error.
    if exit_status.was_oom_killed and (result is None or result.get("is_error") is False):
        return Failure(FailureCode.OUT_OF_MEMORY, "The sandbox ran out of memory; raise vm.memory.")
    if exit_status.code is None:
        return Failure(FailureCode.SANDBOX_LOST, _SANDBOX_LOST_MESSAGE)
    if result is not None and result.get("is_error") is not False:
        reason, message = _explain_error_result(result)
        return Failure(FailureCode.AGENT_FAILED, message, reason=reason)
    if exit_status.code == 0:
        return Failure(FailureCode.AGENT_NO_RESULT, f"Claude Code exited with code 0 {_NO_RESULT_MESSAGE}")
    message = _exit_message(exit_status.code, result, stderr_tail)
    return Failure(FailureCode.AGENT_FAILED, message, reason=FailureReason.AGENT_EXIT)


def determine_interactive_failure(exit_status: ExitStatus) -> Failure | None:
    """Return the failure; None for exit code 0."""
    if exit_status.code == 0:
        return None
    if exit_status.was_oom_killed:
        return Failure(FailureCode.OUT_OF_MEMORY, "The sandbox ran out of memory; raise vm.memory.")
    if exit_status.code is None:
        return Failure(FailureCode.SANDBOX_LOST, _SANDBOX_LOST_MESSAGE)
    message = f"{_describe_exit(exit_status.code)} before its session ended."
    return Failure(FailureCode.AGENT_FAILED, message, reason=FailureReason.AGENT_EXIT)


def _explain_error_result(result: dict[str, Any]) -> tuple[FailureReason, str]:
    """Return the machine-readable reason, and the message, for a result with `is_error`."""
    text = _error_text(result)
    match result.get("terminal_reason"), result.get("stop_reason"):
        case "max_turns", _:
            message = "Claude Code did not finish within the maximum number of turns; raise claude.max_turns."
            return FailureReason.MAX_TURNS, message
        case "aborted_tools" | "aborted_streaming", _:
            message = "Claude Code was interrupted before it had finished; submit the task again."
            return FailureReason.AGENT_INTERRUPTED, message
        case _, "refusal":
            return FailureReason.MODEL_REFUSAL, f"The model refused: {text.rstrip('.')}; change claude.prompt."
        case "api_error", _:
            return _explain_api_error(result.get("api_error_status"), text)
        case _:
            return FailureReason.AGENT_ERROR, f"Claude Code ended with an error: {text}"


_GATEWAY_HINT = re.compile(r" If it persists, check your inference gateway \([^)]*\)\.?")
"""Advice that is removed from messages. Claude Code adds it because its base URL is the address of the gateway."""

_UNKNOWN_COST = "so lifecycle.budget_usd cannot bound the cost"
_NO_CREDIT = re.compile("credit balance|billing", re.IGNORECASE)


def _explain_api_error(status: Any, text: str) -> tuple[FailureReason, str]:
    """Return the reason, and the provider's message as reported by Claude Code, followed by what to do."""
    error_text = _GATEWAY_HINT.sub("", text)
    if status == 402 and _UNKNOWN_COST in error_text:  # the gateway's message, which says what to do
        return FailureReason.MODEL_REQUEST_INVALID, f"The model could not be used: {error_text.rstrip('.')}."
    match status:
        case 400 | 402 | 403 if status == 402 or _NO_CREDIT.search(error_text):
            reason, todo = FailureReason.MODEL_BUDGET, "add credit to the account of the server's key"
        case 429:
            reason = FailureReason.MODEL_RATE_LIMITED
            todo = "wait or raise the account's rate limit, then submit the task again"
        case 401 | 403:
            reason = FailureReason.MODEL_REJECTED
            todo = "check the server's ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN"
        case 404:
            reason, todo = FailureReason.MODEL_REQUEST_INVALID, "check claude.model"
        case 400 | 413:
            reason, todo = FailureReason.MODEL_REQUEST_INVALID, "check claude.model and claude.prompt"
        case _:
            reason, todo = FailureReason.MODEL_UNAVAILABLE, "submit the task again later"
    return reason, f"The model could not be used: {error_text.rstrip('.')}; {todo}."


def _error_text(result: dict[str, Any]) -> str:
    errors = result.get("errors")
    texts = [result.get("result"), *(errors[:1] if isinstance(errors, list) else ())]
    return next((_quote(text) for text in texts if isinstance(text, str) and text.strip()), "no reason given")


def _exit_message(code: int, result: dict[str, Any] | None, stderr_tail: bytes) -> str:
    stderr_line = _last_stderr_line(stderr_tail)
    if stderr_line:
        return f"{_describe_exit(code)}; last line on stderr: {stderr_line}"
    return f"{_describe_exit(code)} {_NO_RESULT_MESSAGE if result is None else _AFTER_RESULT_MESSAGE}"


def _describe_exit(code: int) -> str:
    if code <= 128:
        return f"Claude Code exited with code {code}"
    number = code - 128
    name = signal.Signals(number).name if number in signal.valid_signals() and number < 32 else "unknown"
    return f"Claude Code was killed by signal {number} ({name})"


def _last_stderr_line(stderr_tail: bytes) -> str:
    lines = [line.strip() for line in stderr_tail.decode(errors="replace").splitlines()]
    relevant_lines = [line for line in lines if line and not line.startswith(_NOISE_PREFIXES)]
    return _quote(relevant_lines[-1]) if relevant_lines else ""


def _quote(text: str) -> str:
    """Return the text on one line, truncated."""
    return sanitize(" ".join(text[: 4 * _QUOTE_CHARACTERS_MAX].split()), _QUOTE_CHARACTERS_MAX)


OPEN_CALLS_MAX = 10_000
"""Maximum number of unanswered tool calls that are tracked. Beyond that, the oldest call is dropped."""

CLAUDE_TASKS_MAX = 1000
"""Maximum number of Claude Code's background tasks that are tracked. Beyond that, the oldest one is dropped."""

INIT_TOOLS_MAX = 10_000
"""Maximum number of checked tools of the agent. Each is compared with every pattern of `allowed_tools`."""

INIT_SERVERS_MAX = 1000
"""Maximum number of checked MCP servers of the agent."""

SUMMARY_CHARACTERS_MAX = 500
"""Maximum length of the summary of a tool call."""

CONVERTED_VALUES_MAX = 50_000
"""Maximum number of values in a converted recorded line. Clients wait while the server converts lines."""

CONVERTED_EVENTS_MAX = 100
"""Maximum number of events converted from one recorded line. Claude Code prints a line for each block of a message."""

LINE_TEXT_CHARACTERS_MAX = 10 * CONVERSATION_TEXT_CHARACTERS_MAX
"""Maximum number of characters in all events of a line. They stay in memory until the events are recorded."""

_CLAUDE_TASK_SUBTYPES = frozenset(("task_started", "task_updated", "task_notification", "background_tasks_changed"))
_INPUT_FIELDS_MAX = 100
_UNUSUAL_NAMES_MAX = 1000
_RESULT_BLOCKS_MAX = 1000
_SYNTHETIC_MODEL = "<synthetic>"
_SUMMARY_FIELDS = (
    *("command", "file_path", "notebook_path", "pattern", "path", "url", "query", "description", "prompt", "skill"),
)
"""Input fields that summarize a tool call, best first. If all are absent, the first text field is the summary."""

_EXIT_CODE = re.compile(r"Exit code (\d{1,3})\b")
"""Prefix of a failed Bash call's result."""


class _BackgroundCalls:
    """Tracks tool calls in the background: calls that started there, and calls moved there because they took too long.

    Claude Code reports such a call as a task, before it returns a preliminary result to the model.
    """

    def __init__(self) -> None:
        self._calls: dict[str, str] = {}
        """Call ids, keyed by task id."""
        self._background_tasks: dict[str, str] = {}
        """The ids of the tasks in the background, keyed by call id."""

    def __contains__(self, tool_use_id: str) -> bool:
        return tool_use_id in self._background_tasks

    def handle(self, subtype: str, event: ClaudeTaskEvent) -> Iterator[tuple[str, bool]]:
        """Yield each call that has ended in the background, and whether it failed."""
        task_id = _cut_id(event.task_id)
        match subtype:
            case "task_started" if event.tool_use_id:
                self._add(task_id, sanitize_name(event.tool_use_id), in_background=event.is_backgrounded is True)
            case "task_updated" if task_id in self._calls and event.patch and event.patch.is_backgrounded:
                self._background_tasks[self._calls[task_id]] = task_id
            case "task_notification":
                if (tool_use_id := self._remove(task_id)) is not None:
                    yield tool_use_id, event.status != "completed"
            case "background_tasks_changed":
                listed = {_cut_id(task.task_id) for task in event.tasks}
                for task_id in set(self._background_tasks.values()) - listed:
                    if (tool_use_id := self._remove(task_id)) is not None:
                        yield tool_use_id, False

    def _add(self, task_id: str, tool_use_id: str, *, in_background: bool) -> None:
        if self._calls.get(task_id) != tool_use_id:
            self._remove(task_id)
        if len(self._calls) >= CLAUDE_TASKS_MAX:
            self._remove(next(iter(self._calls)))
        self._calls[task_id] = tool_use_id
        if in_background:
            self._background_tasks[tool_use_id] = task_id

    def _remove(self, task_id: str) -> str | None:
        """Remove a task; return the id of its call if the call ran in the background."""
        tool_use_id = self._calls.pop(task_id, None)
        if tool_use_id is None or self._background_tasks.get(tool_use_id) != task_id:
            return None
        del self._background_tasks[tool_use_id]
        return tool_use_id


def _cut_id(task_id: str) -> str:
    """Truncate a task's id, because the parser keeps the id in memory and an id may be as long as a line."""
    return task_id[:SHORT_TEXT_CHARACTERS_MAX]


class ClaudeOutputParser:
    """Parses stream-json. Never raises and uses bounded memory, for any input.

    A run can have several rounds, each with an init and a result: the end of a background command starts a new round.
    Only the last result counts, and only if the main conversation did not continue after it.
    """

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id
        self._open_calls: dict[str, str] = {}
        self._background_calls = _BackgroundCalls()
        self._calls_with_result: set[str] = set()
        self._last_message_id = ""
        self._is_initialized = False
        self._result_line: bytes | None = None

    def parse_line(self, line: bytes) -> Sequence[AgentEvent] | None:
        """Return the events in one line of stdout; None if the line is not an event from this session."""
        line = replace_lone_surrogates(line)
        event = read_event(line)
        if event is None and not line.endswith(b"\n"):
            self._result_line = None  # stdout ended in the middle of a line, so output followed the last result
        if event is None or event.session_id != self._session_id:
            return None
        return tuple(self._handle_event(event, line))

    def outcome(self, exit_status: ExitStatus, stderr_tail: bytes) -> AgentOutcome:
        """Return the outcome. Success requires exit code 0 and a last result with `is_error: false`."""
        result = read_all_result_fields(self._result_line) if self._result_line is not None else None
        return AgentOutcome(result, determine_failure(exit_status, result, stderr_tail))

    def _handle_event(self, event: StreamEvent, line: bytes) -> Iterator[AgentEvent]:
        match event.type:
            case "assistant" | "user" if event.parent_tool_use_id is None:
                self._result_line = None
                yield from self._start_turn(event)
            case "result":
                self._result_line = line
            case "system" if event.subtype == "init":
                self._result_line = None
                yield from self._initialize(line)
            case "system" if event.subtype == "api_retry":
                yield ApiRetry(_retry_message(read_retry(line)))
            case "system" if event.subtype in _CLAUDE_TASK_SUBTYPES:
                for tool_use_id, is_error in self._background_calls.handle(event.subtype, read_claude_task(line)):
                    if tool_use_id in self._calls_with_result:
                        yield self._finish_call(tool_use_id, is_error=is_error)
        for shown in _convert_event(event, line):
            yield from self._match_call(shown)

    def _initialize(self, line: bytes) -> Iterator[AgentEvent]:
        if self._is_initialized:
            return
        self._is_initialized = True
        init = read_init(line)
        servers = {sanitize(server.name): sanitize(server.status) for server in init.mcp_servers[:INIT_SERVERS_MAX]}
        yield ClaudeReady(frozenset(map(_LineBudget().sanitize_any_name, init.tools[:INIT_TOOLS_MAX])), servers)

    def _start_turn(self, event: StreamEvent) -> Iterator[AgentEvent]:
        if event.type != "assistant":
            return
        message = read_message(event)
        if message.id != self._last_message_id and message.model != _SYNTHETIC_MODEL:
            self._last_message_id = message.id[:1024]
            yield TurnStarted()

    def _match_call(self, event: ConversationEvent) -> Iterator[AgentEvent]:
        """Yield the event unless it is a call that is already open or a result without an open call."""
        if isinstance(event, ToolCallStarted):
            if event.tool_use_id in self._open_calls:
                return
            if len(self._open_calls) >= OPEN_CALLS_MAX:
                self._close_call(next(iter(self._open_calls)))
            self._open_calls[event.tool_use_id] = event.tool
            yield event
        elif isinstance(event, ToolResult):
            yield from self._match_result(event)
        else:
            yield event

    def _match_result(self, event: ToolResult) -> Iterator[AgentEvent]:
        """Yield the result of an open call, and its end unless the call continues in the background."""
        use_id = event.tool_use_id
        if use_id not in self._open_calls or use_id in self._calls_with_result:
            return
        if use_id in self._background_calls and not event.is_error:
            self._calls_with_result.add(use_id)
            yield msgspec.structs.replace(event, in_background=True)
            return
        yield event
        yield self._finish_call(use_id, is_error=event.is_error)

    def _finish_call(self, tool_use_id: str, *, is_error: bool) -> ParsedToolCallEnd:
        return ParsedToolCallEnd(tool_use_id, self._close_call(tool_use_id), is_error=is_error)

    def _close_call(self, tool_use_id: str) -> str:
        self._calls_with_result.discard(tool_use_id)
        return self._open_calls.pop(tool_use_id)


def convert_recorded_line(manifest: Manifest, line: bytes) -> Sequence[ConversationEvent] | None:
    """Convert a line that an earlier version recorded; see `interfaces.agent.ConvertLine`.

    A line of OUTPUT_LINE_BYTES_MAX or more may be truncated. Such a line yields no events, and neither does a line with
    too many values.
    """
    if manifest.agent.is_interactive or not line.startswith(b"{"):
        return None
    event = read_event(line)
    if event is None or not event.type:
        return None
    is_large = len(line) >= OUTPUT_LINE_BYTES_MAX or sum(map(line.count, (b",", b"[", b"{"))) > CONVERTED_VALUES_MAX
    return () if is_large else tuple(islice(_convert_event(event, line), CONVERTED_EVENTS_MAX))


def _retry_message(retry: ApiRetryEvent) -> str:
    status = f" with status {sanitize(str(retry.error_status), 8)}" if retry.error_status is not None else ""
    reason = f" ({sanitize(retry.error, 64)})" if retry.error else ""
    attempt = f"{sanitize(str(retry.attempt), 8)} of {sanitize(str(retry.max_retries), 8)}"
    return f"A model request failed{status}{reason}; the agent tries again (retry {attempt})."


class _LineBudget:
    """The number of characters, and of names that are not printable ASCII, that the rest of a line may contain."""

    def __init__(self) -> None:
        self.characters_left = LINE_TEXT_CHARACTERS_MAX
        self._unusual_names_left = _UNUSUAL_NAMES_MAX

    def sanitize_any_name(self, name: str) -> str:
        """Return a name of any characters for display. Beyond _UNUSUAL_NAMES_MAX, it becomes ASCII, which is fast."""
        if name.isascii() and name.isprintable():
            return name[:SHORT_TEXT_CHARACTERS_MAX]
        self._unusual_names_left -= 1
        return sanitize(name) if self._unusual_names_left >= 0 else sanitize_name(name)


class _TextBudget:
    """Truncates texts so that their total length stays within a limit, and counts the omitted characters.

    line: the budget of all events in the line.
    """

    def __init__(self, line: _LineBudget) -> None:
        self._line = line
        self._left = CONVERSATION_TEXT_CHARACTERS_MAX
        self.omitted_characters = 0

    def cut(self, text: str) -> str:
        kept = text[: min(self._left, self._line.characters_left)]
        self._left -= len(kept)
        self._line.characters_left -= len(kept)
        self.omitted_characters += len(text) - len(kept)
        return kept


def _convert_event(event: StreamEvent, line: bytes) -> Iterator[ConversationEvent]:
    """Yield the conversation events in one stream event, regardless of earlier events."""
    budget = _LineBudget()
    match event.type:
        case "assistant":
            parent_id = _parent_id(event)
            for block in read_blocks(read_message(event)):
                yield from _convert_agent_block(block, parent_id, budget)
        case "user":
            yield from _convert_user_message(event, budget)
        case "result":
            yield _convert_result(line, budget)
        case "system" if event.subtype == "init":
            yield AgentMessage(_start_notice(read_init(line)), "notice")


def _parent_id(event: StreamEvent) -> str | None:
    return sanitize_name(event.parent_tool_use_id) if event.parent_tool_use_id is not None else None


def _convert_agent_block(
    block: ContentBlock, parent_id: str | None, line_budget: _LineBudget
) -> Iterator[ConversationEvent]:
    budget = _TextBudget(line_budget)
    if block.type == "text" and (text := read_string(block.text) or "").strip():
        yield AgentMessage(budget.cut(text), "text", parent_id, budget.omitted_characters)
    elif block.type == "thinking" and (text := read_string(block.thinking) or "").strip():
        yield AgentMessage(budget.cut(text), "thinking", parent_id, budget.omitted_characters)
    elif block.type == "tool_use" and block.id:
        yield _convert_tool_use(block, parent_id, budget, line_budget.sanitize_any_name)


def _convert_user_message(event: StreamEvent, line_budget: _LineBudget) -> Iterator[ConversationEvent]:
    """Yield tool results and the prompts of subagents. The main prompt is not in the stream."""
    message, parent_id = read_message(event), _parent_id(event)
    if isinstance(message.content, str):
        if parent_id is not None:
            yield from _convert_prompt(message.content, parent_id, line_budget)
        return
    for block in read_blocks(message):
        if block.type == "tool_result":
            budget = _TextBudget(line_budget)
            text, is_error = content_text(block.content, _RESULT_BLOCKS_MAX), block.is_error is True
            code = _EXIT_CODE.match(text) if is_error else None
            yield ToolResult(
                sanitize_name(block.tool_use_id),
                budget.cut(text),
                is_error,
                int(code[1]) if code else None,
                budget.omitted_characters,
            )
        elif block.type == "text" and parent_id is not None:
            yield from _convert_prompt(read_string(block.text) or "", parent_id, line_budget)


def _convert_prompt(text: str, parent_id: str, line_budget: _LineBudget) -> Iterator[AgentMessage]:
    if text.strip():
        budget = _TextBudget(line_budget)
        yield AgentMessage(budget.cut(text), "prompt", parent_id, budget.omitted_characters)


def _convert_tool_use(
    block: ContentBlock, parent_id: str | None, budget: _TextBudget, sanitize_any_name: Callable[[str], str]
) -> ToolCallStarted:
    fields = read_fields(block.input)
    texts = {name: text for name, value in islice(fields.items(), _INPUT_FIELDS_MAX) if (text := to_text(value))}
    summary = _summarize(fields)
    command = budget.cut(texts.pop("command")) if block.name == "Bash" and "command" in texts else None
    edits = tuple(_pop_edits(block.name, texts, budget))
    others = {sanitize_any_name(name): budget.cut(text) for name, text in texts.items()}
    return ToolCallStarted(
        tool=sanitize_name(block.name),
        tool_use_id=sanitize_name(block.id),
        summary=summary,
        command=command,
        edits=edits,
        input=others,
        parent_tool_use_id=parent_id,
        omitted_characters=budget.omitted_characters,
        omitted_fields=max(0, len(fields) - _INPUT_FIELDS_MAX) + len(texts) - len(others),
    )


def _pop_edits(tool: str, texts: dict[str, str], budget: _TextBudget) -> Iterator[FileEdit]:
    """Remove from `texts` the fields that describe a file edit, and yield the edit."""
    match tool, texts:
        case "Edit", {"file_path": path, "old_string": old}:
            yield FileEdit(_relative(budget.cut(path)), budget.cut(old), budget.cut(texts.get("new_string", "")))
        case "Write", {"file_path": path, "content": content}:
            yield FileEdit(_relative(budget.cut(path)), None, budget.cut(content))
        case _:
            return
    for name in ("file_path", "old_string", "new_string") if tool == "Edit" else ("file_path", "content"):
        texts.pop(name, None)


def _summarize(fields: Mapping[str, msgspec.Raw]) -> str:
    names = (*_SUMMARY_FIELDS, *islice(fields, _INPUT_FIELDS_MAX))
    texts = (read_string(fields[name]) for name in names if name in fields)
    text = next((text for text in texts if text and text.strip()), "")
    return sanitize(_relative(text), SUMMARY_CHARACTERS_MAX)


def _relative(path: str) -> str:
    return path.removeprefix(f"{SANDBOX_WORKSPACE}/")


_MAX_TURNS_SUBTYPE = "error_max_turns"


def _convert_result(line: bytes, line_budget: _LineBudget) -> AgentResult:
    result, budget = read_displayed_result_fields(line), _TextBudget(line_budget)
    subtype, cost = sanitize(to_text(result.subtype)), read_number(result.total_cost_usd)
    is_error = bytes(result.is_error) != b"false" or subtype != "success"
    turns = read_integer(result.num_turns)
    if turns and subtype == _MAX_TURNS_SUBTYPE:
        turns -= 1  # Claude Code counts the turn that the limit prevented
    return AgentResult(
        text=budget.cut(read_string(result.result) or ""),
        is_error=is_error,
        reason=subtype if is_error else "",
        turns=turns,
        duration_ms=read_integer(result.duration_ms),
        cost_usd=None if cost is None else round(cost, 9),
        omitted_characters=budget.omitted_characters,
    )


def _start_notice(init: InitEvent) -> str:
    version, model = sanitize(to_text(init.claude_code_version)), sanitize(to_text(init.model))
    return " ".join(part for part in ("Claude Code", version, f"started with {model or 'its model'}") if part)
