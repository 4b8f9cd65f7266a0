"""Query parameters that an address does not have, or that are given twice: told, because a filter with a typo would
silently filter nothing, and of two values one would silently go."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches

from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection

from sandbox.api.errors import InvalidParameterError

NAME_SHOWN_LENGTH_MAX = 64


async def refuse_unknown_parameters(connection: HTTPConnection) -> None:
    """Holds a request against what its route takes. Raises InvalidParameterError."""
    if not connection.query_params:
        return
    route = connection.scope["route"]
    assert isinstance(route, APIRoute)
    refuse_unknown(connection.query_params, known=_read_by_name(route), patterns=_read_by_pattern(route))


def _read_by_name(route: APIRoute) -> list[str]:
    """Asked of the route, for the schema of all addresses takes a tenth of a second to make."""
    return [field.alias for field in get_flat_params(route.dependant) if field.alias not in route.param_convertors]


def _read_by_pattern(route: APIRoute) -> list[str]:
    """Of what the route reads by itself: a header has no such pattern."""
    told = (route.openapi_extra or {}).get("parameters", ())
    return [pattern for parameter in told for pattern in parameter["schema"].get("patternProperties", {})]


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


def _advice(name: str, known: Collection[str], patterns: Collection[str]) -> str:
    if not known:
        return "is not known; this address takes no parameters"
    close = get_close_matches(name[:NAME_SHOWN_LENGTH_MAX], known, n=1)
    meant = f", perhaps {close[0]} was meant" if close else ""
    families = [pattern.strip("^").replace("\\", "") + "*" for pattern in patterns]
    return f"is not known{meant}; this address takes {', '.join(sorted([*known, *families]))}"
