"""Where people show their token."""

from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.context import Context
from sandbox.dashboard.templates import show


async def show_sign_in(request: Request, _: Context) -> Response:
    """The form; its module opens the session."""
    return show(request, "sign_in", back=own_address(request.query_params.get("to", "/")))


def own_address(asked: str) -> str:
    """Where to go on: an address of this server, whatever was asked for."""
    is_own = asked.startswith("/") and not asked.startswith(("//", "/\\")) and asked.isprintable()
    return asked if is_own else "/"
