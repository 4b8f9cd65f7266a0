"""The number of an event, as clients say where they go on."""

from sandbox.api.errors import InvalidParameterError

SEQ_MAX = 2**63 - 1
_DIGITS_MAX = len(str(SEQ_MAX))


def read_seq(text: str, field: str) -> int | None:
    """The number in what the field says, None where that is nothing. Raises InvalidParameterError."""
    if not text:
        return None
    is_number = text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX
    if not is_number or int(text) > SEQ_MAX:
        raise InvalidParameterError(field, f"must be the seq of an event, a whole number from 0 to {SEQ_MAX}")
    return int(text)
