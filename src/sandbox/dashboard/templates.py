"""Renders pages from Jinja templates. Jinja is imported on first use."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import HTMLResponse

from sandbox.api.authentication import get_caller
from sandbox.model.display_text import (
    format_cost,
    format_count,
    format_duration,
    format_size,
    format_state,
    format_timestamp,
    replace_invisible,
    replace_unprintable,
)
from sandbox.model.repository_urls import public_repository_url, short_repository
from sandbox.model.task import Task
from sandbox.model.task_names_and_ids import branch_name
from sandbox.model.task_state import TaskState

if TYPE_CHECKING:
    from jinja2 import Environment

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "vary": "accept",
}
"""Headers of every page.

Even if an agent's text is not escaped, the Content Security Policy blocks all scripts, styles and frames except the
server's.
"""


def render_page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Render the template with this name."""
    caller = get_caller(request)
    text = _environment().get_template(f"{template}.html")
    common = {
        "page": template,
        "version": request.app.state.context.settings.version,
        "principal": caller.principal,
        "may_change": caller.is_operator,
        "has_session": caller.credentials is not None,
        "duration_definition": _DURATION_DEFINITION,
    }
    return HTMLResponse(text.render(common | values), status, HEADERS)


_DURATION_DEFINITION = "From the first start of the agent to the end of the task, without waiting and cloning"
"""Explains "Duration", which means `Task.duration_seconds` on every page."""


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {
        "size": format_size,
        "duration": lambda duration: format_duration(duration.total_seconds()),
        "money": format_cost,
        "count": format_count,
        "timestamp": format_timestamp,
        "state": state_label,
        "state_class": state_class,
        "segment": quote_segment,
        "as_name": escape_name,
        "activity": current_activity,
        "branch_name": lambda task: branch_name(task.id, task.manifest.metadata.name),
        "as_prose": escape_text,
        "state_sign": state_sign,
        "public_url": public_repository_url,
        "seconds": format_duration,
        "short_repository": short_repository,
        "short_id": short_id,
    }
    return environment


def current_activity(task: Task) -> str:
    """Return the running tool and the subject of its call, or what the agent waits for, as shown on the task's page."""
    progress = task.progress
    return escape_name(" ".join(part for part in (progress.current_tool, progress.current_subject) if part))


_STATE_CLASSES = {
    TaskState.PENDING: "waits",
    TaskState.STAGING: "begins",
    TaskState.PROVISIONING: "begins",
    TaskState.READY: "begins",
    TaskState.RUNNING: "works",
    TaskState.COMPLETING: "works",
    TaskState.COMPLETED: "done",
    TaskState.FAILED: "failed",
    TaskState.FAILED_PRESERVED: "failed",
    TaskState.CANCELLED: "ended",
}


def state_label(value: TaskState, is_preserved: bool = True) -> str:
    """Return the label of a state. is_preserved: the sandbox of a failed task is still preserved."""
    return format_state(value, is_preserved=is_preserved)


def state_class(value: TaskState) -> str:
    """Return the CSS class of a state."""
    return _STATE_CLASSES[value]


def state_sign(value: TaskState) -> str:
    """Return a character for a state, for the titles of browser tabs."""
    return _STATE_SIGNS[state_class(value)]


_STATE_SIGNS = {"waits": "…", "begins": "▶", "works": "▶", "done": "✓", "failed": "✗", "ended": "■"}


def escape_name(text: str) -> str:
    """Escape all unprintable characters in an untrusted name."""
    return replace_unprintable(text, _code_point)


def escape_text(text: str) -> str:
    """Escape invisible characters in untrusted text; tabs and newlines are kept."""
    return replace_invisible(text, _code_point, "\t\n")


def _code_point(character: str) -> str:
    return f"‹U+{ord(character):04X}›"


def short_id(task_id: str) -> str:
    """Return a task's id, or only the beginning of a long id such as a UUID."""
    return task_id if len(task_id) <= _ID_LENGTH_MAX else task_id[:8]


_ID_LENGTH_MAX = 20


def quote_segment(text: str) -> str:
    """Quote text as one segment of a URL path."""
    return quote(text, safe="")
