"""The pages about the server: the API and error references, the hosts, and health, load and runtimes."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sandbox.api.app_context import AppContext
from sandbox.api.request_parsing import check_format
from sandbox.api.routes.health import not_ready_reasons
from sandbox.dashboard.pages.documentation import HeadingAnchors, guide_file, guide_path, guide_values
from sandbox.dashboard.templates import CONTENT_SECURITY_POLICY, render_page
from sandbox.interfaces.placement import HostState
from sandbox.interfaces.store import TaskQuery
from sandbox.interfaces.tasks import Health, LoadSample, TaskQueries
from sandbox.model.fixed_limits import LOAD_SAMPLE_INTERVAL_SECONDS
from sandbox.model.manifest.field_formats import pattern_format
from sandbox.model.task import Task
from sandbox.model.task_state import FINAL_STATES, TaskState
from sandbox.primitives import client_fairness

_HOURS = 24
STATS_TASKS_MAX = 1000
TASK_LINKS_MAX = 5
"""Maximum number of links to the tasks of a host."""

_MILLISECONDS = pattern_format("milliseconds", "[0-9]{1,15}", "must be a time in milliseconds since 1970")
_DOCS_SECURITY_POLICY = CONTENT_SECURITY_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
"""Allows the style attributes that Swagger UI sets. Its page shows the schema, but no text written by an agent."""


@dataclass(frozen=True, slots=True)
class HourStats:
    """Tasks that ended within one hour. percent_of_busiest: their number as a percentage of the busiest hour's."""

    starts_at: datetime
    completed_count: int
    other_count: int
    percent_of_busiest: int


async def show_server(request: Request, context: AppContext) -> Response:
    """Render the server page."""
    async with client_fairness.thread_slot():
        return await _render_server(request, context)


async def _render_server(request: Request, context: AppContext) -> Response:
    health = await context.services.administration.health()
    ended, is_cut = await _finished_tasks(context.services.tasks)
    hours = _hourly_stats(ended, datetime.now(UTC))
    completed = [task for task in ended if task.state is TaskState.COMPLETED]
    hosts = context.services.hosts.list_hosts() if context.services.hosts.has_cluster else None
    cancelled_count = sum(task.state is TaskState.CANCELLED for task in ended)
    return await client_fairness.to_thread(
        render_page,
        request,
        "server",
        health=health,
        reasons=not_ready_reasons(health, context),
        uptime=timedelta(seconds=health.uptime_seconds),
        running=_running_count(health),
        hosts=hosts,
        unreachable_hosts_count=sum(host.status.state is HostState.UNREACHABLE for host in hosts or ()),
        hours=hours,
        busiest=max(hour.completed_count + hour.other_count for hour in hours),
        ended_count=len(ended),
        is_cut=is_cut,
        completed_count=len(completed),
        cancelled_count=cancelled_count,
        failed_count=len(ended) - len(completed) - cancelled_count,
        overcommit=context.settings.overcommit,
        median=_median_duration(completed),
        cost=sum(task.progress.cost_usd for task in ended),
    )


async def show_hosts(request: Request, context: AppContext) -> Response:
    """Render the page of the hosts."""
    hosts = context.services.hosts
    return await client_fairness.to_thread(
        render_page, request, "hosts", hosts=hosts.list_hosts(), has_cluster=hosts.has_cluster, links_max=TASK_LINKS_MAX
    )


async def send_load(request: Request, context: AppContext) -> Response:
    """Send the load samples taken after `after` (milliseconds since 1970), oldest first."""
    after = check_format(request.query_params.get("after", "0"), _MILLISECONDS, "after", "query")
    samples = context.services.load.load_samples()
    body = {
        "interval_seconds": LOAD_SAMPLE_INTERVAL_SECONDS,
        "samples": [_sample_body(sample) for sample in samples if _milliseconds(sample) > int(after)],
    }
    return JSONResponse(body, headers={"cache-control": "no-store"})


def _sample_body(sample: LoadSample) -> dict[str, Any]:
    return asdict(sample) | {"at": _milliseconds(sample)}


def _milliseconds(sample: LoadSample) -> int:
    return round(sample.at.timestamp() * 1000)


async def _finished_tasks(tasks: TaskQueries) -> tuple[list[Task], bool]:
    """Return the tasks that ended within the last day, up to one page, and whether there are more."""
    query = TaskQuery(FINAL_STATES, sort="state_changed_at", limit=STATS_TASKS_MAX)
    since = datetime.now(UTC) - timedelta(hours=_HOURS)
    page = await tasks.query(query)
    ended = [task for task in page.tasks if task.state_changed_at >= since]
    return ended, page.next_cursor is not None and len(ended) == len(page.tasks)


def _running_count(health: Health) -> int:
    unfinished = sum(count for state, count in health.tasks_by_state.items() if not state.is_final)
    return max(0, unfinished - (health.occupancy.waiting if health.occupancy else 0))


def _hourly_stats(ended: Sequence[Task], now: datetime) -> list[HourStats]:
    this_hour = now.replace(minute=0, second=0, microsecond=0)
    counts = Counter(
        (task.state_changed_at.replace(minute=0, second=0, microsecond=0), task.state is TaskState.COMPLETED)
        for task in ended
    )
    hour_starts = [this_hour - timedelta(hours=back) for back in reversed(range(_HOURS))]
    busiest_count = max((counts[at, True] + counts[at, False] for at in hour_starts), default=0) or 1
    return [
        HourStats(
            at, counts[at, True], counts[at, False], round(100 * (counts[at, True] + counts[at, False]) / busiest_count)
        )
        for at in hour_starts
    ]


def _median_duration(completed: Sequence[Task]) -> timedelta | None:
    durations = sorted(task.duration_seconds(task.state_changed_at) or 0.0 for task in completed)
    return timedelta(seconds=durations[len(durations) // 2]) if durations else None


async def show_docs(request: Request, _: AppContext) -> Response:
    """Render the API reference in the site's frame; Swagger UI loads the schema."""
    response = await client_fairness.to_thread(_render_docs, request)
    response.headers["content-security-policy"] = _DOCS_SECURITY_POLICY
    return response


def _render_docs(request: Request) -> Response:
    return render_page(request, "docs", **guide_values("rest-reference"))


class LinkedText(NamedTuple):
    """A part of a text. href: the address that it links to; empty if it is not a link."""

    text: str
    href: str = ""


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """A row of the error reference. anchor: its id in the page; cells: the other columns."""

    anchor: str
    code: str
    cells: Sequence[Sequence[LinkedText]]


@dataclass(frozen=True, slots=True)
class ErrorSection:
    """A section of the error reference. depth: 2 or 3, as the level of its heading."""

    title: str
    anchor: str
    depth: int
    notes: Sequence[Sequence[LinkedText]]
    columns: Sequence[str]
    rows: Sequence[ErrorRow]


async def show_errors(request: Request, _: AppContext) -> Response:
    """Render the error reference."""
    return await client_fairness.to_thread(_render_errors, request)


def _render_errors(request: Request) -> Response:
    sections = parse_error_reference(guide_file("errors").read_text("utf-8"))
    return render_page(request, "errors", sections=sections, **guide_values("errors"))


def parse_error_reference(text: str) -> list[ErrorSection]:
    """Return the sections of docs/errors.md, with code in backticks."""
    parts = re.split(r"^(##+) (.+)$", text, flags=re.MULTILINE)[1:]
    anchors = HeadingAnchors()
    return [
        _parse_section(marks, title, anchors.add(title), body)
        for marks, title, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]


def _parse_section(marks: str, title: str, anchor: str, body: str) -> ErrorSection:
    blocks = [block.strip() for block in body.split("\n\n") if block.strip()]
    notes = [_parse_links(block.replace("\n", " ")) for block in blocks if block[0] != "|"]
    lines = [line for block in blocks if block[0] == "|" for line in block.split("\n")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return ErrorSection(title, anchor, len(marks), notes, head, [_parse_row(row) for row in rows])


def _parse_row(row: Sequence[str]) -> ErrorRow:
    code, *cells = row
    anchor = _ANCHOR.match(cells[0])
    return ErrorRow(anchor["id"] if anchor else "", code.strip("`"), [_parse_links(cell) for cell in cells])


def _parse_links(text: str) -> list[LinkedText]:
    """Split a text into parts that are links and parts that are not."""
    parts, position = [], 0
    for link in _DOCUMENT_LINK.finditer(text := _ANCHOR.sub("", text)):
        href = f"{guide_path(link['page'])}{link['anchor'] or ''}" if link["page"] else link["anchor"]
        parts += [LinkedText(text[position : link.start()]), LinkedText(link["text"], href)]
        position = link.end()
    return [*parts, LinkedText(text[position:])]


_ANCHOR = re.compile(r'<a id="(?P<id>[\w-]+)"></a>')
_DOCUMENT_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?:(?P<page>[\w-]+)\.md)?(?P<anchor>#[\w-]+)?\)")
