"""Searches a model request for external access, tools with unknown fees, images and additional models.

The model's servers must not access anything outside the request. Otherwise, an agent without egress could send data out
of its sandbox: through server-side tools, MCP servers, or URLs that the model's servers access. An inspected request is
encoded again, so the model parses the same document as the gateway.
"""

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeGuard

MODEL_STRING_CHARACTERS_MAX = 256
"""Maximum length of a model name, type or field name; a longer one is rejected, and its text is not reported."""

REQUEST_OBJECTS_MAX = 50_000
"""Maximum number of objects to check in a request; a request with more gets 413, as each check takes microseconds."""

_TOOLS_WITHOUT_EXTERNAL_ACCESS = re.compile(
    r"custom|(advisor|bash|computer|memory|text_editor|tool_search_tool(_[a-z0-9]+)?)_[0-9]{8}"
)
"""Tools that Claude Code runs itself, and server-side tools that only use data from the request."""

_PRICED_TOOLS = re.compile(rf"{_TOOLS_WITHOUT_EXTERNAL_ACCESS.pattern}|web_(fetch|search)_[0-9]{{8}}|mcp_toolset")
"""`_TOOLS_WITHOUT_EXTERNAL_ACCESS`, and server-side tools that cost only tokens or a known, reported fee."""

_ADVISOR = re.compile(r"advisor_[0-9]{8}")
_MCP_TOOLSET = "mcp_toolset"
_DATE = re.compile(r"_[0-9]{8}")
"""A type that contains this date marks its object as a server-side tool, wherever the object occurs."""

_TOOL_CONTEXTS = frozenset({"tools", "definition"})
_INSIDE_TOOL_CONTEXT = "(part of a tool)"
_TOOL_PART_TYPES = frozenset({"approximate", "ephemeral"})
"""Types of objects in a tool definition outside its schema: the user's location, the cache lifetime."""

_TOOL_CHANGE_TYPES = frozenset({"tool_reference", "tool_definition"})
_TEXT_SOURCES = ("content", "text")
_INLINE_SOURCES = frozenset({"base64", *_TEXT_SOURCES})
_SOURCE_BLOCKS = ("document", "image")
_TOOL_CALLS = ("tool_use", "server_tool_use", "mcp_tool_use")
_SELF_CONTAINED_SERVER_TOOLS = re.compile(r"advisor|tool_search_tool(_[a-z0-9]+)?")
"""Server-side tools that only use data from the request."""

_FIELD = re.compile(rf"[a-z0-9_]{{1,{MODEL_STRING_CHARACTERS_MAX}}}")
_EXTERNAL_REFERENCES = frozenset({"mcp_servers", "container", "container_id", "url", "uri", "file_id", "file_ids"})
_EXTERNAL_REFERENCE_SUFFIXES = ("_url", "_uri", "_file_id", "_file_ids")
"""Fields that refer to something outside the request: a URL, or a file or container on the model's servers."""

_DIAGNOSTICS = "diagnostics"
"""Its `previous_message_id` does not add the earlier conversation to the request."""

_REQUEST_CONTEXTS = frozenset({"", "fallbacks"})
_REQUEST_DATA = frozenset({"context_management", "metadata", "output_config", "output_format", "safeguards"})
_CALL_DATA = frozenset({"caller", "input"})
_TOOL_DATA = frozenset({"input_examples", "input_schema", "output_schema"})
"""Fields of a request, a tool call and a tool definition whose content the model's servers treat as data.

Such content is neither a tool nor an address, even if it looks like one.
"""


def find_external_access(document: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
    """Return a noun phrase for a part of the request that has external access; None if there is no such part.

    sanitize: makes untrusted text safe to report.
    """
    for context, value in _iter_objects(document):
        reason = _find_external_access(context, value, sanitize)
        if reason is not None:
            return reason
    return None


def has_too_many_objects(document: dict[str, Any]) -> bool:
    """Return whether checking all objects of the request would take too long."""
    return next(islice(_iter_objects(document), REQUEST_OBJECTS_MAX, None), None) is not None


def count_images(document: dict[str, Any]) -> int | None:
    """Return the number of images in a request.

    None if the length of some content does not limit its number of tokens: a PDF, which may be compressed, or content
    outside the request.
    """
    images = 0
    for context, value in _iter_objects(document):
        if _find_external_access(context, value, str) is not None or _is_file(value):
            return None
        images += value.get("type") == "image"
    return images


def _is_file(block: dict[str, Any]) -> bool:
    """Return whether a block is a document whose source is a file, not text or content blocks."""
    return block.get("type") == "document" and block["source"].get("type") not in _TEXT_SOURCES


def unknown_fee_reason(document: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
    """Return a noun phrase for a part of the request that may incur an unknown extra fee; None if no part does.

    The result and `sanitize` are as in `find_external_access`.
    """
    deny_reasons = (
        _tool_deny_reason(context, value, _PRICED_TOOLS, sanitize) for context, value in _iter_objects(document)
    )
    return next((reason for reason in deny_reasons if reason is not None), None)


class AdditionalModel(NamedTuple):
    """A model that may serve the request in addition to its `model`; the values are untrusted.

    name: "" if it is invalid. max_tokens: limits each of its responses, of which an advisor gives at most `max_uses`.
    """

    name: str
    is_advisor: bool
    max_tokens: Any
    max_uses: Any


def additional_models(document: dict[str, Any]) -> Iterator[AdditionalModel]:
    """Yield the additional models that may serve the request."""
    for context, value in _iter_objects(document):
        kind = _get_field(value, "type")
        is_advisor = is_short_string(kind) and _ADVISOR.fullmatch(kind) is not None
        if context == "fallbacks" or is_advisor:
            name, max_tokens, max_uses = (_get_field(value, field) for field in ("model", "max_tokens", "max_uses"))
            yield AdditionalModel(name if is_short_string(name) else "", is_advisor, max_tokens, max_uses)


def has_compaction(document: dict[str, Any]) -> bool:
    """Return whether the model may compact the conversation, which it reads and summarizes for this purpose."""
    management = document.get("context_management")
    edits = _get_field(management, "edits")
    kinds = [_get_field(each, "type") for each in edits] if isinstance(edits, list) else []
    return any(isinstance(kind, str) and kind.startswith("compact") for kind in kinds)


def _tool_deny_reason(context: str, value: Any, allowed: re.Pattern[str], sanitize: Callable[[str], str]) -> str | None:
    """Return why a value is denied as a tool or as an object that may contain one; None if it is allowed."""
    if not isinstance(value, dict):
        return "A tool of unknown shape"
    # Some servers accept `Tools` as well as `tools`; the API itself accepts only `tools`.
    if any(_FIELD.fullmatch(key) is None for key in value):
        return "An unknown field name"
    kind = value.get("type") or "custom"
    if context == "tool":
        return None if is_short_string(kind) and kind in _TOOL_CHANGE_TYPES else "A tool change of unknown type"
    if context == _INSIDE_TOOL_CONTEXT and is_short_string(kind) and kind in _TOOL_PART_TYPES:
        return None
    if not _is_tool(context, value):
        return None
    if not is_short_string(kind):
        return "A tool of unknown type"
    return None if allowed.fullmatch(kind) else f"The tool {sanitize(kind)}"


def _find_external_access(context: str, value: Any, sanitize: Callable[[str], str]) -> str | None:
    allowed = _TOOLS_WITHOUT_EXTERNAL_ACCESS
    return _tool_deny_reason(context, value, allowed, sanitize) or _access_deny_reason(context, value, sanitize)


def _access_deny_reason(context: str, json_object: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
    kind = json_object.get("type")
    if kind == "container_upload":
        return "A file on the model's servers"
    if kind in ("mcp_tool_use", "server_tool_use") and not _is_self_contained_call(json_object):
        return "A call to a server tool"
    if kind in _SOURCE_BLOCKS and not isinstance(json_object.get("source"), dict):
        return "A source of unknown shape"
    if context == "source" and not (is_short_string(kind) and kind in _INLINE_SOURCES):
        return f"A source of type {sanitize(kind)}" if is_short_string(kind) else "A source of unknown type"
    reference_keys = (
        key
        for key, value in json_object.items()
        if value and (_is_external_reference(key) or _is_stored_conversation(context, key, value))
    )
    return next((f"'{sanitize(key)}'" for key in reference_keys), None)


def _is_external_reference(field: str) -> bool:
    return field in _EXTERNAL_REFERENCES or field.endswith(_EXTERNAL_REFERENCE_SUFFIXES)


def _is_stored_conversation(context: str, field: str, value: Any) -> bool:
    """Return whether a field refers to a conversation or a partial response that the model's servers have stored."""
    if field == "thread":
        return not (isinstance(value, dict) and value.get("type") == "create")
    if field == "resumption":
        return not isinstance(value, dict) or bool(value.get("token"))
    return field == "previous_message_id" and context != _DIAGNOSTICS


def _is_self_contained_call(call: dict[str, Any]) -> bool:
    name = call.get("name")
    return (
        call["type"] == "server_tool_use"
        and is_short_string(name)
        and _SELF_CONTAINED_SERVER_TOOLS.fullmatch(name) is not None
    )


def _iter_objects(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every object that may instruct the model's servers, and every non-object where a tool is expected.

    Each is paired with the name of its field. Items of a list are paired with the name of the list's field.
    """
    pending: list[tuple[str, Any]] = [("", document)]
    while pending:
        context, value = pending.pop()
        if isinstance(value, list):
            pending += [(context, item) for item in value]
        elif isinstance(value, dict):
            yield context, value
            data = _opaque_fields(context, value)
            pending += [(_child_context(context, key), item) for key, item in value.items() if key not in data]
        elif value is not None and (context == "tool" or context in _TOOL_CONTEXTS):
            yield context, value


def _opaque_fields(context: str, json_object: dict[str, Any]) -> frozenset[str]:
    if context in _REQUEST_CONTEXTS:
        return _REQUEST_DATA
    if context in _TOOL_CONTEXTS:
        return _TOOL_DATA | {"configs"} if json_object.get("type") == _MCP_TOOLSET else _TOOL_DATA
    return _CALL_DATA if json_object.get("type") in _TOOL_CALLS else frozenset()


def _child_context(parent: str, key: str) -> str:
    """Return the context of this key's values: `_INSIDE_TOOL_CONTEXT` anywhere inside a tool, otherwise the key."""
    is_in_tool = parent in _TOOL_CONTEXTS or parent == _INSIDE_TOOL_CONTEXT
    return _INSIDE_TOOL_CONTEXT if is_in_tool and key not in _TOOL_CONTEXTS | {"tool", "source", "fallbacks"} else key


def _is_tool(context: str, json_object: dict[str, Any]) -> bool:
    kind = json_object.get("type")
    is_typed_part = context == _INSIDE_TOOL_CONTEXT and bool(kind)
    is_server_tool = isinstance(kind, str) and (
        kind == _MCP_TOOLSET or len(kind) > MODEL_STRING_CHARACTERS_MAX or _DATE.search(kind) is not None
    )
    return context in _TOOL_CONTEXTS or is_typed_part or is_server_tool


def is_short_string(value: Any) -> TypeGuard[str]:
    """Return whether the value is a string of at most `MODEL_STRING_CHARACTERS_MAX` characters."""
    return isinstance(value, str) and len(value) <= MODEL_STRING_CHARACTERS_MAX


def _get_field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
