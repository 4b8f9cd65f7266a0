"""Query parameters that an address does not have, or that are given twice: told, because a filter with a typo would
silently filter nothing, and of two values one would silently go."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection

from sandbox.api.errors import InvalidParameterError

NAME_SHOWN_LENGTH_MAX = 64


async def refuse_unknown_parameters(connection: HTTPConnection) -> None:
    """Holds a request against the schema of its route. Raises InvalidParameterError."""
    if not connection.query_params:
        return
    app, route = connection.app, connection.scope["route"]
    assert isinstance(app, FastAPI)
    operation = app.openapi()["paths"].get(route.path_format, {}).get(connection.scope["method"].lower(), {})
    told = [parameter for parameter in operation.get("parameters", ()) if parameter["in"] == "query"]
    refuse_unknown(
        connection.query_params,
        known=[parameter["name"] for parameter in told if "patternProperties" not in parameter["schema"]],
        patterns=[pattern for parameter in told for pattern in _patterns(parameter)],
    )


def refuse_repeated(given: QueryParams, known: Collection[str]) -> None:
    """Raises InvalidParameterError for the first of the known names that is given twice."""
    for name in given:
        if name in known and len(given.getlist(name)) > 1:
            raise InvalidParameterError(name, "is there more than once; give it once")


def refuse_unknown(given: QueryParams, *, known: Collection[str], patterns: Collection[str] = ()) -> None:
    """Raises InvalidParameterError for the first name that is not known and fits no pattern, or is given twice."""
    refuse_repeated(given, known)
    for name in given:
        if name not in known and not any(re.search(pattern, name) for pattern in patterns):
            raise InvalidParameterError(
                name[:NAME_SHOWN_LENGTH_MAX], _advice(name, known, patterns), rule="unknown_field"
            )


def _patterns(parameter: dict[str, Any]) -> list[str]:
    return list(parameter["schema"].get("patternProperties", {}))


def _advice(name: str, known: Collection[str], patterns: Collection[str]) -> str:
    if not known:
        return "is not known; this address takes no parameters"
    close = get_close_matches(name[:NAME_SHOWN_LENGTH_MAX], known, n=1)
    meant = f", perhaps {close[0]} was meant" if close else ""
    families = [pattern.strip("^").replace("\\", "") + "*" for pattern in patterns]
    return f"is not known{meant}; this address takes {', '.join(sorted([*known, *families]))}"
