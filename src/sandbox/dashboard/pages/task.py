"""The page of one task."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from starlette.requests import Request
from starlette.responses import Response

from sandbox.api import paths
from sandbox.api.context import Context
from sandbox.api.middleware.authentication import visitor_of
from sandbox.dashboard.manifest_templates import write_manifest
from sandbox.dashboard.templates import show
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.model.tier import ISOLATION
from sandbox.model.wire.events import error

STORY_RECORDS_MAX = 200_000
"""Of a longer story the page tells the end; the log has all of it."""

_WAY = (
    TaskState.PENDING,
    TaskState.STAGING,
    TaskState.PROVISIONING,
    TaskState.READY,
    TaskState.RUNNING,
    TaskState.COMPLETING,
)


@dataclass(frozen=True, slots=True)
class Station:
    """A state on the task's way. began_at: None when it was not, or not yet, there; stayed: None while it is."""

    state: TaskState
    began_at: datetime | None
    stayed: timedelta | None
    is_present: bool


async def show_task(request: Request, asked: Context) -> Response:
    """What is known now; its modules bring the story and keep it fresh."""
    task = await asked.tasks.status(request.path_params["task_id"])
    is_operator = visitor_of(request).is_operator
    return show(
        request,
        "task",
        task=task,
        here=f"/tasks/{request.path_params['task_id']}",
        api=paths.task_path(task.id),
        manifest_text=write_manifest(task.manifest, with_sources=is_operator),
        stations=stations(task),
        took=_took(task),
        failure=error(task, is_operator=is_operator),
        isolates=ISOLATION.get(task.attempt.tier or "") if task.attempt else None,
        artifacts=await asked.tasks.artifacts(task.id),
        patch=f"{task.id}.patch",
        after=max(0, task.last_seq - STORY_RECORDS_MAX),
        is_kept=await asked.tasks.keeps_sandbox(task),
    )


def stations(task: Task) -> Sequence[Station]:
    """The six states before the end, then the end; what was skipped on the way has no time."""
    entered = {entry.state: entry.at for entry in task.history}
    left = {entry.state: after.at for entry, after in zip(task.history, task.history[1:], strict=False)}
    end = task.state if task.state.is_terminal else TaskState.COMPLETED
    return [
        Station(
            state,
            entered.get(state),
            left[state] - entered[state] if state in left else None,
            task.state is state,
        )
        for state in (*_WAY, end)
    ]


def _took(task: Task) -> timedelta | None:
    return task.finished_at - task.created_at if task.finished_at else None
