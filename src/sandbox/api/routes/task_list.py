"""Lists of tasks: which, in what order, and from where on."""

from dataclasses import replace
from typing import Annotated

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, Field
from starlette.datastructures import QueryParams

from sandbox.api import paths
from sandbox.api.context import Asked
from sandbox.api.cursor import CURSOR_LENGTH_MAX, Order, Sort, read_cursor, write_cursor
from sandbox.api.errors import InvalidParameterError
from sandbox.api.middleware.authentication import visitor_of
from sandbox.api.openapi import answers, parameters, problems
from sandbox.api.responses import Json
from sandbox.api.task_body import item_body
from sandbox.interfaces.store import TaskPage, TaskQuery
from sandbox.interfaces.tasks import Tasks
from sandbox.model.task_state import TaskState

LIMIT_MAX = 1000
OFFSET_MAX = 2**53

_LABEL = "label."
_LABELS = {
    "name": "labels",
    "in": "query",
    "required": False,
    "description": "`label.KEY=VALUE`, as often as there are labels to ask for; a task has to have all of them. "
    'As an object: `{"label.KEY": "VALUE"}`',
    "style": "form",
    "explode": True,
    "schema": {"type": "object", "patternProperties": {"^label\\.": {"type": "string"}}, "additionalProperties": False},
}
_STATE = "|".join(TaskState)


class ListQuery(BaseModel):
    """What a list is asked for with."""

    state: str = Field(
        "", description="States, separated by commas", json_schema_extra={"pattern": f"^(({_STATE})(,({_STATE}))*)?$"}
    )
    sort: Sort = "created_at"
    order: Order = "desc"
    limit: int = Field(100, ge=1, le=LIMIT_MAX)
    offset: int = Field(0, ge=0, le=OFFSET_MAX)
    cursor: str | None = Field(
        None,
        description="`next_cursor` of the page before, for paging that neither skips nor repeats a task; "
        "brings its own sort and order, and goes without offset",
        json_schema_extra={"maxLength": CURSOR_LENGTH_MAX},
    )


def add_list_routes(app: FastAPI) -> None:
    """Put the routes of this module on the app."""
    app.get(paths.TASKS, responses=answers("TaskListBody") | problems(503), openapi_extra=parameters(_LABELS))(
        list_tasks
    )


async def list_tasks(request: Request, asked: Asked, query: Annotated[ListQuery, Query()]) -> Json:
    """List tasks. `label.KEY=VALUE`, which may be repeated, keeps those that have all these labels."""
    wanted = read_query(query, request.query_params)
    page = await list_page(asked.tasks, wanted, request.query_params)
    answer = {
        "tasks": [item_body(task, is_operator=visitor_of(request).is_operator) for task in page.tasks],
        "total_count": page.total_count,
        "limit": wanted.limit,
        "offset": wanted.offset,
        "has_more": page.next_cursor is not None,
        "next_cursor": write_cursor(page.next_cursor, wanted),
    }
    return Json(answer)


def read_query(asked: ListQuery, given: QueryParams) -> TaskQuery:
    """What is asked for. Raises InvalidParameterError."""
    query = TaskQuery(_states(asked.state), _labels(given) or {}, asked.sort, asked.order, asked.limit, asked.offset)
    return query if asked.cursor is None else _resumed(query, asked.cursor, given)


async def list_page(tasks: Tasks, wanted: TaskQuery, given: QueryParams) -> TaskPage:
    """The page that is wanted; an empty one when a label is asked to have two values."""
    return await tasks.query(wanted) if _labels(given) is not None else TaskPage((), 0)


def _resumed(query: TaskQuery, text: str, given: QueryParams) -> TaskQuery:
    """The query from the cursor on, in the cursor's own order."""
    if query.offset:
        raise InvalidParameterError("offset", "counts from the start; it cannot come with a cursor")
    bookmark = read_cursor(text)
    for name, value in (("sort", bookmark.sort), ("order", bookmark.order)):
        if given.get(name, value) != value:
            raise InvalidParameterError(name, f"must be {value}, as it was when the cursor was made, or left out")
    return replace(query, sort=bookmark.sort, order=bookmark.order, cursor=bookmark.cursor)


def _labels(given: QueryParams) -> dict[str, str] | None:
    """The labels asked for; None when no task can have them, because one key is asked to have two values."""
    labels: dict[str, str] = {}
    for name, value in given.multi_items():
        if name.startswith(_LABEL) and labels.setdefault(name.removeprefix(_LABEL), value) != value:
            return None
    return labels


def _states(text: str) -> frozenset[TaskState]:
    names = {name.strip() for name in text.split(",")} - {""}
    unknown = names - set(TaskState)
    if unknown:
        raise InvalidParameterError("state", f"must be one of {', '.join(TaskState)}", rule="enum")
    return frozenset(TaskState(name) for name in names)
