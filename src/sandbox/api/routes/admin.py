"""Draining the server: it finishes what it has begun, and begins nothing."""

from typing import Annotated

from fastapi import FastAPI, Query

from sandbox.api import paths
from sandbox.api.context import Asked
from sandbox.api.openapi import answers, problems
from sandbox.api.responses import Json
from sandbox.interfaces.tasks import Draining, Retention
from sandbox.model.wire.events import timestamp


def add_drain_routes(app: FastAPI) -> None:
    """Put the routes of this module on the app."""
    app.get(paths.DRAIN, responses=answers("DrainBody") | problems())(read_drain)
    app.post(paths.DRAIN, responses=answers("DrainBody") | problems(503))(begin_drain)
    app.delete(paths.DRAIN, responses=answers("DrainBody") | problems(503))(undo_drain)


async def read_drain(asked: Asked) -> Json:
    """Whether the server is being drained, and how far that is."""
    return _answer(await asked.tasks.draining())


async def begin_drain(asked: Asked) -> Json:
    """Take no tasks and begin none, across restarts too, until it is undone; those that run go on."""
    return _answer(await asked.tasks.drain())


async def undo_drain(asked: Asked) -> Json:
    """Take and begin tasks again."""
    return _answer(await asked.tasks.undo_drain())


def _answer(draining: Draining) -> Json:
    return Json(
        {
            "draining": draining.since is not None,
            "since": None if draining.since is None else timestamp(draining.since),
            "running": draining.running,
            "waiting": draining.waiting,
        }
    )


_SECONDS_MAX = 100 * 366 * 86_400
_COUNT_MAX = 10_000_000
_BYTES_MAX = 2**60


def add_pruning_routes(app: FastAPI) -> None:
    """Put the routes of this module on the app."""
    app.post(paths.PRUNE, responses=answers("PrunedBody") | problems(503))(prune_tasks)


async def prune_tasks(
    asked: Asked,
    older_than_seconds: Annotated[
        float | None, Query(ge=0, le=_SECONDS_MAX, description="Those whose end is longer ago go")
    ] = None,
    keep: Annotated[int | None, Query(ge=1, le=_COUNT_MAX, description="So many may stay, the oldest go")] = None,
    max_bytes: Annotated[int | None, Query(ge=0, le=_BYTES_MAX, description="What all may take on disk")] = None,
    *,
    dry_run: Annotated[bool, Query(description="Only say which would go")] = False,
) -> Json:
    """Remove finished tasks with all that is kept of them; without bounds by those of the server's configuration."""
    bounds = (older_than_seconds, keep, max_bytes)
    retention = None if bounds == (None, None, None) else Retention(*bounds)
    pruned = await asked.tasks.prune(retention, dry_run=dry_run)
    items = [
        {"id": one.id, "state": one.state, "finished_at": timestamp(one.finished_at), "size_bytes": one.size_bytes}
        for one in pruned
    ]
    total = sum(one.size_bytes for one in pruned)
    return Json({"dry_run": dry_run, "tasks": items, "total_count": len(items), "total_size_bytes": total})
