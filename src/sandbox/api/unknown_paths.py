"""Messages about requests that match no endpoint: the right request or a similar path, and the allowed methods."""

import re
from collections.abc import Collection, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from fastapi import FastAPI
from starlette.requests import HTTPConnection
from starlette.routing import Route, WebSocketRoute

from sandbox.api import paths
from sandbox.model.input_errors import closest_name, with_suggestion

_PATH_LENGTH_MAX = 256
_CANCEL_PATH = re.compile(rf"({re.escape(paths.TASKS)}/[A-Za-z0-9._-]{{1,128}})/(?:cancel|stop|abort|kill)/?")
_TASK_RESOURCE_PATH = re.compile(rf"{re.escape(paths.TASKS)}/([A-Za-z0-9._-]{{1,128}})/([a-z_-]+)/?")
_RESOURCES_BY_OTHER_NAME = {
    **dict.fromkeys(("patch", "diff", "changes"), "artifacts/{task_id}.patch"),
    **dict.fromkeys(("retry", "restart", "resubmit"), "rerun"),
    **dict.fromkeys(("events", "output"), "logs"),
    "resume": "continue",
    "release": "vm",
}
"""Maps names that other systems use for a task's resources to the names used here."""

_SIMILARITY_MIN = 0.75
"""Minimum similarity of the last segments of two similar paths, from 0 to 1."""

_NO_ENDPOINT = "No such endpoint; /openapi.json lists all endpoints."


def not_found_message(connection: HTTPConnection) -> str:
    """Return the message of a 404: it names the right request or a similar path, if there is one."""
    routes, path = connection.app.routes, connection.scope["path"]
    if any(isinstance(route, WebSocketRoute) and route.path_regex.match(path) for route in routes):
        return "This is a WebSocket endpoint; connect with ws:// (wss:// behind TLS)."
    if isinstance(connection.app, FastAPI):
        if cancelled := _CANCEL_PATH.fullmatch(path):
            return f"No such endpoint; cancel with DELETE {cancelled[1]}."
        suggestion = _closest_path(routes, path) if path.isprintable() and len(path) <= _PATH_LENGTH_MAX else None
        return with_suggestion("No such endpoint", suggestion) if suggestion else _NO_ENDPOINT
    return f"No such endpoint; this port serves the WebSockets {paths.STREAM} and {paths.TERMINAL}."


def _closest_path(routes: Sequence[Any], path: str) -> str | None:
    """Return a similar path that exists: without trailing slashes, under the same task, or without parameters.

    Administrative endpoints are never suggested, because they may delete the tasks of other users.
    """
    endpoints = [route for route in routes if isinstance(route, Route)]
    without_slash = path.rstrip("/")
    if without_slash != path and any(route.path_regex.match(without_slash) for route in endpoints):
        return without_slash
    if resource := _TASK_RESOURCE_PATH.fullmatch(path):
        task_id, name = resource.groups()
        similar = closest_name(name, set(_similar_names(name, _task_resources(endpoints))))
        found = _RESOURCES_BY_OTHER_NAME.get(name) or similar
        return f"{paths.TASKS}/{task_id}/{found.format(task_id=task_id)}" if found else None
    known = {route.path for route in endpoints if not route.param_convertors and "/admin/" not in route.path}
    return closest_name(path, set(_similar_names(path, known)))


def _task_resources(endpoints: Sequence[Route]) -> set[str]:
    """Return the names of the endpoints under a task, such as `logs`."""
    names = {route.path.removeprefix(f"{paths.TASK}/") for route in endpoints if route.path != paths.TASK}
    return {name for name in names if "/" not in name}


def _similar_names(name: str, known: Collection[str]) -> Iterator[str]:
    """Yield the known names whose last segment is similar to the last segment of this name."""
    last = name.rpartition("/")[2]
    for each in known:
        if SequenceMatcher(None, last, each.rpartition("/")[2]).ratio() >= _SIMILARITY_MIN:
            yield each


def allowed_methods(routes: Sequence[Any], path: str) -> list[str]:
    """Return the methods of all routes that match this path."""
    methods: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.path_regex.match(path):
            methods |= route.methods or set()
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)
