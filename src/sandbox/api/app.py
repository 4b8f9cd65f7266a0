"""The two ASGI apps: the REST API, and the event stream on a separate port.

Routing keeps the slashes that are encoded in a path encoded, except in an artifact's name.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from sandbox.api import paths
from sandbox.api.app_context import AppContext
from sandbox.api.authentication import AuthenticationMiddleware
from sandbox.api.errors import add_error_handlers
from sandbox.api.observability import AccessLogAndMetricsMiddleware
from sandbox.api.openapi import DESCRIPTION, build_schema
from sandbox.api.responses import ResponseHeadersMiddleware
from sandbox.api.routes import artifacts, live_events, logs, openapi, server, submission, tasks
from sandbox.api.routes.live_events import serve_event_stream
from sandbox.api.routes.terminal_websocket import serve_terminal
from sandbox.interfaces.agent import Agent

_ARTIFACTS_SEGMENT = b"/artifacts/"


class EncodedSlashMiddleware:
    """Leaves `%2F` encoded in the path for routing, except in an artifact's name, which may contain slashes.

    Routes match the decoded path. Without this, the task id `a%2Fvm` would address the sandbox of the task `a`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Re-decode the path if needed and call the app."""
        head, artifacts, name = (scope.get("raw_path") or b"").partition(_ARTIFACTS_SEGMENT)
        if b"%2f" in head.lower():
            scope = {**scope, "path": _decode_segments(head) + unquote(artifacts + name)}
        await self._app(scope, receive, send)


def _decode_segments(path: bytes) -> str:
    return "/".join(unquote(part).replace("/", "%2F") for part in path.decode("latin-1").split("/"))


_ROUTERS = (
    tasks.router,
    submission.router,
    tasks.task_router,
    submission.derived_task_router,
    logs.router,
    live_events.router,
    artifacts.router,
    server.health_router,
    server.admin_router,
    server.session_router,
    openapi.router,
)
"""All routes of the REST API, in documentation order. Building them is slow, so all apps share them."""


class _Api(FastAPI):
    def __init__(self, agents: Mapping[str, Agent], examples: Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._agents = agents
        self._examples = examples

    def openapi(self) -> dict[str, Any]:
        return build_schema(self, self._agents, self._examples)


def create_app(context: AppContext) -> FastAPI:
    """Create the REST API app, which also serves the event stream.

    The path of the event stream is the same as on the separate WebSocket port.
    """
    app = create_api_schema_app(context.settings.version, context.settings.agents)
    _configure(app, context)
    return app


def create_websocket_app(context: AppContext) -> Starlette:
    """Create the app of the event stream. It shares the context of the REST API."""
    websocket_app = Starlette()
    _configure(websocket_app, context)
    return websocket_app


def create_api_schema_app(
    version: str, agents: Mapping[str, Agent], examples: Mapping[str, Any] | None = None
) -> FastAPI:
    """Create an app with all routes and no context. examples: by default, the recorded examples."""
    app = _Api(
        agents,
        examples,
        title="Sandbox",
        version=version,
        description=DESCRIPTION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    for router in _ROUTERS:
        app.router.routes.extend(router.routes)
    return app


def _configure(app: Starlette, context: AppContext) -> None:
    app.state.context = context
    app.router.routes.append(WebSocketRoute(paths.STREAM, serve_event_stream))
    app.router.routes.append(WebSocketRoute(paths.TERMINAL, serve_terminal))
    app.router.redirect_slashes = False
    app.router.default = _not_found
    add_error_handlers(app)
    app.add_middleware(AuthenticationMiddleware, admission=context.admission)
    app.add_middleware(EncodedSlashMiddleware)
    app.add_middleware(ResponseHeadersMiddleware)
    app.add_middleware(AccessLogAndMetricsMiddleware, metrics=context.metrics)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Raise 404. By default, Starlette closes an unmatched WebSocket without this error response."""
    raise HTTPException(404)
