"""A small HTTP server with the part of Vault's KV version 2 API that Sandbox uses."""

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hvs.the-token-of-the-server"


class FakeVault(ThreadingHTTPServer):
    """A fake Vault.

    secrets: the fields of each secret, keyed by its path in the mount. denied: paths that get a 403. status: if set,
    the status of every response.
    """

    daemon_threads = True

    def __init__(self, mount: str = "secret") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mount = mount
        self.secrets: dict[str, dict[str, Any]] = {}
        self.denied: set[str] = set()
        self.status: int | None = None
        self.location = ""
        self.body: bytes | None = None
        self.delay_seconds = 0.0
        self.requests: list[tuple[str, str | None]] = []
        self.scheme = "http"

    @property
    def address(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that abort because they reject the certificate."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeVault

    def do_GET(self) -> None:
        vault = self.server
        vault.requests.append((self.path, self.headers.get("X-Vault-Namespace")))
        time.sleep(vault.delay_seconds)
        prefix = f"/v1/{vault.mount}/data/"
        path = self.path.removeprefix(prefix)
        if vault.status is not None:
            self._respond(vault.status, {"errors": ["configured status"]})
        elif self.headers.get("X-Vault-Token") != TOKEN or path in vault.denied:
            self._respond(403, {"errors": ["permission denied"]})
        elif not self.path.startswith(prefix) or path not in vault.secrets:
            self._respond(404, {"errors": []})
        else:
            metadata = {"version": 1, "deletion_time": "", "destroyed": False}
            self._respond(200, {"data": {"data": vault.secrets[path], "metadata": metadata}})

    def _respond(self, status: int, content: dict[str, Any]) -> None:
        body = self.server.body if self.server.body is not None else json.dumps(content).encode()
        self.send_response(status)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Do not log."""


@contextlib.contextmanager
def serving(vault: FakeVault, tls: ssl.SSLContext | None = None) -> Iterator[FakeVault]:
    if tls is not None:
        vault.socket = tls.wrap_socket(vault.socket, server_side=True, do_handshake_on_connect=False)
        vault.scheme = "https"
    thread = threading.Thread(target=vault.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield vault
    finally:
        vault.shutdown()
        vault.server_close()
        thread.join(5)
