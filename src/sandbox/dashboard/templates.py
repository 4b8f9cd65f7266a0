"""Pages out of templates. The library that makes them is loaded with the first page."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import HTMLResponse

from sandbox.api.doorkeeper import visitor_of
from sandbox.dashboard import spoken
from sandbox.model.frame import timestamp

if TYPE_CHECKING:
    from jinja2 import Environment

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "vary": "accept",
}
"""Of every page. What agents say is text: no script, style or frame but the server's own runs, whatever slips in."""


def show(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page made of the template of this name."""
    visitor = visitor_of(request)
    text = _environment().get_template(f"{template}.html")
    common = {
        "page": template,
        "version": request.app.state.context.settings.version,
        "who": visitor.principal,
        "may_change": visitor.is_operator,
        "has_session": visitor.proof is not None,
    }
    return HTMLResponse(text.render(common | values), status, HEADERS)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {
        "size": spoken.size,
        "span": spoken.span,
        "money": spoken.money,
        "count": spoken.count,
        "stamp": timestamp,
        "state": spoken.state,
        "shade": spoken.shade,
        "segment": spoken.segment,
        "as_name": spoken.name,
        "as_prose": spoken.prose,
    }
    return made
