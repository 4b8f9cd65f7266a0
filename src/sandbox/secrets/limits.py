"""Limits of secrets and of their redaction. `docs/limits.md` lists them."""

SECRET_BYTES_MAX = 64 * 1024
"""Maximum size of one value. Beyond it the task fails with `secret_unavailable`."""

SECRETS_BYTES_MAX = 256 * 1024
"""Maximum size of all values of a task. Beyond it the task fails with `secret_unavailable`."""

VAULT_SECONDS = 10
"""Time limit for one value from Vault."""

REDACTED_CHARACTERS_MIN = 8
"""Minimum length for redaction. A shorter value is passed on but not searched for."""

REDACTED_LINE_CHARACTERS_MIN = 16
"""Minimum length of a line of a multi-line value to be searched for separately."""

REDACTED_LAYERS_MAX = 6
"""Levels of nested escapes that are decoded in the search."""

REDACTED_ZEROS_MAX = 1024
r"""Leading zeros of a number in an escape, as in `&#00065;` and `\u{0041}`. An escape with more is not decoded."""

REDACTED_NESTING_MAX = 4
"""Levels of nested JSON in which a value that consists mostly of escapes is searched for.

Applies to forms of at most 1 KiB (`TWICE_ENCODED_BYTES_MAX`).
"""

TWICE_ENCODED_BYTES_MAX = 1024
"""A longer value is not searched for in base64 or hex that was encoded twice."""

REDACTED_SPREAD_BYTES_MAX = 1024 * 1024
"""A value spread over more bytes, or over more than 32 times its longest searched form plus 4 KiB, is not found.

A value spread over up to four times that form is always found.
"""

RESCAN_BYTES_MAX = 16 * 1024
"""If a stream holds back more than this, it is rescanned only after growing by a quarter, or at a pause."""

VAULT_REQUESTS_MAX = 8
"""Maximum number of concurrent requests to Vault. Additional ones wait, within their time limit."""
