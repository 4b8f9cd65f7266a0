"""Human-readable text: numbers, durations and sizes, and untrusted text without invisible or control characters."""

import math
import re
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime

from sandbox.model.task_state import TaskState

_BLANK_GLYPHS = (
    (0x2800, 0x2800),  # BRAILLE PATTERN BLANK
    (0x13441, 0x13442),  # EGYPTIAN HIEROGLYPH FULL BLANK, HALF BLANK
    (0x16FE4, 0x16FE4),  # KHITAN SMALL SCRIPT FILLER
    (0x1D159, 0x1D159),  # MUSICAL SYMBOL NULL NOTEHEAD
)

_NONCHARACTERS = (
    (0xFDD0, 0xFDEF),
    *((plane * 0x10000 + 0xFFFE, plane * 0x10000 + 0xFFFF) for plane in range(17)),
)

INVISIBLE_RANGES = (
    *((0x0000, 0x001F), (0x007F, 0x009F), (0x00AD, 0x00AD), (0x034F, 0x034F), (0x0600, 0x0605), (0x061C, 0x061C)),
    *((0x06DD, 0x06DD), (0x070F, 0x070F), (0x0890, 0x0891), (0x08E2, 0x08E2), (0x115F, 0x1160), (0x17B4, 0x17B5)),
    *((0x180B, 0x180F), (0x200B, 0x200F), (0x2028, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xD800, 0xDFFF)),
    *((0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB), (0x110BD, 0x110BD)),
    *((0x110CD, 0x110CD), (0x13430, 0x1343F), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
    *_BLANK_GLYPHS,
    *_NONCHARACTERS,
)
"""First and last code point of each range."""

INVISIBLE = re.compile("[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in INVISIBLE_RANGES) + "]")
"""Matches one invisible character."""


_VARIATION_SELECTORS = "\ufe0e\ufe0f"
"""Characters that select the text or the emoji presentation of a symbol."""

_SYMBOL_CATEGORIES = frozenset({"So", "Sm", "Po", "Pd"})
_LETTERLIKE_SYMBOLS = "\N{INFORMATION SOURCE}"
_KEYCAP, _KEYCAP_BASES = "\u20e3", frozenset("0123456789#*")

_NON_BASE_CHARACTERS = frozenset({"", " ", "/"})


def replace_unprintable(text: str, replace: Callable[[str], str]) -> str:
    """Return `text` with `replace(c)` in place of every character `c` that is not printable.

    Invisible characters, spaces other than U+0020, and private-use and unassigned characters are not printable. A
    combining mark is not printable at the start of the text, or after a space, a slash or a replaced character.
    """
    if is_printable(text):
        return text
    pieces: list[str] = []
    before = ""
    for character in text:
        is_visible = (
            character.isprintable()
            and not INVISIBLE.match(character)
            and not _is_lone_combining_mark(character, before)
        )
        pieces.append(character if is_visible else replace(character))
        before = character if is_visible else ""
    return "".join(pieces)


def is_printable(text: str) -> bool:
    """Return whether `replace_unprintable` leaves the text unchanged."""
    if not text.isprintable():
        return False
    return text.isascii() or not (
        INVISIBLE.search(text)
        or any(map(_is_lone_combining_mark, text, ("", *text)))  # each character and its predecessor
    )


def _is_lone_combining_mark(character: str, before: str) -> bool:
    """Return whether this is a combining mark without a base character."""
    return before in _NON_BASE_CHARACTERS and unicodedata.category(character) in {"Mn", "Mc", "Me"}


def replace_invisible(text: str, replace: Callable[[str], str], allowed: str = "") -> str:
    """Return prose with `replace(c)` in place of every invisible character `c` that is not in `allowed`.

    Unlike `replace_unprintable`, it keeps spaces, private-use and unassigned characters, combining marks, and the
    variation selector of an emoji if it follows a symbol or precedes the combining keycap of `0` to `9`, `#` or `*`.
    """

    def escape_match(found: re.Match[str]) -> str:
        character = found[0]
        is_kept = character in allowed or (character in _VARIATION_SELECTORS and _selects_symbol(text, found.start()))
        return character if is_kept else replace(character)

    return text if text.isascii() and text.isprintable() else INVISIBLE.sub(escape_match, text)


def _selects_symbol(text: str, at: int) -> bool:
    """Return whether the variation selector at this index belongs to a visible symbol."""
    before = text[at - 1 : at]
    if text[at + 1 : at + 2] == _KEYCAP:
        return before in _KEYCAP_BASES
    is_symbol = not before.isascii() and unicodedata.category(before) in _SYMBOL_CATEGORIES
    return (is_symbol and not INVISIBLE.match(before)) or (before != "" and before in _LETTERLIKE_SYMBOLS)


def escape_character(character: str) -> str:
    r"""Return the character as an escape sequence, such as `\x1b` for ESC."""
    return character.encode("unicode_escape").decode("ascii")


def replacement_character(_: str) -> str:
    """Return the replacement character U+FFFD."""
    return "\ufffd"


_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP = 1024


def format_size(size_bytes: int) -> str:
    """Format a size: `512 B`, `1.5 KiB`, `120 MiB`."""
    value, unit = float(size_bytes), 0
    while value >= _STEP and unit < len(_SIZE_UNITS) - 1:
        value, unit = value / _STEP, unit + 1
    return f"{value:,.0f} {_SIZE_UNITS[unit]}" if unit == 0 or value >= 100 else f"{value:.1f} {_SIZE_UNITS[unit]}"


def format_gib(byte_count: int) -> str:
    """Return a size with three digits, such as `1.5 GiB`."""
    gibibytes = byte_count / 1024**3
    return f"{gibibytes:,.0f} GiB" if gibibytes >= 1000 else f"{gibibytes:.3g} GiB"


def format_duration(seconds: float) -> str:
    """Format a duration: `12 ms`, `0.3 s`, `42 s`, `2 min 5 s`, `3 h 12 min`, `4 d 6 h`."""
    seconds = max(seconds, 0.0)
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {rest} s"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"


def format_cost(usd: float) -> str:
    """Format a cost: `$1.25`, `$0.0150` and `<$0.0001`; four decimals below one dollar."""
    if 0 < usd < 0.0001:
        return "<$0.0001"
    return f"${usd:.4f}" if 0 < usd < 0.99995 else f"${usd:,.2f}"


def format_budget(usd: float) -> str:
    """Format a budget with two decimals, or with more decimals if it needs them: `$0.50`, `$2.50`, `$0.005`."""
    return f"${usd:,.2f}" if math.isclose(usd, round(usd, 2)) else f"${usd:.6g}"


def format_count(number: int) -> str:
    """Format a count: `4,711`."""
    return f"{number:,}"


def format_state(state: str, *, is_preserved: bool = True) -> str:
    """Format a state: `failed_preserved` as `failed, preserved`. is_preserved: the sandbox still exists."""
    if state == TaskState.FAILED_PRESERVED:
        return "failed, preserved" if is_preserved else "failed, released"
    return str(state)


def format_timestamp(at: datetime) -> str:
    """Format a time in UTC as RFC 3339, with milliseconds and `Z`."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
