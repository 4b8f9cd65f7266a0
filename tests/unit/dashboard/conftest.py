"""Requests for dashboard pages, made without a socket."""

import asyncio
from typing import Any

import httpx2
import pytest

from doubles.fake_tasks import FakeTasks
from doubles.fake_token_store import FakeTokenStore
from sandbox.agents import registered_agents
from sandbox.api.app import create_app
from sandbox.api.app_context import AppContext
from sandbox.api.authentication import RequestAdmission
from sandbox.api.settings import ApiSettings
from sandbox.dashboard.routing import add_dashboard
from sandbox.interfaces.auth import TokenStore

BROWSER_HEADERS = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


class Pages:
    """The dashboard pages of a server with these tasks."""

    def __init__(self, tasks: FakeTasks, token_store: TokenStore | None = None) -> None:
        self.tasks = tasks
        settings = ApiSettings("0.1.0", frozenset({8121, 8122}), agents=registered_agents())
        admission = RequestAdmission(token_store or FakeTokenStore(), settings)
        context = AppContext.create(tasks.services, settings, asyncio.Event(), admission)
        self.app = create_app(context)
        add_dashboard(self.app, context)

    def get(self, path: str, method: str = "GET", **headers: str) -> httpx2.Response:
        async def request() -> httpx2.Response:
            transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8122") as client:
                request_headers = {
                    **BROWSER_HEADERS,
                    **{name.replace("_", "-"): value for name, value in headers.items()},
                }
                return await client.request(method, path, headers=request_headers)

        return asyncio.run(request())


@pytest.fixture
def tasks() -> FakeTasks:
    return FakeTasks()


@pytest.fixture
def pages(tasks: FakeTasks) -> Pages:
    return Pages(tasks)


@pytest.fixture
def pages_with_tokens(tasks: FakeTasks) -> Any:
    return lambda token_store: Pages(tasks, token_store)
