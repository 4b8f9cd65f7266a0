"""The API on both ports, with real sockets, in the event loop of the test."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from doubles.fake_tasks import FakeTasks
from doubles.fake_token_store import FakeTokenStore
from sandbox.agents import registered_agents
from sandbox.api.app import create_app, create_websocket_app
from sandbox.api.app_context import AppContext
from sandbox.api.authentication import RequestAdmission
from sandbox.api.http.server import bind, serve
from sandbox.api.settings import ApiSettings
from sandbox.interfaces.auth import TokenStore


@dataclass
class RunningApi:
    tasks: FakeTasks
    port: int
    websocket_port: int
    shutting_down: asyncio.Event
    serving: asyncio.Task[None]
    context: AppContext

    @property
    def http(self) -> str:
        return f"http://localhost:{self.port}"

    def ws(self, query: str = "", *, port: int = 0) -> str:
        return f"ws://localhost:{port or self.websocket_port}/api/v1/tasks/stream{query}"

    def count_open_streams(self, kind: str) -> int:
        """Return the number of open streams according to the metrics."""
        metrics = self.context.metrics.render(self.tasks.health_report, is_ready=True).decode()
        return int(float(re.search(rf'sandbox_streams_open{{kind="{kind}"}} (\S+)', metrics)[1]))

    async def stop(self) -> float:
        """Shut down the server; return how long it took, in seconds."""
        started = time.monotonic()
        self.shutting_down.set()
        await asyncio.wait_for(self.serving, 10)
        return time.monotonic() - started


@asynccontextmanager
async def _running_api(
    token_store: TokenStore | None = None, *, clone_hosts: frozenset[str] = frozenset()
) -> AsyncIterator[RunningApi]:
    tasks, shutting_down, started = FakeTasks(), asyncio.Event(), asyncio.Event()
    sockets, websocket_sockets = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    port, websocket_port = sockets[0].getsockname()[1], websocket_sockets[0].getsockname()[1]
    settings = ApiSettings(
        "0.1.0", frozenset({port, websocket_port}), clone_hosts=clone_hosts, agents=registered_agents()
    )
    admission = RequestAdmission(token_store or FakeTokenStore(), settings)
    context = AppContext.create(tasks.services, settings, shutting_down, admission)
    app, websocket_app = create_app(context), create_websocket_app(context)
    serving = asyncio.create_task(
        serve(app, websocket_app, sockets, websocket_sockets, shutting_down=shutting_down, on_started=started.set)
    )
    await asyncio.wait_for(started.wait(), 10)
    api = RunningApi(tasks, port, websocket_port, shutting_down, serving, context)
    try:
        yield api
    finally:
        await api.stop()


@pytest.fixture
def running_api():
    return _running_api


async def _wait_until(condition, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def wait_until():
    return _wait_until
