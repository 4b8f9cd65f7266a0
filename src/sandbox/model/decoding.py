"""What may come of reading JSON that somebody else wrote."""

import msgspec

DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for text that is no JSON or of another shape, that is not UTF-8, and that is too deep. Its
documentation names the first only; the others are Python's own."""
