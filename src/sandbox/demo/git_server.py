"""Read-only git server over smart HTTP on loopback.

Start it with `python -m sandbox.demo.git_server --directory DIR`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sandbox.demo.loopback_http_service import HttpService, request_target
from sandbox.demo.walkthrough import git_environment

DEFAULT_PORT = 8130
"""The default port of the tutorial's git server."""

BACKEND_TIMEOUT_SECONDS = 60.0
_READ_PATHS = re.compile(r"(/[A-Za-z0-9_][A-Za-z0-9._-]*)+/(info/refs|git-upload-pack)")


def git_service(directory: Path, *, host: str = "127.0.0.1", port: int = 0) -> HttpService:
    """Create a service for cloning and fetching the bare repositories in `directory`."""
    root = directory.resolve()

    async def handle(request: Request) -> Response:
        path, _, query = request_target(request).partition("?")
        if not _READ_PATHS.fullmatch(path) or "git-receive-pack" in query:
            return PlainTextResponse("This server is read-only: repositories can only be cloned and fetched.\n", 403)
        return await git_response(root, path, query, request)

    return HttpService(host, port, handle)


async def git_response(root: Path, path: str, query: str, request: Request) -> Response:
    """Return the response of `git http-backend` for a repository under `root`.

    The caller decides which requests are allowed: `git http-backend` may also permit pushes.
    """
    headers, body = request.headers, await request.body()
    environment = git_environment() | {
        "GIT_PROJECT_ROOT": str(root),
        "GIT_HTTP_EXPORT_ALL": "1",
        "GIT_PROTOCOL": headers.get("git-protocol", ""),
        "REQUEST_METHOD": request.method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "CONTENT_TYPE": headers.get("content-type", ""),
        "CONTENT_LENGTH": str(len(body)),
        "HTTP_CONTENT_ENCODING": headers.get("content-encoding", ""),
    }
    try:
        return _parse_cgi(await _run_backend(environment, body))
    except (TimeoutError, ValueError):
        return PlainTextResponse("git http-backend returned no valid response.\n", 500)


async def _run_backend(environment: Mapping[str, str], body: bytes) -> bytes:
    process = await asyncio.create_subprocess_exec(
        *("git", "-c", "safe.directory=*", "http-backend"),
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(body), BACKEND_TIMEOUT_SECONDS)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return output


def _parse_cgi(output: bytes) -> Response:
    """Convert a CGI response. Raises ValueError if the output is not a CGI response."""
    head, separator, body = output.partition(b"\r\n\r\n")
    if not separator:
        raise ValueError("the CGI response has no header")
    fields = [line.split(": ", 1) for line in head.decode("latin-1").split("\r\n")]
    headers = {name: value for name, value in fields if name != "Status"}
    status = next((value for name, value in fields if name == "Status"), "200")
    return Response(body, int(status.split()[0]), headers)


def main() -> None:
    """Serve until SIGTERM or SIGINT; print the URL as one JSON line."""
    parser = argparse.ArgumentParser(description="Serve bare git repositories, read-only.")
    parser.add_argument("--directory", type=Path, required=True, help="directory with the repositories")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 means any free port")
    options = parser.parse_args()
    asyncio.run(git_service(options.directory, host=options.host, port=options.port).serve_until_signalled())


if __name__ == "__main__":
    main()
