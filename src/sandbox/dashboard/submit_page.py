"""The form that hands in a manifest."""

from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.context import Context
from sandbox.api.doorkeeper import visitor_of
from sandbox.dashboard.manifest_text import write_manifest
from sandbox.dashboard.patterns import PATTERNS
from sandbox.dashboard.templates import show


async def show_submit(request: Request, asked: Context) -> Response:
    """An editor with a pattern in it, or with the manifest of the task that is to run again."""
    again = request.query_params.get("from")
    task = await asked.tasks.status(again) if again else None
    sees_all = visitor_of(request).is_operator
    text = write_manifest(task.manifest, with_sources=sees_all) if task else PATTERNS[0].text
    return show(request, "submit", patterns=PATTERNS, text=text, again=task)
