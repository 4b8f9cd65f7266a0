"""The number of an event, as clients say where they go on."""

from sandbox.api.errors import InvalidParameterError

_DIGITS_MAX = 18


def read_seq(text: str, field: str) -> int | None:
    """The number in what the field says, None where that is nothing. Raises InvalidParameterError."""
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX):
        raise InvalidParameterError(field, "must be the seq of an event, a whole number from 0")
    return int(text)
