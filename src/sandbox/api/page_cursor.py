"""Page cursors of task lists: encodes, checks and decodes them."""

from __future__ import annotations

import base64
import binascii
import re

import msgspec

from sandbox.interfaces.store import Cursor, Sort, SortDirection, TaskQuery
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.manifest.field_formats import Format

CURSOR_LENGTH_MAX = 2048

CURSOR_PATTERN = rf"^[A-Za-z0-9_-]{{1,{CURSOR_LENGTH_MAX}}}$"
_CURSOR_VERSION = 1


class PageCursor(msgspec.Struct, frozen=True, array_like=True):
    """A cursor with the sort order of its list; it is invalid for other lists."""

    version: int
    sort: Sort
    order: SortDirection
    value: str | None
    task_id: str

    @property
    def cursor(self) -> Cursor:
        """The position in the list."""
        return Cursor(self.value, self.task_id)


def encode_cursor(cursor: Cursor | None, query: TaskQuery) -> str | None:
    """Encode a cursor for this query; return None if there is no cursor."""
    if cursor is None:
        return None
    page_cursor = PageCursor(_CURSOR_VERSION, query.sort, query.order, cursor.value, cursor.task_id)
    return base64.urlsafe_b64encode(msgspec.json.encode(page_cursor)).rstrip(b"=").decode()


def _check_cursor(text: str) -> str | None:
    try:
        is_valid = re.fullmatch(CURSOR_PATTERN.strip("^$"), text) is not None and _is_consistent(decode_cursor(text))
    except (binascii.Error, ValueError, *DECODE_ERRORS):
        is_valid = False
    return None if is_valid else "must be the next_cursor of an earlier response; omit it to start at the beginning"


def _is_consistent(cursor: PageCursor) -> bool:
    return cursor.version == _CURSOR_VERSION and (cursor.value is not None or cursor.sort == "started_at")


CURSOR = Format("cursor", _check_cursor, {"maxLength": CURSOR_LENGTH_MAX, "pattern": CURSOR_PATTERN})
"""A cursor that `encode_cursor` returned."""


def decode_cursor(text: str) -> PageCursor:
    """Decode text that has the format `CURSOR`."""
    return msgspec.json.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=PageCursor)
