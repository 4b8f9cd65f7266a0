"""A small HTTP server that returns canned API responses and records the requests."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PREFIX = "/api/v1"


@dataclass(frozen=True)
class ApiRequest:
    """A received request."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class ApiResponse:
    """A response; `chunks` are sent individually, then the connection is closed."""

    status: int = 200
    chunks: Iterable[bytes] = ()
    headers: dict[str, str] = field(default_factory=dict)


def json_response(body: Any, status: int = 200) -> ApiResponse:
    return ApiResponse(status, [json.dumps(body).encode()], {"Content-Type": "application/json"})


def error_response(status: int, code: str, message: str, details: Any = None) -> ApiResponse:
    return json_response({"error": code, "message": message, "details": details}, status)


def sse_response(events: Iterable[dict[str, Any]]) -> ApiResponse:
    chunks = (f"id: {f['seq']}\nevent: {f['type']}\ndata: {json.dumps(f, ensure_ascii=False)}\n\n" for f in events)
    return ApiResponse(200, map(str.encode, chunks), {"Content-Type": "text/event-stream"})


class FakeApi:
    """Sends `responses[method, path]` in order, and then repeats the last response. Unknown paths get a 404."""

    def __init__(self, port: int = 0) -> None:
        self.responses: dict[tuple[str, str], list[ApiResponse | Callable[[ApiRequest], ApiResponse]]] = {}
        self.requests: list[ApiRequest] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # clients of WebSockets accept no other version

            def _handle(self) -> None:
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {key.lower(): value for key, value in self.headers.items()}
                request = ApiRequest(
                    self.command, parts.path.removeprefix(PREFIX), parse_qs(parts.query), headers, body
                )
                api.requests.append(request)
                self._send(api._next(request))

            def _send(self, response: ApiResponse) -> None:
                try:
                    self.send_response(response.status)
                    for key, value in response.headers.items():
                        self.send_header(key, value)
                    self.send_header("Connection", "close")
                    self.end_headers()
                    for chunk in response.chunks:
                        self.wfile.write(chunk)
                        self.wfile.flush()
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has disconnected

            def log_message(self, *_: Any) -> None:
                pass

            do_GET = do_POST = do_DELETE = _handle  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def on(self, method: str, path: str, *responses: ApiResponse | Callable[[ApiRequest], ApiResponse]) -> None:
        self.responses[method, path] = list(responses)

    def requests_to(self, method: str, path: str) -> list[ApiRequest]:
        """Return the requests for one path."""
        return [request for request in self.requests if (request.method, request.path) == (method, path)]

    def _next(self, request: ApiRequest) -> ApiResponse:
        responses = self.responses.get((request.method, request.path))
        if not responses:
            return error_response(404, "task_not_found", "There is no such task.")
        response = responses.pop(0) if len(responses) > 1 else responses[0]
        return response(request) if callable(response) else response

    @contextmanager
    def running(self) -> Iterator["FakeApi"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join(5)
