"""What every route works with."""

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from sandbox.contracts.tasks import Tasks


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """What the doors are told.

    version: of the server. ports: those that it listens on. host_names: names beside the loopback ones that
    clients may reach it by.
    """

    version: str
    ports: frozenset[int]
    host_names: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Context:
    """The service behind the doors. Once `shutting_down` is set every stream ends."""

    tasks: Tasks
    settings: ApiSettings
    shutting_down: asyncio.Event


async def context(connection: HTTPConnection) -> Context:
    """The context of the app that answers this request."""
    found = connection.app.state.context
    assert isinstance(found, Context)
    return found


Asked = Annotated[Context, Depends(context)]
