"""Draining the server: it finishes what it has begun, and begins nothing."""

from fastapi import FastAPI

from sandbox.api import paths
from sandbox.api.answer import Json
from sandbox.api.context import Asked
from sandbox.api.openapi import answers, problems
from sandbox.contracts.tasks import Draining
from sandbox.model.frame import timestamp


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
