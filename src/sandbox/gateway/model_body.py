"""What a model request asks the model's own servers to do: think, and nothing that reaches elsewhere.

Tools that run there, MCP servers that are called from there and addresses that are read from there would carry data out
of a sandbox that has no network of its own. What is judged is written anew, so that the model reads the same as we.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import msgspec

from sandbox.gateway.limits import MODEL_WORD_CHARACTERS_MAX, REQUEST_VALUES_MAX
from sandbox.gateway.policy import Refused
from sandbox.model.decoding import DECODE_ERRORS

_RUN_INSIDE = re.compile(r"custom|(advisor|bash|computer|memory|text_editor|tool_search_tool(_[a-z0-9]+)?)_[0-9]{8}")
"""Tools that Claude Code runs itself, and those of the model's servers that look at nothing but the request."""

_AT_KNOWN_FEE = re.compile(rf"{_RUN_INSIDE.pattern}|web_(fetch|search)_[0-9]{{8}}|mcp_toolset")
"""These, and those of the model's servers that cost tokens only, or a fee that answers tell and the table has."""

_TOOLS_OF_SERVERS = re.compile(r"mcp_toolset|.*_[0-9]{8}", re.DOTALL)
"""What is such a tool by its type, wherever it stands."""

_TOOL_PLACES = frozenset({"tools", "definition"})
_TOOL_CHANGES = frozenset({"tool_reference", "tool_definition"})
_SOURCES_IN_PLACE = frozenset({"base64", "content", "text"})
_DATA = frozenset({"caller", "context_management", "input", "metadata", "output_config", "output_format", "safeguards"})
"""What is under these names is read by the model's servers as no tool and no address, whatever it looks like."""

_STRUCTURE = (b",", b":", b"[", b"{")


def read_document(body: bytes | bytearray) -> dict[str, Any] | Refused:
    """The body as plain data. What takes more memory than its length lets expect is refused unread."""
    if sum(map(body.count, _STRUCTURE)) > REQUEST_VALUES_MAX:
        return Refused(413, "request_too_large", f"The request's body has over {REQUEST_VALUES_MAX} values.")
    try:
        document = msgspec.json.decode(body)
    except DECODE_ERRORS:
        document = None
    if not isinstance(document, dict) or not _is_word(document.get("model", "")):
        return Refused(400, "invalid_request_error", "The request's body must be a JSON object that names a model.")
    return document


def reach_objection(document: dict[str, Any], shown: Callable[[str], str]) -> str | None:
    """What in the request reaches elsewhere, as a sentence begins; None when nothing does.

    shown: makes a text from inside fit to be told.
    """
    for place, value in _values(document):
        objection = _tool_objection(place, value, _RUN_INSIDE, shown) or _reach_objection(place, value, shown)
        if objection is not None:
            return objection
    return None


def fee_objection(document: dict[str, Any], shown: Callable[[str], str]) -> str | None:
    """What in the request may cost a fee beside its tokens that nobody knows, told as in `reach_objection`."""
    objections = (_tool_objection(place, value, _AT_KNOWN_FEE, shown) for place, value in _values(document))
    return next((objection for objection in objections if objection is not None), None)


def models_beside(document: dict[str, Any]) -> Iterator[str]:
    """Those that a request may be answered by beside the one that it names; "" for what is no name."""
    for place, value in _values(document):
        kind = _field(value, "type")
        if place == "fallbacks" or (isinstance(kind, str) and kind.startswith("advisor_")):
            model = _field(value, "model")
            yield model if _is_word(model) else ""


def _tool_objection(place: str, value: Any, allowed: re.Pattern[str], shown: Callable[[str], str]) -> str | None:
    """What is wrong with a value as a tool, or as what may hold one."""
    if not isinstance(value, dict):
        return "A tool of unknown shape"
    # Some servers take `Tools` for `tools`; the API itself knows small letters only.
    if any(key != key.casefold() for key in value):
        return "A name in capital letters"
    kind = value.get("type") or "custom"
    if place == "tool":
        return None if _is_word(kind) and kind in _TOOL_CHANGES else "A change of tools of unknown type"
    if not _is_tool(place, value):
        return None
    if not _is_word(kind):
        return "A tool of unknown type"
    return None if allowed.fullmatch(kind) else f"The tool {shown(kind)}"


def _reach_objection(place: str, record: dict[str, Any], shown: Callable[[str], str]) -> str | None:
    for key in ("mcp_servers", "container"):
        if record.get(key):
            return f"'{key}'"
    kind = record.get("type")
    if kind == "container_upload":
        return "A file of the model's servers"
    if place != "source":
        return None
    if not _is_word(kind):
        return "A source of unknown type"
    return None if kind in _SOURCES_IN_PLACE else f"A source of type {shown(kind)}"


def _values(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every object that may say what the model's servers shall do, and what stands for a tool and is none; each with
    the name under which it stands, alone or in a list."""
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(place, item) for item in value]
        elif isinstance(value, dict):
            yield place, value
            if place not in _TOOL_PLACES:
                waiting += [item for item in value.items() if item[0] not in _DATA]
        elif value is not None and (place == "tool" or place in _TOOL_PLACES):
            yield place, value


def _is_tool(place: str, record: dict[str, Any]) -> bool:
    kind = record.get("type")
    return place in _TOOL_PLACES or (isinstance(kind, str) and _TOOLS_OF_SERVERS.fullmatch(kind) is not None)


def _is_word(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= MODEL_WORD_CHARACTERS_MAX


def _field(record: Any, name: str) -> Any:
    return record.get(name) if isinstance(record, dict) else None
