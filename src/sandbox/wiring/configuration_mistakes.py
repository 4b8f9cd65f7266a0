"""The configuration held against its schema; every mistake told in words, with the place where it was made.

Values are never repeated: what stands in the wrong place may be a secret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sandbox.model.printable import printable, replaced
from sandbox.wiring.configuration_keys import sections
from sandbox.wiring.settings import ServerSection, ServerSettings

_NAME_LENGTH_SHOWN_MAX = 64
_SECRET_NAME = re.compile(r"token|passw|secret|credential|api_?key", re.IGNORECASE)
_TELLINGS = (
    (r"string_type|path_type", "must be text"),
    (r"int_type|int_parsing|int_from_float", "must be a whole number"),
    (r"float_type|float_parsing|finite_number", "must be a number"),
    (r"tuple_type|list_type", "must be a list of texts"),
    (r"dataclass_type|dict_type", "must be a section"),
    (r"greater_than_equal", "must be at least {ge:g}"),
    (r"less_than_equal", "must be at most {le:g}"),
    (r"string_too_short|too_short", "must not be empty"),
    (r"string_too_long|too_long", "must have at most {max_length} parts or characters"),
    (r"format|range", "{complaint}"),
)


def validate(data: dict[str, Any], origins: Mapping[str, str]) -> tuple[ServerSettings | None, list[str]]:
    """The settings that the data is, or None and everything that is wrong with it. origins: by dotted path."""
    # A date is the one value of TOML that JSON lacks; no key takes one, so it is made what no key takes.
    text = json.dumps(data, default=lambda value: {"date": str(value)})
    clashes = _clashes(data, origins)
    try:
        settings = _adapter().validate_json(text, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        return None, [*(_mistake(detail, origins) for detail in found), *clashes]
    return (None, clashes) if clashes else (settings, [])


@cache
def _adapter() -> TypeAdapter[ServerSettings]:
    return TypeAdapter(ServerSettings)


def _clashes(data: dict[str, Any], origins: Mapping[str, str]) -> list[str]:
    """What no value is to blame for alone: two doors on one port."""
    section = data.get("server", {})
    if not isinstance(section, dict):
        return []
    port, ws_port = section.get("port", ServerSection.port), section.get("ws_port", ServerSection.ws_port)
    if not isinstance(port, int) or port == 0 or port != ws_port:
        return []
    wheres = {name: _where(f"server.{name}", origins) for name in ("port", "ws_port")}
    return [f"server.ws_port{wheres['ws_port']} must differ from server.port{wheres['port']}"]


def _mistake(error: ErrorDetails, origins: Mapping[str, str]) -> str:
    path = [str(part)[:_NAME_LENGTH_SHOWN_MAX] for part in error["loc"]]
    names = [part for part in path if not part.isdecimal()]
    shown = printable(".".join(path), replaced)
    return f"{shown}{_where('.'.join(names), origins)} {_tell(error, names)}"


def _where(path: str, origins: Mapping[str, str]) -> str:
    place = origins.get(path)
    return f" ({place})" if place else ""


def _tell(error: ErrorDetails, path: list[str]) -> str:
    if error["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
        return _tell_unknown(path)
    for pattern, telling in _TELLINGS:
        if re.fullmatch(pattern, error["type"]):
            return telling.format(**error.get("ctx", {}))
    return "is not valid"


def _tell_unknown(path: list[str]) -> str:
    *section, name = path
    if path == ["secrets", "vault", "token"]:
        return "must not stand in a file; give it to the server as VAULT_TOKEN in its environment"
    known = sections().get(tuple(section), [])
    near = get_close_matches(name, known, n=1)
    told = f"is unknown (known here: {', '.join(known)})" if known else "is unknown"
    if near:
        return f"{told}; did you mean '{near[0]}'?"
    return f"{told}; secrets never stand here" if _SECRET_NAME.search(name) else told
