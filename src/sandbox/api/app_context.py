"""Application context available to every route."""

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from sandbox.api.authentication import RequestAdmission
from sandbox.api.observability import ServerMetrics
from sandbox.api.settings import ApiSettings
from sandbox.api.stream_cache import StreamCache
from sandbox.interfaces.server_services import TaskServices


@dataclass(frozen=True, slots=True)
class AppContext:
    """Dependencies of the routes. Every stream ends once `shutting_down` is set."""

    services: TaskServices
    settings: ApiSettings
    shutting_down: asyncio.Event
    admission: RequestAdmission
    metrics: ServerMetrics
    stream_cache: StreamCache

    @classmethod
    def create(
        cls,
        services: TaskServices,
        settings: ApiSettings,
        shutting_down: asyncio.Event,
        admission: RequestAdmission,
    ) -> "AppContext":
        """Return the context of one server, with new metrics and a new stream cache."""
        metrics, stream_cache = ServerMetrics(settings.version), StreamCache(services.events)
        return cls(services, settings, shutting_down, admission, metrics, stream_cache)

    def clone_hosts(self) -> frozenset[str] | None:
        """Return the hosts from which repositories may be cloned; None means any."""
        return self.settings.clone_hosts if self.admission.requires_token() else None


async def get_context(connection: HTTPConnection) -> AppContext:
    """Return the context of the app that serves this connection."""
    app_context = connection.app.state.context
    assert isinstance(app_context, AppContext)
    return app_context


ContextDep = Annotated[AppContext, Depends(get_context)]
