"""The pages about the server: its health, load and runtimes, and its hosts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.app_context import AppContext
from sandbox.api.request_parsing import check_format
from sandbox.api.responses import JsonResponse
from sandbox.api.routes.server import not_ready_reasons
from sandbox.dashboard.templates import render_page
from sandbox.interfaces.placement import HostState
from sandbox.interfaces.server_services import Health, LoadSample, TaskQueries
from sandbox.interfaces.store import TaskQuery
from sandbox.model.fixed_limits import LOAD_SAMPLE_INTERVAL_SECONDS
from sandbox.model.manifest.field_formats import pattern_format
from sandbox.model.task import Task
from sandbox.model.task_state import FINAL_STATES, TaskState
from sandbox.primitives import fair_client_shares

_HOURS = 24
STATS_TASKS_MAX = 1000
TASK_LINKS_MAX = 5
"""Maximum number of links to the tasks of a host."""

_MILLISECONDS = pattern_format("milliseconds", "[0-9]{1,15}", "must be a time in milliseconds since 1970")


@dataclass(frozen=True, slots=True)
class HourStats:
    """Tasks that ended within one hour. percent_of_busiest: 100 for the hour with the most tasks."""

    starts_at: datetime
    completed_count: int
    other_count: int
    percent_of_busiest: int


async def show_server(request: Request, context: AppContext) -> Response:
    """Render the server page."""
    async with fair_client_shares.thread_slot():
        return await _render_server(request, context)


async def _render_server(request: Request, context: AppContext) -> Response:
    health = await context.services.administration.health()
    ended, is_cut = await _finished_tasks(context.services.tasks)
    hours = _hourly_stats(ended, datetime.now(UTC))
    completed = [task for task in ended if task.state is TaskState.COMPLETED]
    hosts = context.services.hosts.list_hosts() if context.services.hosts.has_cluster else None
    cancelled_count = sum(task.state is TaskState.CANCELLED for task in ended)
    return await fair_client_shares.to_thread(
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
    return await fair_client_shares.to_thread(
        render_page, request, "hosts", hosts=hosts.list_hosts(), has_cluster=hosts.has_cluster, links_max=TASK_LINKS_MAX
    )


async def send_load(request: Request, context: AppContext) -> Response:
    """Send the load samples taken after `after` (milliseconds since 1970), oldest first."""
    after = check_format(request.query_params.get("after", "0"), _MILLISECONDS, "after", "query")
    samples = context.services.load.load_samples()
    return await fair_client_shares.to_thread(_load_response, samples, int(after))


def _load_response(samples: Sequence[LoadSample], after: int) -> Response:
    """Build the response in a worker thread, because thousands of samples may be requested."""
    body = {
        "interval_seconds": LOAD_SAMPLE_INTERVAL_SECONDS,
        "samples": [_sample_body(sample) for sample in samples if _milliseconds(sample) > after],
    }
    return JsonResponse(body, headers={"cache-control": "no-store"})


def _sample_body(sample: LoadSample) -> dict[str, Any]:
    # Much faster than `asdict`, which copies the values deeply.
    return {field.name: getattr(sample, field.name) for field in fields(sample)} | {"at": _milliseconds(sample)}


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
