"""JSON answers."""

from typing import Any

import msgspec
from starlette.responses import Response


class Json(Response):
    """Any value that msgspec can write, with a newline at the end for people at terminals."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The value as UTF-8 JSON."""
        return msgspec.json.encode(content) + b"\n"
