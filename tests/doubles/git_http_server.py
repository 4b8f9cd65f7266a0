"""A smart-HTTP git server on loopback over `git http-backend`, with a user and password and bad days on request."""

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

    credentials: "user:password" that every request must bring (HTTP Basic).
    status: answer every request with this status instead of git's answer.
    redirect: answer requests with a redirect below this URL.
    requests: what was asked, "GET /path".
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.credentials: str | None = None
        self.status: int | None = None
        self.redirect: str | None = None
        self.requests: list[str] = []
        self._go_on = threading.Event()
        self._go_on.set()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.git = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        """Ends with a slash."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/"

    def stall(self) -> None:
        """Answer nothing from now on."""
        self._go_on.clear()

    def go_on(self) -> None:
        """Answer again."""
        self._go_on.set()

    def wait_to_go_on(self) -> None:
        """Used by the handler."""
        self._go_on.wait(60)

    @contextmanager
    def serving(self) -> "Iterator[GitHttpServer]":
        """Answer until the block ends."""
        self._thread.start()
        try:
            yield self
        finally:
            self._go_on.set()
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
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""

    def _answer(self, body: bytes) -> None:
        git = self.server.git
        git.requests.append(f"{self.command} {self.path}")
        git.wait_to_go_on()
        if git.redirect is not None:
            self._say(302, {"Location": git.redirect.rstrip("/") + self.path})
        elif git.status is not None:
            self._say(git.status, {})
        elif not self._is_let_in(git.credentials):
            self._say(401, {"WWW-Authenticate": 'Basic realm="git"'})
        else:
            self._run_git(git.root, body)

    def _is_let_in(self, credentials: str | None) -> bool:
        if credentials is None:
            return True
        wanted = "Basic " + base64.b64encode(credentials.encode()).decode()
        return self.headers.get("Authorization") == wanted

    def _say(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
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
        path = urlsplit(path).path  # of a proxy's requests
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
        answer = subprocess.run(
            ["git", "http-backend"], env=environment, input=body, capture_output=True, timeout=60, check=False
        ).stdout
        head, _, content = answer.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        status = int(headers.pop("Status", "200").split()[0])
        self._say(status, headers, content)
