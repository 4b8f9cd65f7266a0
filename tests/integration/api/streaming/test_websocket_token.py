"""The WebSocket asks for a token too: in a header, a cookie, or beside the subprotocol, never in the address."""

import asyncio
import json

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import TO_RUNNING
from sandbox.api.middleware import authentication


def access() -> FakeAccess:
    return FakeAccess(vera="viewer")


async def first_frame(doors, *, port: int = 0, **options):
    async with connect(doors.ws("?task_id=task-001", port=port), **options) as stream:
        return json.loads(await asyncio.wait_for(stream.recv(), 5)), stream.subprotocol


def test_a_token_in_the_header_opens_the_stream_on_both_ports(open_doors):
    async def story():
        async with open_doors(access()) as doors:
            doors.tasks.add("task-001")
            for port in (doors.stream_port, doors.port):
                headers = {"Authorization": "Bearer vera"}
                frame, protocol = await first_frame(doors, port=port, additional_headers=headers)
                assert (frame["task_id"], protocol) == ("task-001", None)

    asyncio.run(story())


def test_a_page_offers_its_token_beside_the_protocol_and_it_is_not_sent_back(open_doors):
    async def story():
        async with open_doors(access()) as doors:
            doors.tasks.add("task-001")
            offered = ["sandbox.v1", "sandbox.bearer.vera"]
            frame, protocol = await first_frame(doors, subprotocols=offered, origin="https://ui.example")
            assert (frame["task_id"], protocol) == ("task-001", "sandbox.v1")
            frame, protocol = await first_frame(doors, subprotocols=["sandbox.bearer.vera"])
            assert (frame["task_id"], protocol) == ("task-001", None)

    asyncio.run(story())


def test_a_session_of_the_one_port_opens_the_stream_on_the_other(open_doors, caplog):
    async def story():
        async with open_doors(access()) as doors:
            doors.tasks.add("task-001")
            async with httpx.AsyncClient(trust_env=False) as client:
                answer = await client.post(
                    f"{doors.http}/api/v1/session", headers={"Authorization": "Bearer vera"}, timeout=10
                )
            cookie = {"Cookie": answer.headers["set-cookie"].partition(";")[0]}
            frame, _ = await first_frame(doors, additional_headers=cookie, origin=doors.http)
            assert frame["task_id"] == "task-001"
            with pytest.raises(InvalidStatus) as refused:
                await first_frame(doors, additional_headers=cookie, origin="http://localhost:3000")
            assert refused.value.response.status_code == 403

    asyncio.run(story())
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
def test_without_a_good_token_the_handshake_is_refused(open_doors, options):
    async def story():
        async with open_doors(access()) as doors:
            doors.tasks.add("task-001")
            with pytest.raises(InvalidStatus) as refused:
                await first_frame(doors, **options)
            assert refused.value.response.status_code == 401
            assert refused.value.response.headers["www-authenticate"].startswith("Bearer")
            assert json.loads(refused.value.response.body)["error"] == "unauthorized"

    asyncio.run(story())


def test_a_token_in_the_address_is_no_token(open_doors):
    async def story():
        async with open_doors(access()) as doors:
            doors.tasks.add("task-001")
            with pytest.raises(InvalidStatus) as refused:
                async with connect(doors.ws("?task_id=task-001&token=vera")):
                    pass
            assert refused.value.response.status_code == 401

    asyncio.run(story())


def test_a_stream_ends_when_its_token_is_revoked_and_nothing_broke(open_doors, monkeypatch, caplog):
    monkeypatch.setattr(authentication, "RECHECK_SECONDS", 0.0)
    tokens = FakeAccess(vera="viewer", olga="operator")

    async def story():
        async with open_doors(tokens) as doors, httpx.AsyncClient(trust_env=False, timeout=10) as client:
            doors.tasks.add("task-001")
            url = f"{doors.http}/api/v1/tasks/task-001/logs?follow=true"
            headers = {"Authorization": "Bearer vera"}
            async with (
                connect(doors.ws("?task_id=task-001"), additional_headers=headers) as revoked,
                connect(doors.ws("?task_id=task-001"), additional_headers={"Authorization": "Bearer olga"}) as kept,
                client.stream("GET", url, headers=headers) as followed,
            ):
                chunks = followed.aiter_raw()
                await asyncio.wait_for(anext(chunks), 5)
                for stream in (revoked, kept):
                    await asyncio.wait_for(stream.recv(), 5)
                del tokens.roles["vera"]
                doors.tasks.tell("task-001", *TO_RUNNING)
                with pytest.raises(ConnectionClosedError) as closed:
                    await asyncio.wait_for(revoked.recv(), 5)
                assert closed.value.rcvd.code == 1008
                with pytest.raises(httpx.RemoteProtocolError):
                    assert b"running" not in b"".join([chunk async for chunk in chunks])
                assert "staging" in await asyncio.wait_for(kept.recv(), 5)

    asyncio.run(story())
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def test_who_says_something_after_the_token_was_revoked_is_sent_away_once(open_doors, monkeypatch, caplog):
    monkeypatch.setattr(authentication, "RECHECK_SECONDS", 0.0)
    tokens = FakeAccess(vera="viewer")

    async def story():
        async with open_doors(tokens) as doors:
            doors.tasks.add("task-001")
            headers = {"Authorization": "Bearer vera"}
            async with connect(doors.ws("?task_id=task-001"), additional_headers=headers) as revoked:
                await asyncio.wait_for(revoked.recv(), 5)
                del tokens.roles["vera"]
                await revoked.send("hello?")
                with pytest.raises(ConnectionClosedError) as closed:
                    await asyncio.wait_for(revoked.recv(), 5)
                assert closed.value.rcvd.code == 1008

    asyncio.run(story())
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
