"""The page of all tasks: who waits and for what, and the list with its filters in the address."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlencode

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from sandbox.api import paths
from sandbox.api.context import Context
from sandbox.api.cursor import write_cursor
from sandbox.api.errors import InvalidParameterError
from sandbox.api.middleware.authentication import wants_page
from sandbox.api.request_parameters import refuse_repeated
from sandbox.api.responses import Json
from sandbox.api.routes.task_list import ListQuery, list_page, read_query
from sandbox.dashboard.templates import show
from sandbox.interfaces.store import TaskQuery
from sandbox.interfaces.tasks import Tasks
from sandbox.model.task import Task
from sandbox.model.task_state import TERMINAL_STATES, TaskState

_ROWS = 50
_WAITING_SHOWN = 20

_ALIVE = tuple(state for state in TaskState if state not in TERMINAL_STATES and state is not TaskState.PENDING)
_GROUPS: Mapping[str, Sequence[TaskState]] = {
    "All": (),
    "Waiting": (TaskState.PENDING,),
    "Active": _ALIVE,
    "Completed": (TaskState.COMPLETED,),
    "Failed": (TaskState.FAILED, TaskState.FAILED_PRESERVED),
    "Cancelled": (TaskState.CANCELLED,),
}
_SORTS = {
    "created_at": "Newest first",
    "state_changed_at": "Last changed first",
    "started_at": "Last started first",
    "name": "By name",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A filter that can be chosen. query: the address without its path; count: None where nobody counts."""

    name: str
    query: str
    is_chosen: bool
    count: int | None = None


async def show_tasks(request: Request, asked: Context) -> Response:
    """For people the page, for programs where to go on."""
    if not wants_page(request):
        return _directory(asked)
    if (label := request.query_params.get("label")) is not None:
        return RedirectResponse(f"/?{_with_label(request, label)}", 303)
    query = read_query(_asked(request), request.query_params)
    page = await list_page(asked.tasks, query, request.query_params)
    health = await asked.tasks.health()
    waiting = await _waiting(asked.tasks)
    return show(
        request,
        "tasks",
        tasks=page.tasks,
        total_count=page.total_count,
        older=_changed(request, cursor=write_cursor(page.next_cursor, query)) if page.next_cursor else None,
        is_first_page=query.cursor is None,
        waiting=waiting if query.cursor is None and not query.states and not query.labels else [],
        waiting_count=health.tasks_by_state.get(TaskState.PENDING, 0),
        reasons=health.reasons,
        groups=_groups(request, query, health.tasks_by_state),
        labels=[Choice(f"{key}={value}", _without_label(request, key), True) for key, value in query.labels.items()],
        label_query=partial(_label_query, request),
        sorts=_sorts(request, query),
        kept=[(name, value) for name, value in request.query_params.multi_items() if name != "cursor"],
        first_page=_changed(request),
        here=f"/?{request.query_params}" if request.query_params else "/",
    )


def _directory(asked: Context) -> Response:
    links = {
        "tasks": paths.TASKS,
        "health": paths.HEALTH,
        "metrics": paths.METRICS,
        "schema": paths.SCHEMA,
        "docs": paths.DOCS,
    }
    return Json({"name": "Sandbox", "version": asked.settings.version, "links": links})


def _asked(request: Request) -> ListQuery:
    refuse_repeated(request.query_params, ListQuery.model_fields)
    given = {name: value for name, value in request.query_params.items() if name in ListQuery.model_fields}
    try:
        return ListQuery.model_validate({"limit": _ROWS, **given, "order": _order(given)})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidParameterError(str(first["loc"][0]), first["msg"]) from None


def _order(given: Mapping[str, str]) -> str:
    return given.get("order") or ("asc" if given.get("sort") == "name" else "desc")


async def _waiting(tasks: Tasks) -> Sequence[Task]:
    """The head of the line."""
    query = TaskQuery(frozenset({TaskState.PENDING}), order="asc", limit=_WAITING_SHOWN)
    return (await tasks.query(query)).tasks


def _groups(request: Request, query: TaskQuery, counts: Mapping[TaskState, int]) -> list[Choice]:
    return [
        Choice(
            name,
            _changed(request, state=",".join(states) or None),
            query.states == frozenset(states),
            sum(counts.get(state, 0) for state in states or TaskState),
        )
        for name, states in _GROUPS.items()
    ]


def _sorts(request: Request, query: TaskQuery) -> list[Choice]:
    return [
        Choice(name, _changed(request, sort=None if sort == "created_at" else sort, order=None), query.sort == sort)
        for sort, name in _SORTS.items()
    ]


def _changed(request: Request, **changes: str | None) -> str:
    """The address with these parameters in place of what it has, on its first page."""
    given = request.query_params.multi_items()
    kept = [(name, value) for name, value in given if name not in {*changes, "cursor", "offset", "label"}]
    wanted = [*kept, *((name, value) for name, value in changes.items() if value is not None)]
    # Labels may be empty; nothing else is asked for with nothing.
    return urlencode([(name, value) for name, value in wanted if value or name.startswith("label.")])


def _with_label(request: Request, label: str) -> str:
    """What the form sends, `key=value`, as the API has it."""
    key, equals, value = label.partition("=")
    return _changed(request, **({f"label.{key.strip()}": value.strip()} if key.strip() and equals else {}))


def _without_label(request: Request, key: str) -> str:
    return _changed(request, **{f"label.{key}": None})


def _label_query(request: Request, key: str, value: str) -> str:
    """The address that asks for a label beside what is asked for now."""
    return _changed(request, **{f"label.{key}": value})
