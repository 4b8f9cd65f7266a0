"""Secrets are asked for when a task is launched, go to its runner, and stay nowhere."""

import asyncio
import dataclasses
import logging

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING, Rooms
from sandbox.interfaces.journal import read_records
from sandbox.model.events import AttemptStarted
from sandbox.model.manifest.schema import Secret
from sandbox.model.task_state import TaskState
from sandbox.server.scheduler import Resources
from sandbox.store.sqlite import SqliteStore

VALUE = "t0p-secret-value-of-a-test"
SECRET = Secret(name="TOKEN", source="env", key="SERVER_TOKEN")


def with_secret(task_id="task-1"):
    return dataclasses.replace(manifest(task_id), secrets=(SECRET,))


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 0.1)
    made = Rooms(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield made
    for task_id in list(made.runners.recorders):
        made.runners.die(task_id)


def bytes_below(directory):
    return b"".join(file.read_bytes() for file in directory.rglob("*") if file.is_file())


def test_the_runner_gets_the_values_and_no_file_does(world, caplog):
    world.secrets = {"TOKEN": VALUE}
    caplog.set_level(logging.DEBUG)

    async def play():
        async with world.server() as service:
            await service.submit(with_secret())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING)
            await world.until(service, "task-1", TaskState.RUNNING)
            return repr(await service.health()) + repr(await service.status("task-1"))

    told = asyncio.run(play())
    assert [order.secrets for order in world.runners.orders] == [{"TOKEN": VALUE}]
    found = bytes_below(world.data_dir)
    assert b"SERVER_TOKEN" in found
    assert VALUE.encode() not in found
    assert VALUE not in told + caplog.text + repr(world.runners.orders)


def test_a_finisher_knows_them_too_to_keep_them_out_of_what_it_collects(world):
    world.secrets = {"TOKEN": VALUE}

    async def play():
        async with world.server() as service:
            await service.submit(with_secret())
            await world.launched("task-1")
            world.runners.die("task-1")
            await world.launched("task-1", 2)

    asyncio.run(play())
    assert [order.secrets for order in world.runners.orders] == [{"TOKEN": VALUE}, {"TOKEN": VALUE}]
    assert [order.upstream for order in world.runners.orders][1] is None
    assert world.secrets_asked == ["TOKEN", "TOKEN"]


def test_a_finisher_is_started_also_when_they_cannot_be_had_any_more(world):
    world.secrets = {"TOKEN": VALUE}

    async def play():
        async with world.server() as service:
            await service.submit(with_secret())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING[:1])
            world.secrets = {}
            world.runners.die("task-1")
            await world.launched("task-1", 2)

    asyncio.run(play())
    assert [order.secrets for order in world.runners.orders] == [{"TOKEN": VALUE}, {}]


def test_a_secret_that_cannot_be_had_fails_the_task_before_anything_is_made(world):
    async def play():
        async with world.server() as service:
            await service.submit(with_secret())
            return await service.wait("task-1", 10)

    failed = asyncio.run(play())
    assert (failed.state, failed.failure.code) == (TaskState.FAILED, "secret_unavailable")
    assert failed.failure.message == "Secret TOKEN is not here."
    assert [entry.state for entry in failed.history] == [TaskState.PENDING, TaskState.FAILED]
    assert world.runners.orders == []
    kinds = [type(record.event) for record in read_records(world.journals, "task-1")]
    assert AttemptStarted not in kinds


def test_a_source_that_breaks_fails_the_task_without_telling_what_it_said(world, monkeypatch, caplog):
    async def breaks(_):
        raise ValueError(f"odd answer: {VALUE}")

    monkeypatch.setattr(world, "resolve", breaks)

    async def play():
        async with world.server() as service:
            await service.submit(with_secret())
            return await service.wait("task-1", 10)

    failed = asyncio.run(play())
    assert failed.failure.code == "secret_unavailable"
    assert "ValueError" in failed.failure.message
    assert VALUE.encode() not in bytes_below(world.data_dir)
    assert VALUE not in caplog.text


def test_secrets_are_asked_for_when_a_task_begins_and_not_while_it_waits(world):
    world.capacity = Resources(4, 10**12, 10**12)
    world.secrets = {"TOKEN": VALUE}

    async def play():
        async with world.server() as service:
            await service.submit(manifest("first"))
            await service.submit(with_secret("second"))
            await world.launched("first")
            return list(world.secrets_asked)

    assert asyncio.run(play()) == []


def test_a_wish_to_cancel_does_not_wait_for_a_slow_source(world, monkeypatch):
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(_):
        asked.set()
        await answer.wait()
        return {"TOKEN": VALUE}

    monkeypatch.setattr(world, "resolve", slow)

    async def play():
        async with world.server() as service:
            await service.submit(with_secret())
            await asyncio.wait_for(asked.wait(), 10)
            await asyncio.wait_for(service.cancel("task-1", reason="", force=False), 5)
            answer.set()
            return await service.wait("task-1", 10)

    assert asyncio.run(play()).state is TaskState.CANCELLED
    assert world.runners.orders == []
