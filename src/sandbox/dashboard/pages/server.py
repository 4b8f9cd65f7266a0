"""The server page: health, runtimes and throughput."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.app_context import AppContext
from sandbox.api.routes.health import not_ready_reasons
from sandbox.dashboard.templates import render_page
from sandbox.interfaces.store import TaskQuery
from sandbox.interfaces.tasks import TaskQueries
from sandbox.model.task import Task
from sandbox.model.task_state import FINAL_STATES, TaskState
from sandbox.system import client_fairness

_HOURS = 24
STATS_TASKS_MAX = 1000


@dataclass(frozen=True, slots=True)
class HourStats:
    """Tasks that ended within one hour. percent_of_busiest: their number relative to the busiest hour's."""

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
    completed = [task for task in ended if task.state is TaskState.COMPLETED]
    return await client_fairness.to_thread(
        render_page,
        request,
        "server",
        health=health,
        reasons=not_ready_reasons(health, context),
        uptime=timedelta(seconds=health.uptime_seconds),
        hours=_hourly_stats(ended, datetime.now(UTC)),
        ended_count=len(ended),
        is_cut=is_cut,
        completed_count=len(completed),
        median=_median([task.state_changed_at - task.created_at for task in completed]),
        cost=sum(task.progress.cost_usd for task in ended),
    )


async def _finished_tasks(tasks: TaskQueries) -> tuple[list[Task], bool]:
    """Return the tasks that ended within the last day, up to one page, and whether there were more."""
    query = TaskQuery(FINAL_STATES, sort="state_changed_at", limit=STATS_TASKS_MAX)
    since = datetime.now(UTC) - timedelta(hours=_HOURS)
    page = await tasks.query(query)
    ended = [task for task in page.tasks if task.state_changed_at >= since]
    return ended, page.next_cursor is not None and len(ended) == len(page.tasks)


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


def _median(durations: list[timedelta]) -> timedelta | None:
    return sorted(durations)[len(durations) // 2] if durations else None
