"""script/audit reports known vulnerabilities, and never reports success if it could not check for them."""

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class FakeAdvisoryService(HTTPServer):
    """Responds to each batch of queries with the result of `respond`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.queries: list[dict] = []
        self.respond: Callable[[dict], dict] = lambda _: {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeAdvisoryService

    def do_POST(self) -> None:
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        self.server.queries += queries
        body = json.dumps({"results": [self.server.respond(query) for query in queries]}).encode()
        self.send_response(200 if self.path == "/v1/querybatch" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[FakeAdvisoryService]:
    with FakeAdvisoryService() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def audit(url: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "OSV_URL": url}
    command = [str(ROOT / "script" / "audit")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_every_pinned_package_is_queried(service: FakeAdvisoryService):
    audited = audit(service.url)
    assert (audited.returncode, audited.stderr) == (0, "")
    queried = {(query["package"]["ecosystem"], query["package"]["name"]) for query in service.queries}
    assert {("PyPI", "fastapi"), ("PyPI", "pytest"), ("npm", "wscat"), ("npm", "@biomejs/biome")} <= queried
    assert f"0 of {len(service.queries)} packages are vulnerable" in audited.stdout


def test_vulnerable_package_is_reported(service: FakeAdvisoryService):
    vulnerable = {"vulns": [{"id": "GHSA-1"}, {"id": "PYSEC-2"}]}
    service.respond = lambda query: vulnerable if query["package"]["name"] == "jinja2" else {}
    audited = audit(service.url)
    assert audited.returncode == 1
    [line] = [line for line in audited.stdout.splitlines() if line.startswith("vulnerable: ")]
    assert line.startswith("vulnerable: PyPI jinja2 ")
    assert line.endswith(": GHSA-1, PYSEC-2")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "/other"], ids=["no service", "another service"])
def test_unreachable_service_is_reported_as_not_checked(service: FakeAdvisoryService, url: str):
    audited = audit(url if url.startswith("http") else service.url + url)
    assert audited.returncode == 3
    assert "not checked: " in audited.stdout
    assert "vulnerable" not in audited.stdout
