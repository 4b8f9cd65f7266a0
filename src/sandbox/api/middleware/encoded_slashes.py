"""Middleware that leaves encoded slashes in paths encoded."""

from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

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
