"""Maps URLs to the pages and static files of the dashboard; serves the sign-in page and the error page."""

import hashlib
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sandbox.api import paths
from sandbox.api.app_context import AppContext
from sandbox.api.errors import status_of
from sandbox.api.observability import set_route
from sandbox.api.request_parsing import accepts_html
from sandbox.api.responses import reason_phrase
from sandbox.dashboard.pages.documentation import show_docs, show_errors, show_guide, show_guide_search
from sandbox.dashboard.pages.server import send_load, show_hosts, show_server
from sandbox.dashboard.pages.submit_form import show_submit
from sandbox.dashboard.pages.task import send_events, send_results_bundle, show_task
from sandbox.dashboard.pages.task_list import show_tasks
from sandbox.dashboard.templates import render_page
from sandbox.model.errors import SandboxError
from sandbox.primitives.log_context import TASK_ID


async def show_sign_in(request: Request, _: AppContext) -> Response:
    """Render the sign-in form; its script opens the session."""
    return render_page(request, "sign_in", back=safe_redirect_path(request.query_params.get("to", "/")))


def safe_redirect_path(target: str) -> str:
    """Return `target` if it is a path on this server, else `/`."""
    is_local_path = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable()
    return target if is_local_path else "/"


_ASSET_SECURITY_POLICY = "default-src 'none'; script-src 'self'"
"""The policy that applies to a web worker, which can import the server's scripts but has no network access."""

_ASSET_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}


async def send_asset(request: Request, _: AppContext) -> Response:
    """Send a static file; browsers cache it and revalidate by ETag."""
    asset = _load_assets().get(request.path_params["name"])
    if asset is None:
        raise HTTPException(404)
    headers = {"etag": asset.etag, "cache-control": "no-cache", "content-security-policy": _ASSET_SECURITY_POLICY}
    if request.headers.get("if-none-match", "").removeprefix("W/") == asset.etag:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers=headers, media_type=asset.media_type)


class _Asset(NamedTuple):
    content: bytes
    media_type: str
    etag: str


@cache
def _load_assets() -> dict[str, _Asset]:
    """Return the assets by name; no other file can be requested.

    All responses share the content. Otherwise, clients that do not read a response would use memory for each request.
    """
    return {
        file.name: _read_asset(file, _ASSET_MEDIA_TYPES[file.suffix])
        for file in (Path(__file__).parent / "assets").iterdir()
        if file.suffix in _ASSET_MEDIA_TYPES
    }


def _read_asset(file: Path, media_type: str) -> _Asset:
    content = file.read_bytes()
    return _Asset(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


_API_ROOT = "/api/"
_PageHandler = Callable[[Request, AppContext], Awaitable[Response]]

_ROUTES: dict[str, _PageHandler] = {
    "/": show_tasks,
    "/submit": show_submit,
    "/server": show_server,
    "/server/load": send_load,
    "/hosts": show_hosts,
    "/errors": show_errors,
    "/guide": show_guide,
    "/guide/search": show_guide_search,
    "/guide/{name}": show_guide,
    "/tasks/{task_id}": show_task,
    "/tasks/{task_id}/story": send_events,
    "/tasks/{task_id}/proof": send_results_bundle,
    paths.SIGN_IN: show_sign_in,
    f"{paths.ASSETS}{{name}}": send_asset,
}


def add_dashboard(app: FastAPI, context: AppContext) -> None:
    """Register the pages. They are not part of the API's schema."""
    for path, handler in _ROUTES.items():
        app.router.routes.append(Route(path, _endpoint(path, handler, context)))
    # The API also has a page at this path, without the site's frame. The first route takes precedence.
    app.router.routes.insert(0, Route(paths.DOCS, _endpoint(paths.DOCS, show_docs, context)))
    app.router.default = _show_missing_pages(app.router.default)


def _endpoint(path: str, handler: _PageHandler, context: AppContext) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        set_route(request, path)
        if (task_id := request.path_params.get("task_id")) is not None:
            TASK_ID.set(task_id)
        try:
            return await handler(request, context)
        except SandboxError as error:
            if not accepts_html(request):
                raise
            return _error_page(request, status_of(error), error.message)
        except HTTPException as error:
            if not accepts_html(request):
                raise
            return _error_page(request, error.status_code, "There is no page at this address.")

    return handle


def _show_missing_pages(default: ASGIApp) -> ASGIApp:
    """Return an app that shows browsers an error page for unknown paths, except for the API's paths."""

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith(_API_ROOT) and accepts_html(Request(scope)):
            response = _error_page(Request(scope), 404, "There is no page at this address.")
            await response(scope, receive, send)
        else:
            await default(scope, receive, send)

    return handle


def _error_page(request: Request, status: int, message: str) -> Response:
    return render_page(request, "error", status, title=reason_phrase(status), code=status, message=message)
