"""The end of finished tasks, when an operator asks for it."""

from typing import Annotated

from fastapi import FastAPI, Query

from sandbox.api import paths
from sandbox.api.answer import Json
from sandbox.api.context import Asked
from sandbox.api.openapi import answers, problems
from sandbox.contracts.retention import Retention
from sandbox.model.frame import timestamp

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
