"""Text formats of the manifest, each with a name, a check and an error message."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import Any
from urllib.parse import unquote

from sandbox.model.task_names_and_ids import TASK_ID_PATTERN, is_task_id

PROMPT_BYTES_MAX = 512 * 1024
GIT_PATCH_BYTES_MAX = 512 * 1024
"""Maximum size of the patch before base64 encoding."""

DURATION_SECONDS_MAX = 168 * 3600
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600}
_UNIT_BYTES = {"M": 1024**2, "G": 1024**3}


class RangeMessage(str):
    """An error message about a value that is out of range, as opposed to a value with a wrong format."""

    __slots__ = ()


@dataclass(frozen=True)
class Format:
    """A check on a string.

    find_error: returns an error message or None.
    json_schema: the part of the check that JSON Schema can express, for client programs.
    suggest: returns a valid string that an invalid one resembles, or None.
    """

    name: str
    find_error: Callable[[str], str | None]
    json_schema: Mapping[str, Any] = field(default_factory=dict, compare=False)
    suggest: Callable[[str], str | None] = field(default=lambda _: None, compare=False)

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Make pydantic run the check. pydantic is imported here, because only validation needs it."""
        from pydantic_core import PydanticCustomError, core_schema

        def check(value: str) -> str:
            message = self.find_error(value)
            if message is not None:
                kind = "range" if isinstance(message, RangeMessage) else "format"
                raise PydanticCustomError(
                    kind, "{complaint}", {"complaint": message, "suggestion": self.suggest(value)}
                )
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Callable[[Any], Any]) -> Any:
        """Add `json_schema` to the schema of the string."""
        return {**handler(core_schema), **self.json_schema}


def parse_duration(text: str) -> int:
    """Parse a duration such as `90s`, `15m` or `24h`; return seconds."""
    return int(text[:-1]) * _UNIT_SECONDS[text[-1]]


def parse_byte_size(text: str) -> int:
    """Parse a size such as `512M` or `8G` (binary units); return bytes."""
    return int(text[:-1]) * _UNIT_BYTES[text[-1]]


def pattern_format(name: str, pattern: str, message: str) -> Format:
    """Return the format of strings that fully match the pattern."""
    compiled = re.compile(pattern, re.ASCII)
    return Format(name, lambda value: None if compiled.fullmatch(value) else message, _pattern_schema(pattern))


def _pattern_schema(pattern: str, **keywords: Any) -> dict[str, Any]:
    """Return a JSON schema for strings that fully match this pattern."""
    return {"pattern": f"^(?:{pattern})$", **keywords}


# Control characters, the two line separators, and bidirectional formatting characters, which reorder displayed text.
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_CONTROL_CHARACTERS = re.compile(f"[{_CONTROL}]")


def _check_no_control_characters(value: str) -> str | None:
    return "must not contain control characters" if _CONTROL_CHARACTERS.search(value) else None


def _check_label_key(value: str) -> str | None:
    if "=" in value:
        return "must not contain '='"
    return _check_no_control_characters(value)


def _check_task_id(value: str) -> str | None:
    if value == "":
        return None
    if value == "stream":
        return "'stream' is reserved; choose another id"
    if not is_task_id(value):
        return (
            "must be 1 to 128 letters, digits, '.', '_' or '-', start and end with a letter or digit, "
            "and not contain '..'"
        )
    return None


_HOST_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_HOST_LABEL}(?:\.{_HOST_LABEL})*"
_URL_CHARACTERS_MAX = 2048
_URL = (
    r"(?P<scheme>https?|ssh)://(?P<user>[^/@\s]*@)?"
    rf"(?:{_HOST}|\[(?P<address>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{{1,5}}))?/[^\s]+"
)
_SCP_URL = rf"git@{_HOST}:[^\s-][^\s]*"
_URL_MESSAGE = "must be https://…, http://…, ssh://… or git@host:path"


def _check_repository_url(value: str) -> str | None:
    if len(value) > _URL_CHARACTERS_MAX or not value.isprintable() or not value.isascii():
        return f"must be at most {_URL_CHARACTERS_MAX} printable ASCII characters"
    if re.fullmatch(_SCP_URL, value):
        return None
    match = re.fullmatch(_URL, value)
    if match is None:
        return _URL_MESSAGE
    # Git unescapes the URL before it looks for the host.
    user = unquote(match["user"] or "")
    if ":" in user or (user and match["scheme"] != "ssh"):
        return "must not contain credentials; put them into the server user's git configuration"
    if user.startswith("-") or "/" in user or not user.isprintable():
        return _URL_MESSAGE
    return _check_address(match["address"]) or _check_port(match["port"])


def _check_address(text: str | None) -> str | None:
    if text is not None:
        try:
            IPv6Address(text)
        except ValueError:
            return "must have an IPv6 address between '[' and ']'"
    return None


def _check_port(text: str | None) -> str | None:
    if text is None or 1 <= int(text) <= 65535:
        return None
    return RangeMessage("must have a port between 1 and 65535")


_BRANCH_CHARACTERS_MAX = 250
_NOT_IN_BRANCH = r"\x00-\x20\x7f~^:?*\[\\"


def _check_branch(value: str) -> str | None:
    """Check a branch name against the rules of git-check-ref-format(1)."""
    forbidden = re.search(rf"[{_NOT_IN_BRANCH}]|\.\.|@\{{|//", value)
    has_valid_parts = all(part and not part.startswith(".") and not part.endswith(".lock") for part in value.split("/"))
    if (
        len(value) > _BRANCH_CHARACTERS_MAX
        or forbidden
        or not has_valid_parts
        or value.startswith("-")
        or value in {"@", "HEAD"}
    ):
        return "must be a valid git branch name"
    return "must be a valid git branch name" if value.endswith(".") else None


_PATH_CHARACTERS_MAX = 1024


def _check_subpath(value: str) -> str | None:
    parts = value.split("/")
    if not value or len(value) > _PATH_CHARACTERS_MAX or value.startswith("/") or ".." in parts or ".git" in parts:
        return "must be a relative path inside the repository, without '..' and '.git'"
    return _check_no_control_characters(value)


def _check_prompt(value: str) -> str | None:
    if not value.strip():
        return "must not be empty"
    if "\x00" in value:
        return "must not contain NUL characters"
    if len(value.encode(errors="replace")) > PROMPT_BYTES_MAX:
        return RangeMessage(f"must be at most {PROMPT_BYTES_MAX // 1024} KiB")
    return None


def _check_git_patch(value: str) -> str | None:
    try:
        patch = base64.b64decode(value, validate=True)
    except ValueError:  # binascii.Error, or ValueError for non-ASCII characters
        return "must be the base64-encoded output of git diff --binary"
    if len(patch) > GIT_PATCH_BYTES_MAX:
        return RangeMessage(f"must be at most {GIT_PATCH_BYTES_MAX // 1024} KiB before base64")
    return None if patch.strip() else "must not be empty; omit it"


_BYTE_SIZE = "[0-9]{1,9}[MG]"
_DURATION = "[0-9]{1,8}[smh]"


def _check_byte_size(value: str) -> str | None:
    if not re.fullmatch(_BYTE_SIZE, value):
        return "must be a whole number and a unit, such as 512M or 8G"
    return None if parse_byte_size(value) else RangeMessage("must be at least 1M")


_MEBIBYTES_MIN = 256
"""A size without a unit probably means MiB if it is at least this large, such as `512`; otherwise, it means GiB."""


def _suggest_byte_size(value: str) -> str | None:
    """Add the probable unit to a number without a unit."""
    if not re.fullmatch("[1-9][0-9]{0,5}", value):
        return None
    return f"{value}{'G' if int(value) < _MEBIBYTES_MIN else 'M'}"


def _check_duration(value: str) -> str | None:
    if not re.fullmatch(_DURATION, value):
        return "must be a whole number and a unit, such as 90s, 15m or 24h"
    if not 1 <= parse_duration(value) <= DURATION_SECONDS_MAX:
        return RangeMessage("must be between 1s and 168h")
    return None


def _check_artifact_pattern(value: str) -> str | None:
    if not value or len(value) > _PATH_CHARACTERS_MAX or value.startswith("/") or ".." in value.split("/"):
        return "must be a glob relative to the workspace root, without '..'"
    return _check_no_control_characters(value)


_ALLOWED_HOST_CHARACTERS_MAX = len("*.") + 253 + len(":65535")
_ALLOWED_HOST = rf"(?:\*\.)?(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?"


def _check_allowed_host(value: str) -> str | None:
    """Reject a numeric last label (`127.1`, `0x7f000001`), because many resolvers parse it as an IP address."""
    # Check the length first: matching a megabyte takes most of a second, during which nothing else runs.
    is_short = len(value) <= _ALLOWED_HOST_CHARACTERS_MAX
    match = re.fullmatch(_ALLOWED_HOST, value) if is_short else None
    if match is None or len(match["host"]) > 253 or re.fullmatch(r"[0-9]+|0[xX].*", match["host"].split(".")[-1]):
        return "must be a host name, or '*.' and a domain, with an optional ':port'; no IP address"
    return _check_port(match["port"])


def _without_group_names(pattern: str) -> str:
    """Return a pattern without group names, whose syntax is different in ECMAScript."""
    return re.sub(r"\(\?P<\w+>", "(", pattern)


NO_CONTROL_CHARACTERS = Format(
    "no_control_characters", _check_no_control_characters, _pattern_schema(f"[^{_CONTROL}]*")
)
LABEL_KEY = Format("label_key", _check_label_key, _pattern_schema(f"[^={_CONTROL}]*"))
TASK_ID = Format("task_id", _check_task_id, _pattern_schema(f"({TASK_ID_PATTERN})?"))
REPOSITORY_URL = Format(
    "repository_url",
    _check_repository_url,
    _pattern_schema(f"{_without_group_names(_URL)}|{_SCP_URL}", maxLength=_URL_CHARACTERS_MAX),
)
BRANCH = Format("branch", _check_branch, _pattern_schema(f"[^{_NOT_IN_BRANCH}]+", maxLength=_BRANCH_CHARACTERS_MAX))
COMMIT = pattern_format("commit", "[0-9a-fA-F]{7,64}", "must be 7 to 64 hexadecimal digits")
SUBPATH = Format(
    "subpath", _check_subpath, _pattern_schema(f"[^/{_CONTROL}][^{_CONTROL}]*", maxLength=_PATH_CHARACTERS_MAX)
)
PROMPT = Format("prompt", _check_prompt, _pattern_schema(r"[^\x00]*[^\s\x00][^\x00]*", maxLength=PROMPT_BYTES_MAX))
GIT_PATCH = Format("git_patch", _check_git_patch, {"contentEncoding": "base64", "minLength": 1})
BYTE_SIZE = Format("byte_size", _check_byte_size, _pattern_schema(_BYTE_SIZE), _suggest_byte_size)
DURATION = Format("duration", _check_duration, _pattern_schema(_DURATION))
ARTIFACT_PATTERN = Format(
    "artifact_pattern",
    _check_artifact_pattern,
    _pattern_schema(f"[^/{_CONTROL}][^{_CONTROL}]*", maxLength=_PATH_CHARACTERS_MAX),
)
ALLOWED_HOST = Format(
    "allowed_host",
    _check_allowed_host,
    _pattern_schema(_without_group_names(_ALLOWED_HOST), maxLength=_ALLOWED_HOST_CHARACTERS_MAX),
)
ENVIRONMENT_NAME = pattern_format(
    "environment_name", "[A-Za-z_][A-Za-z0-9_]{0,127}", "must be an environment variable name"
)
