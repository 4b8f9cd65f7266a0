"""Escapes and invisible sequences: what one means, and where one has only begun. None holds a line feed."""

import re
from collections.abc import Callable

_BACKSLASHES_MAX = 64
"""Backslashes before an escape that belong to it: every level of nesting doubles them."""

_ENTITIES = {"amp": b"&", "lt": b"<", "gt": b">", "quot": b'"', "apos": b"'"}

# Every alternative begins with a literal, by which the others are passed over; what has no group means nothing.
_TOKEN = re.compile(
    rb"""
      \\\\{0,63}+ (?:
          u (?P<pair> [dD][89abAB][0-9a-fA-F]{2} \\{1,64}+ u[dD][c-fC-F][0-9a-fA-F]{2} )
        | (?: u001[bB] | x1[bB] | 033 | e ) \[ [0-?]{0,64}+ [\ -/]{0,8}+ [@-~]
        | u (?P<character> [0-9a-fA-F]{4} ) | u\{ (?P<braced> [0-9a-fA-F]{1,6} ) \} | U (?P<long> [0-9a-fA-F]{8} )
        | x (?P<byte> [0-9a-fA-F]{2} )
        | (?P<octal> [0-3][0-7]{2} | [0-7]{1,2} )
        | [rbf] )
    | % (?P<percent> [0-9a-fA-F]{2} )
    | & (?: (?P<entity> amp|lt|gt|quot|apos ) | \# (?P<decimal> [0-9]{1,7} ) | \#[xX] (?P<hex> [0-9a-fA-F]{1,6} ) ) ;
    | ' (?P<quote> \\{1,64}+'' | "'"' )
    | \x1b (?:
          \[ [0-?]{0,64}+ [\ -/]{0,8}+ [@-~]                             # colours, movements of the cursor
        | [\]PX^_] [^\x07\x1b\n]{0,1024}+ (?: \x07 | \x1b\\ )            # titles, links
        | [\ -/]{0,4}+ [0-OQ-WYZ`-~] )
    | [\x00-\x06\x08\x0b-\x1a\x1c-\x1f\x7f] [\x00-\x06\x08\x0b-\x1a\x1c-\x1f\x7f]{0,63}+
    | \xc2 (?: \x9b [0-?]{0,64}+ [\ -/]{0,8}+ [@-~] | \xad )
    | \xe2 (?: \x80[\x8b-\x8f\xaa-\xae] | \x81[\xa0-\xaf] )              # characters without a width
    | \xef (?: \xbb\xbf | \xb8[\x80-\x8f] )
    | \xcd\x8f
    | \xe1\xa0\x8e
    """,
    re.VERBOSE,
)
_BEGINNING = re.compile(
    rb"""
      \\\\{0,63}+ (?: u[0-9a-fA-F]{0,3} | u\{[0-9a-fA-F]{0,6} | U[0-9a-fA-F]{0,7} | x[0-9a-fA-F]? | [0-7]{1,2} )? \Z
    | \\\\{0,63}+ u[dD][89abAB][0-9a-fA-F]{2} (?: \\{1,64}+ (?: u (?: [dD] (?: [c-fC-F] [0-9a-fA-F]? )? )? )? )? \Z
    | \\\\{0,63}+ (?: u001[bB] | x1[bB] | 033 | e ) (?: \[ [0-?]{0,64}+ [\ -/]{0,8}+ )? \Z
    | \x1b (?: \[ [0-?]{0,64}+ [\ -/]{0,8}+ | [\]PX^_] [^\x07\x1b\n]{0,1024}+ \x1b? | [\ -/]{0,4}+ )? \Z
    | % [0-9a-fA-F]? \Z
    | & (?: [a-z]{0,4} | \#[0-9]{0,7} | \#[xX][0-9a-fA-F]{0,6} ) \Z
    | ' (?: \\{1,64}+ '? | "'? | "'" )? \Z
    | \xc2 (?: \x9b [0-?]{0,64}+ [\ -/]{0,8}+ )? \Z
    | \xe2[\x80\x81]? \Z
    | \xef[\xbb\xb8]? \Z
    | \xcd \Z
    | \xe1\xa0? \Z
    """,
    re.VERBOSE,
)

_TOKEN_BYTES_MAX = 1200
"""No token is longer."""

find_tokens = _TOKEN.finditer


def find_beginning(data: bytes, end: int) -> int:
    """Where a token begins that ends at `end` or goes on there; `end` if there is none."""
    found = _BEGINNING.search(data, max(0, end - _TOKEN_BYTES_MAX, data.rfind(b"\n", 0, end) + 1), end)
    return found.start() if found else end


def step_back(data: bytes, position: int) -> int:
    """The place before the backslashes around `position`, as many of them as can belong to an escape."""
    end = position
    while data[end : end + 1] == b"\\" and end < position + _BACKSLASHES_MAX:
        end += 1
    least = max(0, end - _BACKSLASHES_MAX)
    while position > least and data[position - 1] == 0x5C:
        position -= 1
    return position


def decode(token: "re.Match[bytes]") -> bytes:
    """What the token stands for: nothing, a character in UTF-8, or a byte."""
    group = token.lastgroup
    return _MEANINGS[group](token[group].decode()) if group else b""


def _pair(both: str) -> bytes:
    high, low = int(both[:4], 16), int(both[-4:], 16)
    return _character(0x10000 + ((high & 0x3FF) << 10) + (low & 0x3FF))


def _character(code: int) -> bytes:
    return chr(code).encode("utf-8", "surrogatepass") if code <= 0x10FFFF else b""


_MEANINGS: dict[str, Callable[[str], bytes]] = {
    "pair": _pair,
    "character": lambda digits: _character(int(digits, 16)),
    "braced": lambda digits: _character(int(digits, 16)),
    "long": lambda digits: _character(int(digits, 16)),
    "byte": bytes.fromhex,
    "octal": lambda digits: bytes([int(digits, 8)]),
    "percent": bytes.fromhex,
    "entity": _ENTITIES.__getitem__,
    "decimal": lambda digits: _character(int(digits)),
    "hex": lambda digits: _character(int(digits, 16)),
    "quote": lambda _: b"'",
}
