"""Extracts token usage from the chunks of a model response. Buffers at most one line of a stream."""

from contextlib import suppress
from typing import Annotated, Any

import msgspec
from msgspec.structs import astuple

from sandbox.agents.claude_code.messages_api.pricing import (
    SINGLE_REGION_FACTOR,
    WEB_SEARCH_USD,
    TokenCounts,
    cost_usd,
    has_price,
    most_expensive,
)
from sandbox.interfaces.gateway import CostBound, UsageMeter
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.events import Usage

SSE_LINE_BYTES_MAX = 1024 * 1024
"""Maximum length of an event stream line that is searched for usage; longer lines pass through unread."""

JSON_BODY_BYTES_MAX = 4 * 1024 * 1024
"""Maximum size of a non-streaming response that is searched for usage; larger ones pass through unread."""

USAGE_BYTES_MAX = 16 * 1024
"""Maximum size of a `usage` object; a larger one is not read, because its iterations would take time and memory."""

_MODEL_CHARACTERS_MAX = 128
_DELTA_OVERHEAD_BYTES = 80
"""Minimum size of a delta event's line, not counting its text."""

_ITERATIONS_IN_TOTALS = ("message", "fallback_message")
"""Types of iterations whose tokens are at least partly included in the response's total counts.

The totals exclude input that the model reads again after an advisor's message, and output that another model began.
Iterations of all other types (compaction, an advisor) are not included, and are billed in addition.
"""

_GLOBAL_REGIONS = ("", "global", "not_available")


def create_meter(content_type: bytes) -> UsageMeter:
    """Create a meter for a body of this content type."""
    is_stream = content_type.split(b";")[0].strip().lower() == b"text/event-stream"
    return StreamMeter() if is_stream else JsonMeter()


_COUNT_MAX = 10**9
_Count = Annotated[int, msgspec.Meta(ge=0, le=_COUNT_MAX)]


class _CacheCreation(msgspec.Struct):
    ephemeral_1h_input_tokens: _Count | None = None


class _Counts(msgspec.Struct):
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    cache_read_input_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None
    cache_creation: _CacheCreation | None = None


class _Iteration(_Counts):
    type: str = ""
    model: str | None = None


class _Usage(_Counts):
    iterations: list[_Iteration] | None = None
    server_tool_use: Any = None
    inference_geo: Any = None


class _Message(msgspec.Struct):
    model: str = ""
    usage: msgspec.Raw = msgspec.Raw(b"null")


class _Event(msgspec.Struct):
    type: str = ""
    message: _Message | None = None
    usage: msgspec.Raw = msgspec.Raw(b"null")


_event_decoder = msgspec.json.Decoder(_Event)
_message_decoder = msgspec.json.Decoder(_Message)
_usage_decoder = msgspec.json.Decoder(_Usage | None)


def _decode_usage(text: msgspec.Raw) -> _Usage | None:
    """Decode a `usage` object. Raises one of DECODE_ERRORS if it is invalid or too large."""
    if memoryview(text).nbytes > USAGE_BYTES_MAX:
        raise msgspec.ValidationError("The usage is too large.")
    usage: _Usage | None = _usage_decoder.decode(text)
    return usage


def _decode_event(data: bytes) -> tuple[_Event, _Usage | None]:
    """Decode an event and its usage, which is part of the message in `message_start`. Raises one of DECODE_ERRORS."""
    event = _event_decoder.decode(data)
    holder = event.message if event.type == "message_start" and event.message is not None else event
    return event, _decode_usage(holder.usage)


class StreamMeter:
    """Meter for an event stream.

    `message_start` names the model; each `message_delta` replaces the counts that it contains.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        self._is_skipping = False
        self._tally = _Tally()
        self._received_bytes = 0
        self._has_content = False
        self._is_readable = True
        self.is_complete = False

    def feed(self, data: bytes) -> None:
        """Process the next bytes of the body, which may be split anywhere."""
        first, *others = data.split(b"\n")
        self._append(first)
        for other in others:
            self._finish_line()
            self._append(other)

    def usage(self) -> Usage | None:
        """Return the counts from the latest `message_delta`, merged over those from `message_start`."""
        return self._tally.usage()

    def partial_usage(self) -> Usage | None:
        """Return the same as `usage`, because a stream reports usage incrementally."""
        return self.usage()

    @property
    def has_started(self) -> bool:
        """Whether the stream contains anything except pings and errors, even in a format other than the API's."""
        return self._has_content or not _is_readable(bytes(self._line))

    def upper_bound(self, cost_bound: CostBound, *, is_fully_received: bool) -> Usage | None:
        """Return an upper bound on the usage. A token has at least one byte, so there are no more tokens than bytes.

        This holds only for text in the API's format: compressed text, for example, may have more tokens than bytes.
        """
        is_limited = is_fully_received and self._is_readable and (self._has_content or _is_readable(bytes(self._line)))
        output_max = cost_bound.output_tokens_max
        if is_limited:
            received_bytes = self._received_bytes + len(self._line)
            output_max = min(received_bytes + cost_bound.hidden_output_tokens, output_max)
        return self._tally.upper_bound(cost_bound, output_max)

    def _append(self, part: bytes) -> None:
        if self._is_skipping or len(self._line) + len(part) > SSE_LINE_BYTES_MAX:
            self._is_skipping = self._has_content = True
            self._received_bytes += len(self._line) + len(part)
            self._line.clear()
        else:
            self._line += part

    def _finish_line(self) -> None:
        line, self._is_skipping = bytes(self._line), False
        self._line.clear()
        if not self._has_content:
            self._find_content(line.removesuffix(b"\r"))
        if line.startswith(b"data:"):
            self._received_bytes += max(0, len(line) - _DELTA_OVERHEAD_BYTES)
        # Most lines are pieces of text. Decode only lines that can contain usage.
        if line.startswith(b"data:") and (b'"message_start"' in line or b'"message_delta"' in line):
            self._decode(line[len(b"data:") :])

    def _find_content(self, line: bytes) -> None:
        if not _is_readable(line):
            self._has_content, self._is_readable = True, False
        elif line.startswith(b"data:"):
            event_type = _read_event_type(line)
            self._has_content = event_type not in _EVENTS_OUTSIDE_A_RESPONSE
            self._is_readable = event_type is not None

    def _decode(self, data: bytes) -> None:
        with suppress(*DECODE_ERRORS):
            event, usage = _decode_event(data)
            if event.type == "message_start" and event.message is not None:
                self._tally.set_model(event.message.model)
                self._tally.record(usage)
            elif event.type == "message_delta":
                self._tally.record(usage)
                self.is_complete |= usage is not None and usage.output_tokens is not None


_SSE_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
_EVENTS_OUTSIDE_A_RESPONSE = ("ping", "error")
"""Events that do not begin a response. A stream may contain them before a response, or instead of one."""


def _is_readable(line: bytes) -> bool:
    """Return whether a line, or the start of one, may belong to an event stream with LF or CR LF line endings."""
    is_field = any(line.startswith(field) or field.startswith(line) for field in _SSE_FIELDS)
    return is_field and b"\r" not in line[:-1]


def _read_event_type(line: bytes) -> str | None:
    """Return the type of the event in a `data:` line; None if the line is not a whole JSON object."""
    try:
        return _decode_event(line[len(b"data:") :])[0].type
    except DECODE_ERRORS:
        return None


class JsonMeter:
    """Meter for one JSON document with top-level `model` and `usage`.

    The document is sent only after the model has finished.
    """

    has_started = True

    def __init__(self) -> None:
        self._body = bytearray()
        self._is_too_long = False

    def feed(self, data: bytes) -> None:
        """Process the next bytes of the body, which may be split anywhere."""
        if self._is_too_long or len(self._body) + len(data) > JSON_BODY_BYTES_MAX:
            self._is_too_long = True
            self._body.clear()
        else:
            self._body += data

    def usage(self) -> Usage | None:
        """Return the usage; None until the document is complete."""
        model, usage = self._decode()
        if usage is None:
            return None
        tally = _Tally()
        tally.set_model(model)
        tally.record(usage)
        return tally.usage()

    def partial_usage(self) -> Usage | None:
        """Return None, because the document reports usage only at its end."""
        return None

    @property
    def is_complete(self) -> bool:
        """Whether the document is complete and reports its output tokens."""
        _, usage = self._decode()
        return usage is not None and usage.output_tokens is not None

    def _decode(self) -> tuple[str, _Usage | None]:
        try:
            message = _message_decoder.decode(self._body)
            return message.model, _decode_usage(message.usage)
        except DECODE_ERRORS:
            return "", None

    def upper_bound(self, cost_bound: CostBound, *, is_fully_received: bool) -> Usage | None:
        """Return the request's upper bound, because the received bytes do not show how much output is missing."""
        return _Tally().upper_bound(cost_bound, cost_bound.output_tokens_max)


_ModelUsage = tuple[str, TokenCounts]
"""A model and its token counts."""


class _Tally:
    """The latest value of each count."""

    def __init__(self) -> None:
        self._model: str | None = None
        self._counts: dict[str, int] = {}
        self._iterations: list[_Iteration] = []
        self._web_searches = 0
        self._price_factor = 1.0
        self._usage: Usage | None = None

    def set_model(self, model: str) -> None:
        self._model, self._usage = _short_name(model), None

    def record(self, usage: _Usage | None) -> None:
        if usage is None:
            return
        self._usage = None
        self._counts |= _reported_counts(usage)
        if usage.iterations is not None:
            self._iterations = usage.iterations
        if isinstance(usage.inference_geo, str):
            self._price_factor = 1.0 if usage.inference_geo in _GLOBAL_REGIONS else SINGLE_REGION_FACTOR
        searches = usage.server_tool_use.get("web_search_requests") if isinstance(usage.server_tool_use, dict) else None
        if isinstance(searches, int) and 0 <= searches <= _COUNT_MAX:
            self._web_searches = searches

    def upper_bound(self, cost_bound: CostBound, output: int) -> Usage | None:
        if cost_bound.has_hidden_input:
            self._counts["input"] = max(cost_bound.input_tokens, self._counts.get("input", 0))
        self._counts = {"input": cost_bound.input_tokens} | self._counts
        self._counts["output"] = max(output, self._counts.get("output", 0))
        self._usage = None
        if self._model is None:
            self.set_model(cost_bound.model)
        elif has_price(self._model):
            self.set_model(most_expensive((self._model, cost_bound.model), TokenCounts(**self._counts)))
        return self.usage()

    def usage(self) -> Usage | None:
        if self._usage is None and self._model is not None:
            self._usage = self._compute_usage(self._model)
        return self._usage

    def _compute_usage(self, model: str) -> Usage:
        total = (model, TokenCounts(**self._counts))
        included, additional = self._iteration_usages(is_in_totals=True), self._iteration_usages(is_in_totals=False)
        parts = [*included, (model, _remainder(total[1], included)), *additional]
        unpriced = next((name for name, _ in parts if not has_price(name)), None)
        usd = max(_cost(parts), _cost([total, *additional])) * self._price_factor + self._web_searches * WEB_SEARCH_USD
        return Usage(
            model=unpriced or model,
            input_tokens=sum(tokens.input for _, tokens in parts),
            output_tokens=sum(tokens.output for _, tokens in parts),
            cache_read_tokens=sum(tokens.cache_read for _, tokens in parts),
            cache_write_tokens=sum(tokens.cache_write for _, tokens in parts),
            cost_usd=round(usd, 6) if unpriced is None else None,
        )

    def _iteration_usages(self, *, is_in_totals: bool) -> list[_ModelUsage]:
        return [
            (_short_name(one.model or self._model or ""), TokenCounts(**_reported_counts(one)))
            for one in self._iterations
            if (one.type in _ITERATIONS_IN_TOTALS) is is_in_totals
        ]


def _short_name(model: str) -> str:
    """Return the model's name, or a fixed text if it is too long. A truncated name might contain part of a secret."""
    return model if len(model) <= _MODEL_CHARACTERS_MAX else "(too-long)"


def _remainder(total: TokenCounts, parts: list[_ModelUsage]) -> TokenCounts:
    """Subtract the counts of the parts from the total counts. Negative results become 0."""
    counts = zip(astuple(total), *(astuple(tokens) for _, tokens in parts), strict=True)
    return TokenCounts(*(max(0, first - sum(others)) for first, *others in counts))


def _cost(parts: list[_ModelUsage]) -> float:
    return sum(cost_usd(model, tokens) or 0.0 for model, tokens in parts)


def _reported_counts(counts: _Counts) -> dict[str, int]:
    hour = counts.cache_creation.ephemeral_1h_input_tokens if counts.cache_creation else None
    latest = {
        "input": counts.input_tokens,
        "output": counts.output_tokens,
        "cache_read": counts.cache_read_input_tokens,
        "cache_write": counts.cache_creation_input_tokens,
        "cache_write_1h": hour,
    }
    return {name: count for name, count in latest.items() if count is not None}
