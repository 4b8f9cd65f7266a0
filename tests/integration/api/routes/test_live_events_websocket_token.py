"""WebSocket authentication: by header, cookie or subprotocol, never by URL."""

import asyncio
import json

import httpx2
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from doubles.fake_tasks import TO_RUNNING
from doubles.fake_token_store import FakeTokenStore
from sandbox.api import authentication


def token_store() -> FakeTokenStore:
    return FakeTokenStore(vera="viewer")


async def first_event(api, *, port: int = 0, **options):
    async with connect(api.ws("?task_id=task-001", port=port), **options) as stream:
        return json.loads(await asyncio.wait_for(stream.recv(), 5)), stream.subprotocol


async def test_header_token_authenticates_on_both_ports(running_api):
    async with running_api(token_store()) as api:
        api.tasks.add("task-001")
        for port in (api.websocket_port, api.port):
            headers = {"Authorization": "Bearer vera"}
            event, protocol = await first_event(api, port=port, additional_headers=headers)
            assert (event["task_id"], protocol) == ("task-001", None)


async def test_subprotocol_token_authenticates_and_is_not_echoed(running_api):
    async with running_api(token_store()) as api:
        api.tasks.add("task-001")
        subprotocols = ["sandbox.v1", "sandbox.bearer.vera"]
        event, protocol = await first_event(api, subprotocols=subprotocols, origin="https://ui.example")
        assert (event["task_id"], protocol) == ("task-001", "sandbox.v1")
        event, protocol = await first_event(api, subprotocols=["sandbox.bearer.vera"])
        assert (event["task_id"], protocol) == ("task-001", None)


async def test_session_cookie_authenticates_on_the_websocket_port(running_api, caplog):
    async def scenario():
        async with running_api(token_store()) as api:
            api.tasks.add("task-001")
            async with httpx2.AsyncClient(trust_env=False) as client:
                response = await client.post(
                    f"{api.http}/api/v1/session", headers={"Authorization": "Bearer vera"}, timeout=10
                )
            cookie = {"Cookie": response.headers["set-cookie"].partition(";")[0]}
            event, _ = await first_event(api, additional_headers=cookie, origin=api.http)
            assert event["task_id"] == "task-001"
            with pytest.raises(InvalidStatus) as raised:
                await first_event(api, additional_headers=cookie, origin="http://localhost:3000")
            assert raised.value.response.status_code == 403

    await scenario()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"additional_headers": {"Authorization": "Bearer mallory"}},
        {"subprotocols": ["sandbox.v1", "sandbox.bearer.mallory"]},
        {"subprotocols": ["sandbox.v1"]},
        {"additional_headers": {"Cookie": "sandbox_session=vera"}},
    ],
)
async def test_missing_or_invalid_token_rejects_the_handshake(running_api, options):
    async with running_api(token_store()) as api:
        api.tasks.add("task-001")
        with pytest.raises(InvalidStatus) as raised:
            await first_event(api, **options)
        assert raised.value.response.status_code == 401
        assert raised.value.response.headers["www-authenticate"].startswith("Bearer")
        assert json.loads(raised.value.response.body)["error"] == "unauthorized"


async def test_token_in_the_url_is_ignored(running_api):
    async with running_api(token_store()) as api:
        api.tasks.add("task-001")
        with pytest.raises(InvalidStatus) as raised:
            async with connect(api.ws("?task_id=task-001&token=vera")):
                pass
        assert raised.value.response.status_code == 401


async def test_revoked_token_closes_its_streams_without_errors(running_api, monkeypatch, caplog):
    monkeypatch.setattr(authentication, "RECHECK_INTERVAL_SECONDS", 0.0)
    tokens = FakeTokenStore(vera="viewer", olga="operator")

    async def scenario():
        async with running_api(tokens) as api, httpx2.AsyncClient(trust_env=False, timeout=10) as client:
            api.tasks.add("task-001")
            url = f"{api.http}/api/v1/tasks/task-001/logs?follow=true"
            headers = {"Authorization": "Bearer vera"}
            async with (
                connect(api.ws("?task_id=task-001"), additional_headers=headers) as revoked,
                connect(api.ws("?task_id=task-001"), additional_headers={"Authorization": "Bearer olga"}) as valid,
                client.stream("GET", url, headers=headers) as log_stream,
            ):
                chunks = log_stream.aiter_raw()
                await asyncio.wait_for(anext(chunks), 5)
                for stream in (revoked, valid):
                    await asyncio.wait_for(stream.recv(), 5)
                del tokens.roles["vera"]
                api.tasks.record("task-001", *TO_RUNNING)
                with pytest.raises(ConnectionClosedError) as raised:
                    await asyncio.wait_for(revoked.recv(), 5)
                assert raised.value.rcvd.code == 1008
                with pytest.raises(httpx2.RemoteProtocolError):
                    assert b"running" not in b"".join([chunk async for chunk in chunks])
                assert "staging" in await asyncio.wait_for(valid.recv(), 5)

    await scenario()
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


async def test_message_after_token_revocation_closes_the_stream_once(running_api, monkeypatch, caplog):
    monkeypatch.setattr(authentication, "RECHECK_INTERVAL_SECONDS", 0.0)
    tokens = FakeTokenStore(vera="viewer")

    async def scenario():
        async with running_api(tokens) as api:
            api.tasks.add("task-001")
            headers = {"Authorization": "Bearer vera"}
            async with connect(api.ws("?task_id=task-001"), additional_headers=headers) as revoked:
                await asyncio.wait_for(revoked.recv(), 5)
                del tokens.roles["vera"]
                await revoked.send("hello?")
                with pytest.raises(ConnectionClosedError) as raised:
                    await asyncio.wait_for(revoked.recv(), 5)
                assert raised.value.rcvd.code == 1008

    await scenario()
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
