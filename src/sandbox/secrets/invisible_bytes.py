"""Regular expressions of the invisible characters beyond ASCII in UTF-8, whole and cut off."""

from collections.abc import Iterable, Iterator

from sandbox.model.invisible import INVISIBLE_RANGES

_LAST_ASCII = 0x7F
_LENGTH_ENDS = (_LAST_ASCII, 0x7FF, 0xFFFF)
"""The last code point of one, two and three bytes."""
_CONTINUATION_BITS = 6

_Sequence = tuple[tuple[int, int], ...]
"""To each byte of a character its least and its greatest value."""


def _sequences(first: int, last: int) -> Iterator[_Sequence]:
    """The range of code points as sequences whose bytes vary independently of each other."""
    for split in _splits(first, last):
        if first <= split < last:
            yield from _sequences(first, split)
            yield from _sequences(split + 1, last)
            return
    least, greatest = (chr(code).encode("utf-8", "surrogatepass") for code in (first, last))
    yield tuple(zip(least, greatest, strict=True))


def _splits(first: int, last: int) -> Iterator[int]:
    yield from _LENGTH_ENDS
    for count in range(1, 4):
        low = (1 << _CONTINUATION_BITS * count) - 1
        if first | low != last | low:
            if first & low:
                yield first | low
            if ~last & low:
                yield (last & ~low) - 1


def _alternatives(sequences: Iterable[_Sequence]) -> tuple[bytes, ...]:
    """Patterns that together match any of the sequences, one for each first byte."""
    rests: dict[tuple[int, int], list[_Sequence]] = {}
    for first, *rest in sequences:
        rests.setdefault(first, []).append(tuple(rest))
    return tuple(_byte(*first) + _rest(found) for first, found in rests.items())


def _rest(sequences: list[_Sequence]) -> bytes:
    longer = list(filter(None, sequences))
    if not longer:
        return b""
    return b"(?:%b)%b" % (b"|".join(_alternatives(longer)), b"?" if len(longer) < len(sequences) else b"")


def _byte(least: int, greatest: int) -> bytes:
    return rb"\x%02x" % least if least == greatest else rb"[\x%02x-\x%02x]" % (least, greatest)


_SEQUENCES = [
    sequence
    for first, last in sorted(INVISIBLE_RANGES)
    if last > _LAST_ASCII
    for sequence in _sequences(max(first, _LAST_ASCII + 1), last)
]

WHOLE = _alternatives(_SEQUENCES)
"""For one invisible character."""

CUT_OFF = _alternatives(sequence[:length] for sequence in _SEQUENCES for length in range(1, len(sequence)))
"""For the first bytes of one."""
