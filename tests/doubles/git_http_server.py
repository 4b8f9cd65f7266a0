"""A smart-HTTP git server on loopback, backed by `git http-backend`, with optional credentials and failures."""

import asyncio
import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from anyio.from_thread import start_blocking_portal
from starlette.requests import Request
from starlette.responses import Response

from sandbox.demo.git_server import git_response
from sandbox.demo.loopback_http_service import HttpService, request_target


class GitHttpServer:
    """Serves every repository under `root`, from a separate thread.

    url: the base URL, with a trailing slash, while it is serving.
    credentials: "user:password" that every request must contain (HTTP Basic).
    status: if set, the status of every response; git is not called.
    redirect: if set, every request is redirected to a path below this URL.
    requests: the received requests, as "GET /path".
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.credentials: str | None = None
        self.status: int | None = None
        self.redirect: str | None = None
        self.requests: list[str] = []
        self._resumed = threading.Event()
        self._resumed.set()

    def stall(self) -> None:
        """Stop responding."""
        self._resumed.clear()

    def resume(self) -> None:
        """Respond again."""
        self._resumed.set()

    @contextmanager
    def serving(self) -> "Iterator[GitHttpServer]":
        """Serve until the block ends."""
        service = HttpService("127.0.0.1", 0, self._respond)
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(service):
            self.url = f"{service.url}/"
            try:
                yield self
            finally:
                self._resumed.set()

    async def _respond(self, request: Request) -> Response:
        target = request_target(request)
        self.requests.append(f"{request.method} {target}")
        await asyncio.to_thread(self._resumed.wait, 60)
        if self.redirect is not None:
            return Response(status_code=302, headers={"Location": self.redirect.rstrip("/") + target})
        if self.status is not None:
            return Response(status_code=self.status)
        if not self._is_authorized(request):
            return Response(status_code=401, headers={"WWW-Authenticate": 'Basic realm="git"'})
        url = urlsplit(target)  # absolute form in proxied requests
        return await git_response(self.root, url.path, url.query, request)

    def _is_authorized(self, request: Request) -> bool:
        if self.credentials is None:
            return True
        expected = "Basic " + base64.b64encode(self.credentials.encode()).decode()
        return request.headers.get("Authorization") == expected
