"""Limits for secrets and their redaction. `docs/limits.md` lists them."""

SECRET_VALUE_BYTES_MAX = 64 * 1024
"""Maximum size of one value. A task with a larger value fails with `secret_unavailable`."""

TASK_SECRETS_BYTES_MAX = 256 * 1024
"""Maximum total size of a task's values. A task that exceeds it fails with `secret_unavailable`."""

VAULT_TIMEOUT_SECONDS = 10
"""Time limit for one value from Vault."""

REDACTED_VALUE_CHARACTERS_MIN = 8
"""Minimum length for redaction. A shorter value is passed to the agent but not searched for."""

REDACTED_LINE_CHARACTERS_MIN = 16
"""Minimum length at which a line of a multi-line value is searched for separately."""

DECODED_LAYERS_MAX = 6
"""Maximum number of levels of nested escapes that are decoded in the search."""

ESCAPE_LEADING_ZEROS_MAX = 1024
r"""Maximum number of leading zeros of a number in an escape, as in `&#00065;` and `\u{0041}`.

An escape with more leading zeros is not decoded.
"""

NESTED_JSON_LEVELS_MAX = 4
"""Maximum depth of nested JSON in which the search finds a value that consists mostly of escapes.

Applies to forms of at most 1 KiB (`TWICE_ENCODED_VALUE_BYTES_MAX`).
"""

TWICE_ENCODED_VALUE_BYTES_MAX = 1024
"""Maximum length of a value that the search finds in base64 or hex after it was encoded twice."""

VALUE_SPAN_BYTES_MAX = 1024 * 1024
"""Maximum number of bytes over which a value may be spread to be found.

A value is also not found if it is spread over more than 32 times its longest searched form plus 4 KiB. A value spread
over up to four times that form is always found.
"""

ALWAYS_RESCANNED_BYTES_MAX = 16 * 1024
"""Maximum number of held-back bytes that are rescanned after each input.

A larger number is rescanned only after it has grown by a quarter, or when the stream pauses.
"""

CONCURRENT_VAULT_REQUESTS_MAX = 8
"""Maximum number of concurrent requests to Vault. Additional requests wait for a free slot until they
time out."""
