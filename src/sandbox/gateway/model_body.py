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

_RUN_INSIDE = re.compile(r"custom|(advisor|bash|computer|memory|text_editor|tool_search_tool(_[a-z0-9]+)?)_[0-9]{8}")
"""Tools that Claude Code runs itself, and those of the model's servers that look at nothing but the request."""

_AT_KNOWN_FEE = re.compile(rf"{_RUN_INSIDE.pattern}|web_(fetch|search)_[0-9]{{8}}|mcp_toolset")
"""These, and those of the model's servers that cost tokens only, or a fee that answers tell and the table has."""

_SOURCES_IN_PLACE = frozenset({"base64", "content", "text"})
_STRUCTURE = (b",", b":", b"[", b"{")


def read_document(body: bytes | bytearray) -> dict[str, Any] | Refused:
    """The body as plain data. What takes more memory than its length lets expect is refused unread."""
    if sum(map(body.count, _STRUCTURE)) > REQUEST_VALUES_MAX:
        return Refused(413, "request_too_large", f"The request's body has over {REQUEST_VALUES_MAX} values.")
    try:
        document = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        document = None
    if not isinstance(document, dict) or not _is_word(document.get("model", "")):
        return Refused(400, "invalid_request_error", "The request's body must be a JSON object that names a model.")
    return document


def reach_objection(document: dict[str, Any], shown: Callable[[str], str]) -> str | None:
    """What in the request reaches elsewhere, as a sentence begins; None when nothing does.

    shown: makes a text from inside fit to be told.
    """
    for key, value in document.items():
        if key in ("mcp_servers", "container") and value:
            return f"'{key}'"
    objections = (
        _misspelling(document),
        *(_misspelling(message) for message in _items(document.get("messages")) if isinstance(message, dict)),
        *(_tool_objection(tool, _RUN_INSIDE, shown) for tool in _items(document.get("tools"))),
        *(_block_objection(block, shown) for block in _blocks(document)),
    )
    return next((objection for objection in objections if objection is not None), None)


def fee_objection(document: dict[str, Any], shown: Callable[[str], str]) -> str | None:
    """What in the request may cost a fee beside its tokens that nobody knows, told as in `reach_objection`."""
    objections = (
        _misspelling(document),
        *(_tool_objection(tool, _AT_KNOWN_FEE, shown) for tool in _items(document.get("tools"))),
    )
    return next((objection for objection in objections if objection is not None), None)


def _misspelling(record: dict[str, Any]) -> str | None:
    """Some servers take `Tools` for `tools`; the API itself knows small letters only."""
    return "A name in capital letters" if any(key != key.casefold() for key in record) else None


def _tool_objection(tool: Any, allowed: re.Pattern[str], shown: Callable[[str], str]) -> str | None:
    if not isinstance(tool, dict):
        return "A tool of unknown shape"
    kind = tool.get("type") or "custom"
    if not _is_word(kind):
        return "A tool of unknown type"
    return _misspelling(tool) if allowed.fullmatch(kind) else f"The tool {shown(kind)}"


def _block_objection(block: dict[str, Any], shown: Callable[[str], str]) -> str | None:
    if block.get("type") == "container_upload":
        return "A file of the model's servers"
    source = block.get("source")
    if not isinstance(source, dict):
        return _misspelling(block)
    kind = source.get("type")
    if not _is_word(kind):
        return "A source of unknown type"
    if kind not in _SOURCES_IN_PLACE:
        return f"A source of type {shown(kind)}"
    return _misspelling(block) or _misspelling(source)


def _blocks(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every block of content, those within tool results and documents too; never what a tool is called with."""
    waiting = [document.get("system"), *(_field(message, "content") for message in _items(document.get("messages")))]
    while waiting:
        for block in _items(waiting.pop()):
            if isinstance(block, dict):
                yield block
                waiting += [block.get("content"), _field(block.get("source"), "content")]


def _is_word(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= MODEL_WORD_CHARACTERS_MAX


def _items(value: Any) -> list[Any]:
    """A single block may stand without a list around it."""
    return value if isinstance(value, list) else [value] if isinstance(value, dict) else []


def _field(record: Any, name: str) -> Any:
    return record.get(name) if isinstance(record, dict) else None
