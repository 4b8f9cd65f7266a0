"""The page on which users sign in."""

from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.app_context import AppContext
from sandbox.dashboard.templates import render_page


async def show_sign_in(request: Request, _: AppContext) -> Response:
    """Render the sign-in form; its script opens the session."""
    return render_page(request, "sign_in", back=safe_redirect_path(request.query_params.get("to", "/")))


def safe_redirect_path(target: str) -> str:
    """Return `target` if it is a path on this server, else `/`."""
    is_local_path = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable()
    return target if is_local_path else "/"
