"""Opaque page cursors for sorted lists, validated when a client sends them back."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Literal

import msgspec

from sandbox.api.errors import InvalidParameterError
from sandbox.interfaces.store import Cursor, TaskQuery

Sort = Literal["created_at", "started_at", "state_changed_at", "name"]
Order = Literal["asc", "desc"]

CURSOR_LENGTH_MAX = 2048

_CURSOR_PATTERN = re.compile(rf"[A-Za-z0-9_-]{{1,{CURSOR_LENGTH_MAX}}}", re.ASCII)
_VERSION = 1
_ADVICE = "must be the next_cursor of an earlier response; omit it to start at the beginning"


class PageCursor(msgspec.Struct, frozen=True, array_like=True):
    """A cursor with the sort order of its list; it is invalid for other lists."""

    version: int
    sort: Sort
    order: Order
    value: str | None
    task_id: str

    @property
    def cursor(self) -> Cursor:
        """The position in the list."""
        return Cursor(self.value, self.task_id)


def encode_cursor(cursor: Cursor | None, query: TaskQuery) -> str | None:
    """Encode a cursor for this query; None stays None."""
    if cursor is None:
        return None
    page_cursor = PageCursor(_VERSION, query.sort, query.order, cursor.value, cursor.task_id)
    return base64.urlsafe_b64encode(msgspec.json.encode(page_cursor)).rstrip(b"=").decode()


def decode_cursor(text: str) -> PageCursor:
    """Decode a cursor made by `encode_cursor`. Raises InvalidParameterError."""
    if not _CURSOR_PATTERN.fullmatch(text):
        raise InvalidParameterError("cursor", _ADVICE)
    try:
        page_cursor = msgspec.json.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=PageCursor)
    except (binascii.Error, ValueError, RecursionError):
        raise InvalidParameterError("cursor", _ADVICE) from None
    if page_cursor.version != _VERSION or (page_cursor.value is None and page_cursor.sort != "started_at"):
        raise InvalidParameterError("cursor", _ADVICE)
    return page_cursor
