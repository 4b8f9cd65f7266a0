"""What a model request asks the model's own servers to do: think, and nothing that reaches elsewhere.

Tools that run there, MCP servers that are called from there and addresses that are read from there would carry data out
of a sandbox that has no network of its own. What is judged is written anew, so that the model reads the same as we.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import msgspec

from sandbox.gateway.limits import MODEL_STRING_CHARACTERS_MAX, REQUEST_JSON_VALUES_MAX
from sandbox.gateway.model.request_policy import Rejected
from sandbox.model.errors import DECODE_ERRORS

_CLIENT_TOOLS = re.compile(r"custom|(advisor|bash|computer|memory|text_editor|tool_search_tool(_[a-z0-9]+)?)_[0-9]{8}")
"""Tools that Claude Code runs itself, and those of the model's servers that look at nothing but the request."""

_PRICED_TOOLS = re.compile(rf"{_CLIENT_TOOLS.pattern}|web_(fetch|search)_[0-9]{{8}}|mcp_toolset")
"""These, and those of the model's servers that cost tokens only, or a fee that answers tell and the table has."""

_SERVER_TOOLS = re.compile(r"mcp_toolset|.*_[0-9]{8}.*", re.DOTALL)
"""What is such a tool by its type, wherever it stands."""

_TOOL_CONTEXTS = frozenset({"tools", "definition"})
_TOOL_PART = "(part of a tool)"
_TOOL_PARTS = frozenset({"approximate", "ephemeral"})
"""Types of what a tool's definition says beside its schema: where its user is, how long it is cached."""

_TOOL_CHANGES = frozenset({"tool_reference", "tool_definition"})
_INLINE_SOURCES = frozenset({"base64", "content", "text"})
_SOURCE_BLOCKS = ("document", "image")
_TOOL_CALLS = ("tool_use", "server_tool_use", "mcp_tool_use")
_SELF_CONTAINED_SERVER_TOOLS = re.compile(r"advisor|tool_search_tool(_[a-z0-9]+)?")
"""Tools that the model's servers call and that look at nothing but the request."""

_FIELD = re.compile(r"[a-z0-9_]+")
_EXTERNAL_REFERENCES = re.compile(r"mcp_servers|container(_id)?|(.*_)?(url|uri|file_ids?)", re.DOTALL)
"""Fields that name what is not in the request: an address, a file or a machine of the model's servers."""

_REQUEST_CONTEXTS = frozenset({"", "fallbacks"})
_REQUEST_DATA = frozenset({"context_management", "metadata", "output_config", "output_format", "safeguards"})
_CALL_DATA = frozenset({"caller", "input"})
_TOOL_DATA = frozenset({"input_examples", "input_schema", "output_schema"})
"""What is under these names, in a request, a tool's call and a tool's definition, is read by the model's servers as no
tool and no address, whatever it looks like."""

_STRUCTURAL_BYTES = (b",", b":", b"[", b"{")


def decode_body(body: bytes | bytearray) -> dict[str, Any] | Rejected:
    """The body as plain data. What takes more memory than its length lets expect is refused unread."""
    if sum(map(body.count, _STRUCTURAL_BYTES)) > REQUEST_JSON_VALUES_MAX:
        return Rejected(413, "request_too_large", f"The request's body has over {REQUEST_JSON_VALUES_MAX} values.")
    try:
        document = msgspec.json.decode(body)
    except DECODE_ERRORS:
        document = None
    if not isinstance(document, dict) or not _is_short_string(document.get("model", "")):
        return Rejected(400, "invalid_request_error", "The request's body must be a JSON object that names a model.")
    return document


def external_access_reason(document: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
    """What in the request reaches elsewhere, as a sentence begins; None when nothing does.

    shown: makes a text from inside fit to be told.
    """
    for place, value in _iter_objects(document):
        reason = _tool_deny_reason(place, value, _CLIENT_TOOLS, sanitize) or _access_deny_reason(place, value, sanitize)
        if reason is not None:
            return reason
    return None


def unknown_fee_reason(document: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
    """What in the request may cost a fee beside its tokens that nobody knows, told as in `reach_objection`."""
    objections = (_tool_deny_reason(place, value, _PRICED_TOOLS, sanitize) for place, value in _iter_objects(document))
    return next((reason for reason in objections if reason is not None), None)


def additional_models(document: dict[str, Any]) -> Iterator[str]:
    """Those that a request may be answered by beside the one that it names; "" for what is no name."""
    for place, value in _iter_objects(document):
        kind = _get_field(value, "type")
        if place == "fallbacks" or (isinstance(kind, str) and kind.startswith("advisor_")):
            model = _get_field(value, "model")
            yield model if _is_short_string(model) else ""


def _tool_deny_reason(context: str, value: Any, allowed: re.Pattern[str], sanitize: Callable[[str], str]) -> str | None:
    """What is wrong with a value as a tool, or as what may hold one."""
    if not isinstance(value, dict):
        return "A tool of unknown shape"
    # Some servers take `Tools` for `tools`; the API itself knows small letters only.
    if any(_FIELD.fullmatch(key) is None for key in value):
        return "A name that no field has"
    kind = value.get("type") or "custom"
    if context == "tool":
        return None if _is_short_string(kind) and kind in _TOOL_CHANGES else "A change of tools of unknown type"
    if context == _TOOL_PART and _is_short_string(kind) and kind in _TOOL_PARTS:
        return None
    if not _is_tool(context, value):
        return None
    if not _is_short_string(kind):
        return "A tool of unknown type"
    return None if allowed.fullmatch(kind) else f"The tool {sanitize(kind)}"


def _access_deny_reason(context: str, record: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
    kind = record.get("type")
    if kind == "container_upload":
        return "A file of the model's servers"
    if kind in ("mcp_tool_use", "server_tool_use") and not _is_self_contained_call(record):
        return "A call of a tool of the model's servers"
    if kind in _SOURCE_BLOCKS and not isinstance(record.get("source"), dict):
        return "A source of unknown shape"
    if context == "source" and not (_is_short_string(kind) and kind in _INLINE_SOURCES):
        return f"A source of type {sanitize(kind)}" if _is_short_string(kind) else "A source of unknown type"
    reaching = (key for key, value in record.items() if value and _EXTERNAL_REFERENCES.fullmatch(key))
    return next((f"'{sanitize(key)}'" for key in reaching), None)


def _is_self_contained_call(call: dict[str, Any]) -> bool:
    name = call.get("name")
    return (
        call["type"] == "server_tool_use"
        and _is_short_string(name)
        and _SELF_CONTAINED_SERVER_TOOLS.fullmatch(name) is not None
    )


def _iter_objects(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every object that may say what the model's servers shall do, and what stands for a tool and is none; each with
    the name under which it stands, alone or in a list."""
    pending: list[tuple[str, Any]] = [("", document)]
    while pending:
        place, value = pending.pop()
        if isinstance(value, list):
            pending += [(place, item) for item in value]
        elif isinstance(value, dict):
            yield place, value
            data = _opaque_fields(place, value)
            pending += [(_child_context(place, key), item) for key, item in value.items() if key not in data]
        elif value is not None and (place == "tool" or place in _TOOL_CONTEXTS):
            yield place, value


def _opaque_fields(context: str, record: dict[str, Any]) -> frozenset[str]:
    if context in _REQUEST_CONTEXTS:
        return _REQUEST_DATA
    if context in _TOOL_CONTEXTS:
        return _TOOL_DATA | {"configs"} if record.get("type") == "mcp_toolset" else _TOOL_DATA
    return _CALL_DATA if record.get("type") in _TOOL_CALLS else frozenset()


def _child_context(parent: str, key: str) -> str:
    """Where the values of this key stand: within a tool that is always said, or what they are called otherwise."""
    is_in_tool = parent in _TOOL_CONTEXTS or parent == _TOOL_PART
    return _TOOL_PART if is_in_tool and key not in _TOOL_CONTEXTS | {"tool", "source", "fallbacks"} else key


def _is_tool(context: str, record: dict[str, Any]) -> bool:
    kind = record.get("type")
    is_typed_part = context == _TOOL_PART and bool(kind)
    is_of_servers = isinstance(kind, str) and _SERVER_TOOLS.fullmatch(kind) is not None
    return context in _TOOL_CONTEXTS or is_typed_part or is_of_servers


def _is_short_string(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= MODEL_STRING_CHARACTERS_MAX


def _get_field(record: Any, name: str) -> Any:
    return record.get(name) if isinstance(record, dict) else None
