"""The stream of all tasks' states, with real sockets."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx2
import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.api import client_limits

EVENTS_PATH = "/api/v1/events?follow=true"


class Follower:
    """A client of the stream. Each message is a tuple: id (None if absent), type and data."""

    def __init__(self, response):
        self.response = response
        self._lines = response.aiter_lines()

    async def next_message(self):
        fields = {}
        async with asyncio.timeout(10):
            while line := await anext(self._lines):
                name, _, value = line.partition(":")
                if name:
                    fields[name] = value.strip()
        return fields.get("id"), fields.get("event"), json.loads(fields.get("data", "null"))

    async def next_changes(self, count):
        messages = [await self.next_message() for _ in range(count)]
        return [
            (identity, kind, data["task_id"], data.get("new_state", data.get("state")))
            for identity, kind, data in messages
        ]


@asynccontextmanager
async def following(api, query="", **headers):
    async with (
        httpx2.AsyncClient(trust_env=False, timeout=10) as client,
        client.stream("GET", f"{api.http}{EVENTS_PATH}{query}", headers=headers) as response,
    ):
        yield Follower(response)


async def test_stream_sends_only_later_changes_of_all_tasks(running_api):
    async with running_api() as api:
        api.tasks.add("earlier", *TO_RUNNING)
        async with following(api) as follower:
            assert follower.response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert await follower.next_message() == ("fade-5", None, None)
            api.tasks.add("one")
            api.tasks.add("two", *TO_RUNNING)
            assert await follower.next_changes(2) == [
                ("fade-6", "state_change", "one", "pending"),
                ("fade-11", "state_change", "two", "running"),
            ]
            api.tasks.record("earlier", *TO_COMPLETED)
            assert await follower.next_changes(2) == [
                (None, "state_change", "earlier", "completed"),
                ("fade-13", "end", "earlier", "completed"),
            ]


@pytest.mark.parametrize("way", ["query", "header"])
async def test_stream_continues_after_the_position_in_the_request(running_api, way):
    async with running_api() as api:
        api.tasks.add("one")
        api.tasks.add("two")
        options = {"query": "&after=fade-1"} if way == "query" else {"Last-Event-ID": "fade-1"}
        async with following(api, **options) as follower:
            assert await follower.next_message() == ("fade-1", None, None)
            assert await follower.next_changes(1) == [("fade-2", "state_change", "two", "pending")]


async def test_stream_without_follow_ends_after_the_existing_changes(running_api):
    async with running_api() as api, httpx2.AsyncClient(trust_env=False) as client:
        api.tasks.add("one")
        url = f"{api.http}/api/v1/events"
        assert (await client.get(url)).text == "id: fade-1\n\n"
        text = (await client.get(f"{url}?after=fade-0")).text
        assert text.startswith(
            'id: fade-0\n\nid: fade-1\nevent: state_change\ndata: {"type":"state_change","task_id":"one"'
        )
        assert text.count("\n\n") == 2


async def test_unknown_position_sends_the_states_of_all_tasks(running_api):
    async with running_api() as api:
        api.tasks.add("one")
        api.tasks.add("two", *TO_RUNNING)
        async with following(api, "&after=0-0") as follower:
            await follower.next_message()
            assert await follower.next_changes(2) == [
                ("fade-1", "state_change", "one", "pending"),
                ("fade-6", "state_change", "two", "running"),
            ]


@pytest.mark.parametrize("text", ["1", "x-1", "fade-", "fade-1-2", "fade--1", "fade-1%00", "fade-" + "1" * 19])
async def test_invalid_position_is_rejected(running_api, text):
    async with running_api() as api, following(api, f"&after={text}") as follower:
        problem = json.loads(await follower.response.aread())
        assert (follower.response.status_code, problem["error"]) == (400, "invalid_parameter")
        assert problem["details"][0]["field"] == "after"


async def test_disconnected_clients_are_not_counted(running_api, wait_until):
    async with running_api() as api:
        async with following(api) as follower:
            await follower.next_message()
            assert (api.count_open_streams("events"), api.tasks.open_followers) == (1, 1)
        await wait_until(lambda: api.count_open_streams("events") == 0 and api.tasks.open_followers == 0)


async def test_number_of_streams_is_limited(running_api, wait_until, monkeypatch):
    monkeypatch.setattr(client_limits, "ALL_TASKS_STREAMS_MAX", 1)
    async with running_api() as api, httpx2.AsyncClient(trust_env=False) as client:
        assert (await client.head(f"{api.http}{EVENTS_PATH}")).status_code == 200
        async with following(api) as follower:
            await follower.next_message()
            refused = await client.get(f"{api.http}{EVENTS_PATH}")
            assert (refused.status_code, refused.json()["error"]) == (429, "rate_limit_exceeded")
        await wait_until(lambda: api.count_open_streams("events") == 0)
        async with following(api) as follower:
            await follower.next_message()


async def test_stream_ends_when_the_server_stops(running_api):
    async with running_api() as api, following(api) as follower:
        await follower.next_message()
        api.shutting_down.set()
        with pytest.raises(StopAsyncIteration):
            await follower.next_message()
