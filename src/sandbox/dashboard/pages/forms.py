"""Where people show their token."""

from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.context import Context
from sandbox.api.middleware.authentication import visitor_of
from sandbox.dashboard.manifest_templates import PATTERNS, write_manifest
from sandbox.dashboard.templates import show


async def show_sign_in(request: Request, _: Context) -> Response:
    """The form; its module opens the session."""
    return show(request, "sign_in", back=own_address(request.query_params.get("to", "/")))


def own_address(asked: str) -> str:
    """Where to go on: an address of this server, whatever was asked for."""
    is_own = asked.startswith("/") and not asked.startswith(("//", "/\\")) and asked.isprintable()
    return asked if is_own else "/"


async def show_submit(request: Request, asked: Context) -> Response:
    """An editor with a pattern in it, or with the manifest of the task that is to run again."""
    again = request.query_params.get("from")
    task = await asked.tasks.status(again) if again else None
    sees_all = visitor_of(request).is_operator
    text = write_manifest(task.manifest, with_sources=sees_all) if task else PATTERNS[0].text
    return show(request, "submit", patterns=PATTERNS, text=text, again=task)
