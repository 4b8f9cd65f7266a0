"""The bounds of secrets and of their redaction. `docs/limits.md` lists them."""

SECRET_BYTES_MAX = 64 * 1024
"""One value; over it the task fails with `secret_unavailable`."""

SECRETS_BYTES_MAX = 256 * 1024
"""All values of a task together; over it the task fails with `secret_unavailable`."""

VAULT_SECONDS = 10
"""For one value from Vault."""

REDACTED_CHARACTERS_MIN = 8
"""A shorter value is passed on, but not looked for."""

REDACTED_LINE_CHARACTERS_MIN = 16
"""A line of a value of several lines that is also looked for by itself."""

REDACTED_LAYERS_MAX = 6
"""Escapes within escapes that are undone in search of a value."""

REDACTED_ZEROS_MAX = 1024
"""Leading zeros of a number in an escape, as in `&#00065;` and `\\u{0041}`; with more it is not read as one."""

REDACTED_NESTING_MAX = 4
"""JSON within JSON in which a value is looked for that is little but escapes, of at most 1 KiB as it stands there."""

TWICE_ENCODED_BYTES_MAX = 1024
"""A longer value is not looked for in base64 or hex that was encoded once more."""

REDACTED_SPREAD_BYTES_MAX = 1024 * 1024
"""A value that is spread over more bytes is not found, nor over 32 times the longest form it is searched in and 4 KiB;
but over four times that form it is."""

RESCAN_BYTES_MAX = 16 * 1024
"""While more than this is held back of a stream, it is looked at anew once it has grown by a quarter, or at a pause."""

VAULT_REQUESTS_MAX = 8
"""Values that Vault is asked for at once; further ones wait, within their time."""
