"""Fixtures: a fake API, and the synchronous and asynchronous client behind one blocking interface."""

import asyncio
import inspect

import pytest

from doubles.fake_api import FakeApi
from doubles.sample_task import TASK_ID, task_status
from sandbox.client import AsyncClient, Client, retried_operations


class BlockingAsyncClient:
    """The asynchronous client with the blocking interface of the synchronous one."""

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
    """A fake API that records requests; the test adds the responses."""
    with FakeApi().running() as api:
        yield api


@pytest.fixture(params=[Client, BlockingAsyncClient], ids=["Client", "AsyncClient"])
def client_class(request, monkeypatch):
    """The class of the synchronous or the asynchronous client."""
    monkeypatch.setattr(retried_operations, "DELAYS_SECONDS", (0.01,) * 5)
    return request.param


@pytest.fixture
def client(api, client_class):
    """A client of the fake API, with a token."""
    from doubles.fake_api import json_response

    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("running")))
    with client_class(api.url, "secret-token", timeout_seconds=10) as client:
        yield client
