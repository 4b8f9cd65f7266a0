"""A smart-HTTP git server on loopback over `git http-backend`, with optional credentials and failures."""

import base64
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class GitHttpServer:
    """Serves every repository below `root`.

    credentials: "user:password" that every request must contain (HTTP Basic).
    status: if set, the status of every response; git is not called. redirect: if set, every request is redirected
    below this URL. requests: the received requests, as "GET /path".
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.credentials: str | None = None
        self.status: int | None = None
        self.redirect: str | None = None
        self.requests: list[str] = []
        self._resumed = threading.Event()
        self._resumed.set()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.git = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        """The base URL, with a trailing slash."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/"

    def stall(self) -> None:
        """Stop responding."""
        self._resumed.clear()

    def resume(self) -> None:
        """Respond again."""
        self._resumed.set()

    def wait_until_resumed(self) -> None:
        """Wait in the handler while stalled."""
        self._resumed.wait(60)

    @contextmanager
    def serving(self) -> "Iterator[GitHttpServer]":
        """Serve until the block ends."""
        self._thread.start()
        try:
            yield self
        finally:
            self._resumed.set()
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    git: GitHttpServer


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        self._respond(b"")

    def do_POST(self) -> None:
        self._respond(self._body())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Do not log."""

    def _respond(self, body: bytes) -> None:
        git = self.server.git
        git.requests.append(f"{self.command} {self.path}")
        git.wait_until_resumed()
        if git.redirect is not None:
            self._send(302, {"Location": git.redirect.rstrip("/") + self.path})
        elif git.status is not None:
            self._send(git.status, {})
        elif not self._is_authorized(git.credentials):
            self._send(401, {"WWW-Authenticate": 'Basic realm="git"'})
        else:
            self._run_git(git.root, body)

    def _is_authorized(self, credentials: str | None) -> bool:
        if credentials is None:
            return True
        expected = "Basic " + base64.b64encode(credentials.encode()).decode()
        return self.headers.get("Authorization") == expected

    def _send(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self._chunks())
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _run_git(self, root: Path, body: bytes) -> None:
        path, _, query = self.path.partition("?")
        path = urlsplit(path).path  # absolute form in proxied requests
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "GIT_PROJECT_ROOT": str(root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "HTTP_GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REMOTE_ADDR": "127.0.0.1",
        }
        output = subprocess.run(
            ["git", "http-backend"], env=environment, input=body, capture_output=True, timeout=60, check=False
        ).stdout
        head, _, content = output.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        status = int(headers.pop("Status", "200").split()[0])
        self._send(status, headers, content)
