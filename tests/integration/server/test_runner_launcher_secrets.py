"""Secrets are resolved at launch, passed to the runner, and stored nowhere."""

import asyncio
import logging

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING, ServerComponents
from sandbox.interfaces.runner import FinishAttempt
from sandbox.model.events import AttemptStarted
from sandbox.model.manifest.schema import Secret
from sandbox.model.resources import Resources
from sandbox.model.task_state import TaskState
from sandbox.runner.attempt_context import read_records
from sandbox.store.sqlite import SqliteStore

VALUE = "t0p-secret-value-of-a-test"
SECRET = Secret(name="TOKEN", source="env", key="SERVER_TOKEN")


def with_secret(task_id="task-1"):
    return manifest(task_id).replace(secrets=(SECRET,))


@pytest.fixture
def components(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 0.1)
    instance = ServerComponents(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)


def bytes_below(directory):
    return b"".join(file.read_bytes() for file in directory.rglob("*") if file.is_file())


async def test_secret_values_are_passed_to_the_runner_and_not_stored(components, caplog):
    components.secrets = {"TOKEN": VALUE}
    caplog.set_level(logging.DEBUG)

    async def scenario():
        async with components.server() as service:
            await service.submit(with_secret())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING)
            await components.wait_for_state(service, "task-1", TaskState.RUNNING)
            return repr(await service.health()) + repr(await service.status("task-1"))

    output = await scenario()
    assert [order.secrets for order in components.placement.orders] == [{"TOKEN": VALUE}]
    stored = bytes_below(components.data_dir)
    assert b"SERVER_TOKEN" in stored
    assert VALUE.encode() not in stored
    assert VALUE not in output + caplog.text + repr(components.placement.orders)


async def test_finisher_gets_the_secrets_for_redaction(components):
    components.secrets = {"TOKEN": VALUE}

    async def scenario():
        async with components.server() as service:
            await service.submit(with_secret())
            await components.wait_for_launch("task-1")
            components.placement.kill("task-1")
            await components.wait_for_launch("task-1", 2)

    await scenario()
    assert [order.secrets for order in components.placement.orders] == [{"TOKEN": VALUE}, {"TOKEN": VALUE}]
    assert isinstance(components.placement.orders[1], FinishAttempt)
    assert components.requested_secrets == ["TOKEN", "TOKEN"]


async def test_finisher_is_launched_if_secrets_are_unavailable(components):
    components.secrets = {"TOKEN": VALUE}

    async def scenario():
        async with components.server() as service:
            await service.submit(with_secret())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING[:1])
            components.secrets = {}
            components.placement.kill("task-1")
            await components.wait_for_launch("task-1", 2)

    await scenario()
    assert [order.secrets for order in components.placement.orders] == [{"TOKEN": VALUE}, {}]


async def test_missing_secret_fails_the_task_before_the_attempt(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(with_secret())
            return await service.wait("task-1", 10)

    failed = await scenario()
    assert (failed.state, failed.failure.code) == (TaskState.FAILED, "secret_unavailable")
    assert failed.failure.message == "Secret TOKEN is not available."
    assert [entry.state for entry in failed.history] == [TaskState.PENDING, TaskState.FAILED]
    assert components.placement.orders == []
    kinds = [type(record.event) for record in read_records(components.journals, "task-1")]
    assert AttemptStarted not in kinds


async def test_failing_secret_source_fails_the_task_without_leaks(components, monkeypatch, caplog):
    async def raise_error(_):
        raise ValueError(f"invalid response: {VALUE}")

    monkeypatch.setattr(components, "resolve", raise_error)

    async def scenario():
        async with components.server() as service:
            await service.submit(with_secret())
            return await service.wait("task-1", 10)

    failed = await scenario()
    assert failed.failure.code == "secret_unavailable"
    assert "ValueError" in failed.failure.message
    assert VALUE.encode() not in bytes_below(components.data_dir)
    assert VALUE not in caplog.text


async def test_secrets_of_a_pending_task_are_not_resolved(components):
    components.capacity = Resources(4, 10**12, 10**12)
    components.secrets = {"TOKEN": VALUE}

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest("first"))
            await service.submit(with_secret("second"))
            await components.wait_for_launch("first")
            return list(components.requested_secrets)

    assert (await scenario()) == []


async def test_cancel_does_not_wait_for_a_slow_secret_source(components, monkeypatch):
    is_requested, may_respond = asyncio.Event(), asyncio.Event()

    async def resolve_slowly(_):
        is_requested.set()
        await may_respond.wait()
        return {"TOKEN": VALUE}

    monkeypatch.setattr(components, "resolve", resolve_slowly)

    async def scenario():
        async with components.server() as service:
            await service.submit(with_secret())
            await asyncio.wait_for(is_requested.wait(), 10)
            await asyncio.wait_for(service.cancel("task-1", reason="", force=False), 5)
            may_respond.set()
            return await service.wait("task-1", 10)

    assert (await scenario()).state is TaskState.CANCELLED
    assert components.placement.orders == []
