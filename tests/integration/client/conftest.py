"""A recorded API, and both clients behind one face."""

import asyncio
import inspect

import pytest

from doubles.recorded_api import RecordedApi
from doubles.recorded_task import TASK, status
from sandbox.client import AsyncClient, Client, operations


class Awaited:
    """The asynchronous client, awaited: whoever holds it cannot tell it from the other one."""

    def __init__(self, *arguments, **keywords) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*arguments, **keywords)

    def __getattr__(self, name):
        method = getattr(self._client, name)

        def call(*arguments, **keywords):
            if inspect.isasyncgenfunction(method):
                return self._items(method(*arguments, **keywords))
            return self._runner.run(method(*arguments, **keywords))

        return call

    def _items(self, items):
        while True:
            try:
                yield self._runner.run(anext(items))
            except StopAsyncIteration:
                return

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture
def api():
    """An API that knows nothing yet."""
    with RecordedApi().running() as api:
        yield api


@pytest.fixture(params=[Client, Awaited], ids=["Client", "AsyncClient"])
def client_class(request, monkeypatch):
    """Either client."""
    monkeypatch.setattr(operations, "DELAYS_SECONDS", (0.01,) * 5)
    return request.param


@pytest.fixture
def client(api, client_class):
    """Either client, of the recorded API, with a token."""
    from doubles.recorded_api import of_json

    api.on("GET", f"/tasks/{TASK}", of_json(status("running")))
    with client_class(api.url, "secret-token", timeout_seconds=10) as client:
        yield client
