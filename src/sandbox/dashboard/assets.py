"""What pages load, from the package and from nowhere else."""

import hashlib
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.context import Context

_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}


async def send_asset(request: Request, _: Context) -> Response:
    """One file; browsers keep it and ask whether it is still the same."""
    file = _files().get(request.path_params["name"])
    if file is None:
        raise HTTPException(404)
    content = file.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"etag": etag, "cache-control": "no-cache", "content-security-policy": "default-src 'none'"}
    if request.headers.get("if-none-match", "").removeprefix("W/") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_KINDS[file.suffix])


@cache
def _files() -> dict[str, Path]:
    """By name, so that nothing else can be asked for."""
    return {file.name: file for file in (Path(__file__).parent / "assets").iterdir() if file.suffix in _KINDS}
