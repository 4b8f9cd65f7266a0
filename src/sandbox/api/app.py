"""The two ASGI apps: the REST API, and the stream on a port of its own."""

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, cast
from urllib.parse import unquote

from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from sandbox import __version__
from sandbox.api import paths
from sandbox.api.auth.authenticator import Guard
from sandbox.api.context import Context
from sandbox.api.errors import add_error_answers
from sandbox.api.middleware.authentication import Doorkeeper
from sandbox.api.middleware.metrics import Measured, ServerMetrics, note_api_route
from sandbox.api.middleware.response_headers import Envelope
from sandbox.api.openapi import describe
from sandbox.api.request_parameters import refuse_unknown_parameters
from sandbox.api.routes.admin import add_drain_routes, add_pruning_routes
from sandbox.api.routes.artifacts import add_artifact_routes
from sandbox.api.routes.docs import add_docs_routes
from sandbox.api.routes.health import add_health_routes, add_metrics_route
from sandbox.api.routes.logs import add_log_routes
from sandbox.api.routes.sessions import add_session_routes
from sandbox.api.routes.task_list import add_list_routes
from sandbox.api.routes.tasks import add_preserved_routes, add_task_routes
from sandbox.api.settings import ApiSettings
from sandbox.api.streaming.buffer import Tails
from sandbox.api.streaming.terminal import terminal
from sandbox.api.streaming.websocket import stream
from sandbox.interfaces.tasks import Tasks

_ARTIFACTS = b"/artifacts/"


class WholeSegments:
    """Lets everything behind it see such a slash as it was sent, but in an artifact's name, which has slashes.

    Routes are found by the decoded path, where the task `a%2Fvm` is the sandbox of the task `a`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        head, artifacts, name = (scope.get("raw_path") or b"").partition(_ARTIFACTS)
        if b"%2f" in head.lower():
            scope = {**scope, "path": _decoded(head) + unquote(artifacts + name)}
        await self._app(scope, receive, send)


def _decoded(path: bytes) -> str:
    return "/".join(unquote(part).replace("/", "%2F") for part in path.decode("latin-1").split("/"))


class _Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        return describe(self)


def create_app(tasks: Tasks, *, settings: ApiSettings, shutting_down: asyncio.Event, guard: Guard) -> FastAPI:
    """The REST API, and the stream under the same path as on its own port."""
    app = describe_api(settings.version)
    metrics = ServerMetrics(settings.version)
    _furnish(app, Context(tasks, settings, shutting_down, guard, metrics, Tails(tasks)))
    return app


def create_stream_app(app: FastAPI) -> Starlette:
    """The stream alone, of the same server as `app`."""
    stream_app = Starlette()
    _furnish(stream_app, app.state.context)
    return stream_app


def describe_api(version: str) -> FastAPI:
    """All addresses, with nothing behind them."""
    app = _Api(
        title="Sandbox",
        version=version,
        description="Runs coding agents as tasks that people can trust.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.router.routes.extend(_routes())
    return app


@cache
def _routes() -> tuple[BaseRoute, ...]:
    """Made once a process: they cost more than all else of an app, and know nothing of the one that they are on."""
    api = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(note_api_route), Depends(refuse_unknown_parameters)],
    )
    with _without_first_pydantic():
        add_list_routes(api)
        add_task_routes(api)
        add_preserved_routes(api)
        add_pruning_routes(api)
        add_log_routes(api)
        add_artifact_routes(api)
        add_health_routes(api)
        add_metrics_route(api)
        add_drain_routes(api)
        add_session_routes(api)
        add_docs_routes(api)
    return tuple(api.routes)


@contextmanager
def _without_first_pydantic() -> Iterator[None]:
    """FastAPI asks whether a type is of pydantic's first version, which takes 30 ms to import. None is."""
    name = "pydantic.v1"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = cast("ModuleType", None)
    try:
        yield
    finally:
        del sys.modules[name]


def _furnish(app: Starlette, context: Context) -> None:
    app.state.context = context
    app.router.routes.append(WebSocketRoute(paths.STREAM, stream))
    app.router.routes.append(WebSocketRoute(paths.TERMINAL, terminal))
    app.router.redirect_slashes = False
    app.router.default = _not_found
    add_error_answers(app)
    app.add_middleware(Doorkeeper, guard=context.guard)
    app.add_middleware(WholeSegments)
    app.add_middleware(Envelope)
    app.add_middleware(Measured, metrics=context.metrics)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Also for a WebSocket, whose handshake then gets the same answer as any request."""
    raise HTTPException(404)


def schema_text() -> str:
    """The schema as the server answers it, in a form whose changes are easy to read."""
    schema = describe_api(__version__).openapi()
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
