"""What every route works with."""

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from sandbox.api.auth.authenticator import Guard
from sandbox.api.middleware.metrics import ServerMetrics
from sandbox.api.settings import ApiSettings
from sandbox.api.streaming.buffer import Tails
from sandbox.interfaces.tasks import Tasks


@dataclass(frozen=True, slots=True)
class Context:
    """The service behind all doors, and who keeps them. Once `shutting_down` is set every stream ends."""

    tasks: Tasks
    settings: ApiSettings
    shutting_down: asyncio.Event
    guard: Guard
    metrics: ServerMetrics
    tails: Tails


async def context(connection: HTTPConnection) -> Context:
    """The context of the app that answers this request."""
    found = connection.app.state.context
    assert isinstance(found, Context)
    return found


Asked = Annotated[Context, Depends(context)]
