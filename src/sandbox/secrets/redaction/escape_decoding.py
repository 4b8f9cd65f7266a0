"""Finds and decodes escapes and invisible characters, including incomplete ones. No escape contains a line feed."""

import re
from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from heapq import merge
from html.entities import html5

from sandbox.model.display_text import INVISIBLE_RANGES
from sandbox.secrets.limits import ESCAPE_LEADING_ZEROS_MAX

_LAST_ASCII = 0x7F
_LAST_BY_LENGTH = (_LAST_ASCII, 0x7FF, 0xFFFF)
"""The last code point encoded in one, two and three bytes."""
_CONTINUATION_BITS = 6

_ByteRanges = tuple[tuple[int, int], ...]
"""The lowest and the highest value of each byte of a character."""


def _sequences(first: int, last: int) -> Iterator[_ByteRanges]:
    """Split a code point range into parts whose UTF-8 bytes vary independently; yield the byte ranges of each."""
    for split in _split_points(first, last):
        if first <= split < last:
            yield from _sequences(first, split)
            yield from _sequences(split + 1, last)
            return
    least, greatest = (chr(code).encode("utf-8", "surrogatepass") for code in (first, last))
    yield tuple(zip(least, greatest, strict=True))


def _split_points(first: int, last: int) -> Iterator[int]:
    yield from _LAST_BY_LENGTH
    for count in range(1, 4):
        low = (1 << _CONTINUATION_BITS * count) - 1
        if first | low != last | low:
            if first & low:
                yield first | low
            if ~last & low:
                yield (last & ~low) - 1


def _alternatives(sequences: Iterable[_ByteRanges]) -> tuple[bytes, ...]:
    """Return patterns that together match any of the sequences, one per first byte."""
    rests: dict[tuple[int, int], list[_ByteRanges]] = {}
    for first, *rest in sequences:
        rests.setdefault(first, []).append(tuple(rest))
    return tuple(_byte_pattern(*first) + _suffix_pattern(found) for first, found in rests.items())


def _suffix_pattern(sequences: list[_ByteRanges]) -> bytes:
    longer = list(filter(None, sequences))
    if not longer:
        return b""
    return b"(?:%b)%b" % (b"|".join(_alternatives(longer)), b"?" if len(longer) < len(sequences) else b"")


def _byte_pattern(first: int, last: int) -> bytes:
    return rb"\x%02x" % first if first == last else rb"[\x%02x-\x%02x]" % (first, last)


_SEQUENCES = [
    sequence
    for first, last in sorted(INVISIBLE_RANGES)
    if last > _LAST_ASCII
    for sequence in _sequences(max(first, _LAST_ASCII + 1), last)
]

INVISIBLE_PATTERNS = _alternatives(_SEQUENCES)
"""Patterns that match one invisible character."""


_NAMED_REFERENCES = {name.encode(): meaning.encode() for name, meaning in html5.items()}
_BARE_NAME_LENGTHS = sorted({len(name) for name in _NAMED_REFERENCES if not name.endswith(b";")}, reverse=True)

ENTITY_NAME_BYTES_MAX = max(map(len, _NAMED_REFERENCES)) - 1
"""Length of the longest name of an HTML character reference, without its semicolon."""


def decode_html_entity(name: bytes) -> tuple[int, bytes] | None:
    """Return the length and the UTF-8 text of the character reference at the start of `name`; None without a reference.

    The length includes the semicolon, if present. As in HTML, the longest name matches, and some names need no
    semicolon.
    """
    if name.endswith(b";") and (meaning := _NAMED_REFERENCES.get(name)) is not None:
        return len(name), meaning
    for length in _BARE_NAME_LENGTHS:
        if length <= len(name) and (meaning := _NAMED_REFERENCES.get(name[:length])) is not None:
            return length, meaning
    return None


_BACKSLASHES_MAX = 64
"""Maximum number of backslashes that belong to an escape: every level of nesting doubles them."""

_LEADING_ZEROS = rb"0{0,%d}+" % ESCAPE_LEADING_ZEROS_MAX

_CONTROLS = rb"[\x00-\x06\x08\x0b-\x17\x19\x1c-\x1f\x7f]"
"""Control characters except tabs, line feeds, and those that start, end or abort terminal escapes."""

_ESCAPE_CHARACTER = rb"(?: u001[bB] | u\{ 0{0,4}+ 1[bB] \} | U0000001[bB] | x1[bB] | 033 | e )"

_ESCAPE_SYNTAX = rb"""
      \\ (?P<nesting> \\{0,31}+ ) $ESCAPE_CHARACTER \\ (?P=nesting) \\ (?P=nesting) (?!\\) (?P<string_end> )
    | \\\\{0,63}+ (?:
          u (?P<pair> [dD][89abAB][0-9a-fA-F]{2} \\{1,64}+ u[dD][c-fC-F][0-9a-fA-F]{2} )
        | u (?P<character> [0-9a-fA-F]{4} ) | U (?P<long> [0-9a-fA-F]{8} )
        | u\{ (?P<braced> (?=[0-9a-fA-F]) $ZEROS [0-9a-fA-F]{0,6}+ ) \}
        | x (?P<byte> [0-9a-fA-F]{2} )
        | (?P<octal> [0-3][0-7]{2} | [0-7]{1,2} )
        | (?P<letter> [ae] )
        | [rbfv] )
    | % (?P<percent> [0-9a-fA-F]{2} )
    | & (?:
          (?P<name> [A-Za-z][A-Za-z0-9]{1,$NAME_REST}+ ;? )
        | \# (?P<decimal> (?=[0-9]) $ZEROS [0-9]{0,7}+ ) (?![0-9]) ;?
        | \#[xX] (?P<hex> (?=[0-9a-fA-F]) $ZEROS [0-9a-fA-F]{0,6}+ ) (?![0-9a-fA-F]) ;? )
    | ' (?P<quote> \\{1,64}+'' | \\{0,64}+"'\\{0,64}+"' )
    | (?P<slashes> \\{1,32}+ ) ' (?:
          (?P=slashes) \\{1,64}+ ' (?P=slashes) '
        | \\{0,64}+ " (?P=slashes) ' \\{0,64}+ " (?P=slashes) ' ) (?P<escaped_quote> )
    """.replace(b"$ZEROS", _LEADING_ZEROS)
_ESCAPE_SYNTAX = _ESCAPE_SYNTAX.replace(b"$NAME_REST", b"%d" % (ENTITY_NAME_BYTES_MAX - 1))
_ESCAPE_SYNTAX = _ESCAPE_SYNTAX.replace(b"$ESCAPE_CHARACTER", _ESCAPE_CHARACTER)
_NOT_INTRODUCER = rb"(?<!\xc2[\x90\x98\x9b-\x9f])"
"""The C1 controls that start terminal escapes are not tokens by themselves."""

_ESCAPES = [
    _ESCAPE_SYNTAX,
    *(alternative + _NOT_INTRODUCER for alternative in INVISIBLE_PATTERNS),
    *(rb"\x%02x %b{0,63}+" % (first, _CONTROLS) for first in range(128) if re.match(_CONTROLS, bytes([first]))),
]
_ESCAPE = re.compile(b"|".join(_ESCAPES), re.VERBOSE)

_VARIABLE_LENGTH_SYNTAX = (
    (rb"[0-3][0-7]{2} |", rb"0?[0-3][0-7]{2} |"),
    (rb"(?P<byte> [0-9a-fA-F]{2} )", rb"(?P<byte> (?=[0-9a-fA-F]) $ZEROS [0-9a-fA-F]{0,2}+ )"),
    (rb"(?P<character> [0-9a-fA-F]{4} )", rb"(?P<character> [0-9a-fA-F]{1,4}+ )"),
    (rb"(?P<long> [0-9a-fA-F]{8} )", rb"(?P<long> [0-9a-fA-F]{1,8}+ )"),
)
r"""Escapes whose length depends on the language: `\0163` in `echo` and `printf %b`, `\x0073` in C, `\u73` in shells."""

_HAS_VARIABLE_LENGTH_ESCAPE = re.compile(
    rb"\\(?: 0[0-3][0-7]{2} | x0[0-9a-fA-F]{2}"
    rb"| (?: x[0-9a-fA-F] | u[0-9a-fA-F]{1,3} | U[0-9a-fA-F]{1,7} ) (?![0-9a-fA-F]) )",
    re.VERBOSE,
)

_OPEN_ESCAPES = tuple(
    (re.compile(syntax), more)
    for syntax, more in (
        (rb"\\+[0-7]{1,2}", b"01234567"),
        (rb"&#[0-9]+", b"0123456789;"),
        (rb"&#[xX][0-9a-fA-F]+", b"0123456789abcdefABCDEF;"),
        (rb"&[A-Za-z0-9]+", b";"),
        (rb"\\+u[dD][89abAB][0-9a-fA-F]{2}", b"\\"),
    )
)
"""Escapes without a terminator, and the characters that may continue each."""

_ESCAPE_STARTS = (b"\\", b"%", b"&")

_HAS_CONSECUTIVE_ESCAPES = re.compile(
    rb"""
    (?: \\[0-7]{1,2} (?!\\[0-7]{1,2}(?![0-7]))
      | \\u[dD][89abAB][0-9a-fA-F]{2} (?!\\+u[dD][c-fC-F])
      | &\#[0-9]++ (?!&\#[0-9]+(?![0-9;]))
      | &\#[xX][0-9a-fA-F]++ (?!&\#[xX][0-9a-fA-F]+(?![0-9a-fA-F;]))
      | &[A-Za-z][A-Za-z0-9]{1,5} )
    (?: [\\%&\x00-\x08\x0b-\x1f\x7f-\xff] | '[\\"] )
    """,
    re.VERBOSE,
)

_INCOMPLETE_CHARACTERS = (rb"[\xc2-\xf4]", rb"[\xe0-\xf4][\x80-\xbf]", rb"[\xf0-\xf4][\x80-\xbf][\x80-\xbf]")
"""Patterns that match the first bytes of a character in UTF-8, by length."""

_NOT_IN_CHARACTER = b"".join(rb"(?<!%b.)" % start for start in _INCOMPLETE_CHARACTERS)
"""Matches only where the byte before is not part of a UTF-8 character that started earlier."""

_PARTIAL_CHARACTER = re.compile(b"|".join(rb"%b\Z" % start for start in _INCOMPLETE_CHARACTERS))

_LATIN1_CONTROLS = rb"[\x80-\x9f\xad]"
"""Controls and the soft hyphen in Latin-1."""

_LATIN1_ESCAPES = [
    rb"\x%02x %b %b{0,63}+" % (first, _NOT_IN_CHARACTER, _LATIN1_CONTROLS)
    for first in range(256)
    if re.match(_LATIN1_CONTROLS, bytes([first]))
]
_ESCAPE_OR_LATIN1 = re.compile(b"|".join(_ESCAPES + _LATIN1_ESCAPES), re.VERBOSE)
"""Matches escapes in bytes that are not UTF-8. In UTF-8, it matches the same escapes as `_ESCAPE`, but more slowly."""


@cache
def _variable_length_escapes(*, is_utf_8: bool) -> re.Pattern[bytes]:
    syntax, *others = _ESCAPES
    for short, long in _VARIABLE_LENGTH_SYNTAX:
        syntax = syntax.replace(short, long.replace(b"$ZEROS", _LEADING_ZEROS))
    return re.compile(b"|".join([syntax, *others, *(() if is_utf_8 else _LATIN1_ESCAPES)]), re.VERBOSE)


_PARAMETERS = rb"[0-?]{0,1024}+ [\ -/]{0,8}+"
"""Parameters before the letter that ends a color or cursor sequence."""

_STRING = rb"(?: [^\x07\x18\x1a\x1b\n\xc2] | \xc2(?![\x90\x98\x9b-\x9f]) ){0,1024}+"
"""The text of a title or a link, up to the next terminal escape."""

_STRING_END = rb"(?: [\x07\x18\x1a] | \x1b\\ | \xc2\x9c | \x1b(?![\[\]PX^_(]) | (?=\x1b) )"
"""The end of a title or a link: a terminator, or any escape character.

An escape character ends the text even without the backslash of a terminator: that backslash may have been decoded as
the start of an escape.
"""

_TERMINAL_ESCAPE = re.compile(
    rb"""
      \x1b (?:
          \[ $PARAMETERS (?: [@-~\x18\x1a] | (?=\x1b) )                 # colors, cursor movements
        | [\]PX^_] $STRING $END                                         # titles, links
        | [\ -%'-/]{0,4}+ [0-OQ-WYZ`-~] )                               # except `&`, which starts a reference
    | \xc2 (?:
          \x9b $PARAMETERS (?: [@-~\x18\x1a] | (?=\x1b) )
        | [\x90\x98\x9d-\x9f] $STRING $END
        | [\x90\x98\x9b-\x9f] )
    | \x9b $NOT_IN_CHARACTER $PARAMETERS [@-~\x18\x1a]                 # a single byte of Latin-1
    | [\x90\x98\x9d-\x9f] $NOT_IN_CHARACTER [\x20-\x7e]{0,1024}+ (?: [\x07\x18\x1a\x9c] | \x1b\\ | (?=\x1b) )
    """.replace(b"$STRING", _STRING)
    .replace(b"$END", _STRING_END)
    .replace(b"$NOT_IN_CHARACTER", _NOT_IN_CHARACTER)
    .replace(b"$PARAMETERS", _PARAMETERS),
    re.VERBOSE,
)

_HAS_NESTED_ESCAPE = re.compile(
    rb"\x1b(?:[\\%\]PX^_]|\[[0-?]{0,1024}+[ -/]{0,8}+\\)"
    rb"|\xc2[\x90\x98\x9d-\x9f]|[\x90\x98\x9b\x9d-\x9f]" + _NOT_IN_CHARACTER
)
"""A terminal escape with bytes that `find_escapes` may decode as an escape."""

_PARTIAL_ESCAPE = re.compile(
    rb"""
      \\\\{0,63}+ (?: u[0-9a-fA-F]{0,3} | u\{$ZEROS[0-9a-fA-F]{0,6} | U[0-9a-fA-F]{0,7} )? \Z
    | \\\\{0,63}+ (?: x$ZEROS[0-9a-fA-F]? | 0[0-7]{2} | [0-7]{1,2} ) \Z
    | \\\\{0,63}+ u[dD][89abAB][0-9a-fA-F]{2} (?: \\{1,64}+ (?: u (?: [dD] (?: [c-fC-F] [0-9a-fA-F]? )? )? )? )? \Z
    | \x1b (?: \[ $PARAMETERS | [\]PX^_] $STRING \x1b? | [\ -/]{0,4}+ )? \Z
    | % [0-9a-fA-F]? \Z
    | & (?: [A-Za-z][A-Za-z0-9]{0,$NAME_REST}+ | \#$ZEROS[0-9]{0,7} | \#[xX]$ZEROS[0-9a-fA-F]{0,6} )? \Z
    | \\{0,32}+ ' (?: \\{1,96}+ (?: ' \\{0,32}+ )?
        | \\{0,64}+ " \\{0,32}+ (?: ' \\{0,64}+ (?: " \\{0,32}+ )? )? )? \Z
    | \xc2 (?: \x9b $PARAMETERS | [\x90\x98\x9d-\x9f] $STRING \x1b? ) \Z
    | \x9b $NOT_IN_CHARACTER $PARAMETERS \Z
    | [\x90\x98\x9d-\x9f] $NOT_IN_CHARACTER [\x20-\x7e]{0,1024}+ \x1b? \Z
    """.replace(b"$ZEROS", _LEADING_ZEROS)
    .replace(b"$NAME_REST", b"%d" % (ENTITY_NAME_BYTES_MAX - 1))
    .replace(b"$STRING", _STRING)
    .replace(b"$PARAMETERS", _PARAMETERS)
    .replace(b"$NOT_IN_CHARACTER", _NOT_IN_CHARACTER)
    + b"".join(rb"| %b\Z" % start for start in _INCOMPLETE_CHARACTERS),
    re.VERBOSE,
)

ESCAPE_FIRST_BYTES = frozenset(b"\\%&'")
"""The first bytes of escapes. Invisible characters and terminal escapes start with other bytes."""

EscapeToken = tuple[int, int, bytes]
"""Start, end and decoded text: nothing, a character in UTF-8, or a byte."""

_TOKEN_BYTES_MAX = 1200
"""Maximum length of a token."""


def find_escapes(data: bytes) -> Iterator[EscapeToken]:
    """Yield escapes and invisible characters."""
    return _find_tokens(data, _ESCAPE if _is_utf_8(data) else _ESCAPE_OR_LATIN1)


def find_variable_length_escapes(data: bytes) -> Iterator[EscapeToken]:
    """Yield escapes and invisible characters, with the escape lengths of `_VARIABLE_LENGTH_SYNTAX`."""
    return _find_tokens(data, _variable_length_escapes(is_utf_8=_is_utf_8(data)))


def may_contain_variable_length_escapes(data: bytes) -> bool:
    """Return whether the results of `find_variable_length_escapes` may differ from those of `find_escapes`."""
    return b"\\" in data and _HAS_VARIABLE_LENGTH_ESCAPE.search(data) is not None


def find_isolated_escapes(data: bytes) -> Iterator[EscapeToken]:
    r"""Yield escapes and invisible characters, except escapes that the text after them may continue: `&#10\u0034;`."""
    tokens = _find_tokens(data, _ESCAPE if _is_utf_8(data) else _ESCAPE_OR_LATIN1)
    token = next(tokens, None)
    while token is not None:
        following = next(tokens, None)
        if not _is_continued(data, token, following):
            yield token
        token = following


def may_contain_consecutive_escapes(data: bytes) -> bool:
    """Return whether the results of `find_isolated_escapes` may differ from those of `find_escapes`."""
    return _HAS_CONSECUTIVE_ESCAPES.search(data) is not None


def _is_continued(data: bytes, token: EscapeToken, following: EscapeToken | None) -> bool:
    r"""Return whether an escape, a part of an escape or invisible text after the token may continue the token.

    Only a token without a terminator can be continued, but not by another such token of the same kind: `\67\67` are two
    characters.
    """
    end = token[1]
    is_next = following is not None and following[0] == end
    if not is_next and data[end : end + 1] not in _ESCAPE_STARTS:
        return False
    for syntax, more in _OPEN_ESCAPES:
        if syntax.fullmatch(data, token[0], end):
            if following is None or not is_next or not following[2]:
                return True
            return following[2][:1] in more and syntax.fullmatch(data, end, following[1]) is None
    return False


def _find_tokens(data: bytes, escape: re.Pattern[bytes]) -> Iterator[EscapeToken]:
    for match in escape.finditer(data):
        group = match.lastgroup
        start, end = match.span()
        if group is None:
            yield start, end, b""
        elif group != "name":
            yield start, end, _DECODERS[group](match[group].decode())
        elif (resolved := decode_html_entity(match[group])) is not None:
            yield start, start + 1 + resolved[0], resolved[1]


def find_terminal_escapes(data: bytes) -> Iterator[EscapeToken]:
    """Yield terminal escapes. A terminal escape may consist of only a control character and a letter."""
    return ((*found.span(), b"") for found in _TERMINAL_ESCAPE.finditer(data))


def add_terminal_escapes(data: bytes, tokens: Iterable[EscapeToken]) -> Iterator[EscapeToken]:
    """Yield the tokens of the data and its terminal escapes, in order; an earlier or longer token takes precedence."""
    end = 0
    for token in merge(find_terminal_escapes(data), tokens, key=lambda token: (token[0], -token[1])):
        if token[0] >= end:
            yield token
            end = token[1]


def may_contain_nested_escapes(data: bytes) -> bool:
    """Return whether the data may have a terminal escape that contains another escape or ends with the start of one."""
    return _HAS_NESTED_ESCAPE.search(data) is not None


def _is_utf_8(data: bytes) -> bool:
    """Return whether the data is UTF-8, except for a character cut off at the end."""
    if data.isascii():
        return True
    try:
        utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def find_partial_escape(data: bytes, end: int) -> int:
    """Return the start of a token that ends at `end` or continues there; return `end` if there is no such token."""
    found = _PARTIAL_ESCAPE.search(data, max(0, end - _TOKEN_BYTES_MAX, data.rfind(b"\n", 0, end) + 1), end)
    return found.start() if found else end


def start_of_character(data: bytes, position: int) -> int:
    """Return the start of the UTF-8 character that contains `position`; `position` if it splits no character."""
    if 0x80 <= int.from_bytes(data[position : position + 1]) < 0xC0:
        found = _PARTIAL_CHARACTER.search(data, max(0, position - len(_INCOMPLETE_CHARACTERS)), position)
        return found.start() if found else position
    return position


def start_of_backslashes(data: bytes, position: int) -> int:
    """Return where the run of backslashes around `position` starts. Only the last _BACKSLASHES_MAX of a run count."""
    end = position
    while data[end : end + 1] == b"\\" and end < position + _BACKSLASHES_MAX:
        end += 1
    least = max(0, end - _BACKSLASHES_MAX)
    while position > least and data[position - 1] == 0x5C:
        position -= 1
    return position


def _decode_surrogate_pair(escaped_pair: str) -> bytes:
    high, low = int(escaped_pair[:4], 16), int(escaped_pair[-4:], 16)
    return _encode_code_point(0x10000 + ((high & 0x3FF) << 10) + (low & 0x3FF))


def _encode_code_point(code: int) -> bytes:
    return chr(code).encode("utf-8", "surrogatepass") if code <= 0x10FFFF else b""


_DECODERS: dict[str, Callable[[str], bytes]] = {
    "pair": _decode_surrogate_pair,
    "character": lambda digits: _encode_code_point(int(digits, 16)),
    "braced": lambda digits: _encode_code_point(int(digits, 16)),
    "long": lambda digits: _encode_code_point(int(digits, 16)),
    "byte": lambda digits: bytes([int(digits, 16)]),
    "octal": lambda digits: bytes([int(digits, 8)]),
    "percent": bytes.fromhex,
    "string_end": lambda _: b"\x07",
    "letter": {"a": b"\x07", "e": b"\x1b"}.__getitem__,
    "decimal": lambda digits: _encode_code_point(int(digits)),
    "hex": lambda digits: _encode_code_point(int(digits, 16)),
    "quote": lambda _: b"'",
    "escaped_quote": lambda _: b"'",
}
