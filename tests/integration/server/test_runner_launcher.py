"""Launch orders for runners and finishers, and replay of events."""

import asyncio
import itertools
import os
import threading
import time
from pathlib import Path

import pytest

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import TO_RUNNING, ServerComponents
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.runner import FinishAttempt
from sandbox.interfaces.store import IndexedTask
from sandbox.model.artifacts import Artifact
from sandbox.model.events import (
    AgentExited,
    ArtifactCollected,
    AttemptFailed,
    AttemptTornDown,
    CancelRequested,
    ErrorReported,
    Output,
    TaskFinished,
)
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import FINISHERS_MAX
from sandbox.model.task_state import TaskState
from sandbox.runner.attempt_context import read_records

LOST = AttemptFailed(Failure(FailureCode.RUNNER_LOST, "gone"))
UPSTREAM = ModelUpstream("https://model.example", api_key="sk-secret")


@pytest.fixture
def components(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 0.1)
    instance = ServerComponents(tmp_path, MemoryStore(), upstream=UPSTREAM)
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)


async def collect(events):
    return [event async for event in events]


async def test_finisher_does_not_get_the_model_key(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING)
            components.placement.kill("task-1")
            await components.wait_for_launch("task-1", 2)

    await scenario()
    first, finisher = components.placement.orders
    assert (first.upstream, type(finisher)) == (UPSTREAM, FinishAttempt)


def test_runner_that_never_started_is_followed_by_another_attempt(components):
    """The server dies after it records the attempt and before it starts the runner, so there are no leftovers."""

    async def before():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")

    async def after():
        async with components.server() as service:
            await components.wait_for_launch("task-1", 2)
            components.placement.record("task-1", LOST, AttemptTornDown())
            components.placement.kill("task-1")
            await components.wait_for_launch("task-1", 3)
            components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
            return await service.wait("task-1", 10)

    asyncio.run(before())
    components.placement.kill("task-1")
    task = asyncio.run(after())
    assert (task.state, task.attempt_count) == (TaskState.COMPLETED, 2)
    first, finisher, second = components.placement.orders
    assert [isinstance(order, FinishAttempt) for order in (first, finisher, second)] == [False, True, False]
    assert finisher.attempt_id == first.attempt_id
    assert task.attempt.id == second.attempt_id != first.attempt_id
    assert second.upstream == UPSTREAM


async def test_task_fails_if_its_runners_repeatedly_die_immediately(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            for count in range(1, 2 + FINISHERS_MAX):
                await components.wait_for_launch("task-1", count)
                if isinstance(components.placement.orders[-1], FinishAttempt):
                    components.placement.record("task-1", LOST, AttemptTornDown())
                components.placement.kill("task-1")
            await components.wait_for_launch("task-1", 6)
            components.placement.record("task-1", LOST, TaskFinished())
            return await service.wait("task-1", 10)

    task = await scenario()
    assert (task.state, task.attempt_count) == (TaskState.FAILED, 3)
    assert [isinstance(order, FinishAttempt) for order in components.placement.orders] == [False, True] * 3


@pytest.mark.parametrize(("failure_kind", "code"), [("image", "provision_failed"), ("launch", "internal_error")])
async def test_task_whose_next_attempt_cannot_be_launched_is_ended_by_a_finisher(components, failure_kind, code):
    """Without a finisher, the server ends only a first attempt, because only a first attempt has no leftovers."""

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", LOST, AttemptTornDown())
            if failure_kind == "image":
                components.image_error = "The image is gone."
            else:
                components.placement.launch_error = OSError("no more processes")
            components.placement.kill("task-1")
            async with asyncio.timeout(10):
                while failure_kind == "launch" and not components.placement.failure_count:
                    await asyncio.sleep(0.01)
            components.placement.launch_error = None
            await components.wait_for_launch("task-1", 2)
            components.placement.record("task-1", TaskFinished())
            return await service.wait("task-1", 10)

    task = await scenario()
    assert (task.state, task.failure.code) == (TaskState.FAILED, code)
    assert [isinstance(order, FinishAttempt) for order in components.placement.orders] == [False, True]
    assert components.placement.orders[1].attempt_id == task.attempt.id


async def test_cancelled_task_with_a_dead_runner_has_no_further_attempt(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", CancelRequested("enough"))
            components.placement.kill("task-1")
            await components.wait_for_launch("task-1", 2)

    await scenario()
    assert [isinstance(order, FinishAttempt) for order in components.placement.orders] == [False, True]


async def test_cancel_with_a_dead_runner_is_recorded_before_the_finisher(components, monkeypatch):
    # Disable the periodic check, so only the cancel request detects the lost runner.
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 60.0)
    launch, cancel_requests = components.placement.launch, []

    async def recording_launch(order, writer):
        handle = await launch(order, writer)
        cancel_requests.append(components.placement.recorders["task-1"].task.cancel)
        return handle

    monkeypatch.setattr(components.placement, "launch", recording_launch)

    async def scenario():
        async with components.server() as service:
            await components.start_running_task(service)
            components.placement.kill("task-1")
            await service.cancel("task-1", reason="enough", force=False)
            monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 0.05)
            await components.wait_for_launch("task-1", 2)

    await scenario()
    assert cancel_requests == [None, CancelRequested("enough")]


async def test_finisher_backoff_grows(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.4)
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_FACTOR", 3)
    launched_at = []

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING)
            for count in range(1, 2 + FINISHERS_MAX):
                await components.wait_for_launch("task-1", count)
                launched_at.append(time.monotonic())
                components.placement.kill("task-1")
                while count == 3 and "tried after a pause" not in (await service.status("task-1")).state_message:
                    await asyncio.sleep(0.01)
            await service.wait("task-1", 20)
            launched_at.append(time.monotonic())

    await scenario()
    _, *backoffs, end = (later - earlier for earlier, later in itertools.pairwise(launched_at))
    assert [backoff > minimum for backoff, minimum in zip(backoffs, (0.4, 1.2, 3.6), strict=True)] == [True] * 3
    assert end < 3.6


async def test_forced_cancel_skips_the_finisher_backoff(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 300.0)

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING)
            await components.kill_runners("task-1", 2)
            await service.cancel("task-1", reason="", force=True)
            await components.wait_for_launch("task-1", 3)

    await scenario()
    assert [isinstance(order, FinishAttempt) for order in components.placement.orders] == [False, True, True]


async def test_running_task_ends_after_all_finishers_die(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING)
            await components.kill_runners("task-1", 1 + FINISHERS_MAX)
            return await service.wait("task-1", 20)

    task = await scenario()
    assert (task.state, task.failure.code) == (TaskState.FAILED, "runner_lost")
    kinds = [type(record.event) for record in read_records(components.journals, "task-1")]
    assert kinds[-2:] == [AgentExited, TaskFinished]


async def run_until_finishers_are_exhausted(components, *events):
    """Record these events, let the runner and then all finishers die, and return the task."""
    async with components.server() as service:
        await service.submit(manifest())
        await components.wait_for_launch("task-1")
        components.placement.record("task-1", *TO_RUNNING, *events)
        await components.kill_runners("task-1", 1 + FINISHERS_MAX)
        return await service.wait("task-1", 20)


async def test_successful_task_with_collected_artifacts_completes_without_a_teardown(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)
    metadata = Artifact("metadata.json", ".sandbox/metadata.json", 2, "application/json", "sha256:0")

    task = await run_until_finishers_are_exhausted(components, TO_COMPLETED[0], ArtifactCollected(metadata))
    assert (task.state, task.failure) == (TaskState.COMPLETED, None)
    *_, error, finished = [record.event for record in read_records(components.journals, "task-1")]
    assert isinstance(error, ErrorReported)
    assert (error.error, finished) == ("teardown_failed", TaskFinished())


async def test_successful_task_with_partially_collected_artifacts_fails(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)
    patch = Artifact("task-1.patch", ".sandbox/task-1.patch", 2, "text/x-diff", "sha256:0")

    task = await run_until_finishers_are_exhausted(components, TO_COMPLETED[0], ArtifactCollected(patch))
    assert (task.state, task.failure.code) == (TaskState.FAILED, "collect_failed")
    assert "The agent had ended" in task.failure.message


async def test_recorded_agent_failure_is_reported_even_without_a_teardown(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)

    failed = AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It gave up."))
    assert (await run_until_finishers_are_exhausted(components, failed)).failure == failed.failure


def test_replay_after_a_position_has_no_gaps_or_duplicates(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            lines = [Output.from_bytes("stdout", b"%d\n" % number) for number in range(5)]
            components.placement.record("task-1", *TO_RUNNING, *lines, *TO_COMPLETED)
            await service.wait("task-1", 10)
            events = await collect(service.recorded_events("task-1"))
            for position in (0, 1, 6, 8, events[-2]["seq"]):
                rest = [event for event in events if event["seq"] > position]
                assert await collect(service.recorded_events("task-1", after=position)) == rest
                assert await collect(service.follow("task-1", after=position)) == rest
            return events

    assert [event["seq"] for event in asyncio.run(scenario())] == list(range(1, 14))


async def test_follow_all_starts_with_the_first_record_of_a_new_task(components):
    async def scenario():
        async with components.server() as service:
            stream = service.follow_all()
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            await service.submit(manifest())
            event = await asyncio.wait_for(first, 10)
            await stream.aclose()
            return event

    event = await scenario()
    assert (event["task_id"], event["seq"], event["new_state"]) == ("task-1", 1, "pending")


def test_rewritten_record_is_published_once(components, monkeypatch):
    """The flush fails after the record was read and published."""
    fdatasync, published, failed_flushes = os.fdatasync, threading.Event(), []

    def fail_after_publishing(descriptor):
        if not failed_flushes and b"agent_started" in Path(f"/proc/self/fd/{descriptor}").read_bytes():
            failed_flushes.append(published.wait(10))
            raise OSError(5, "Input/output error")
        fdatasync(descriptor)

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            task_events, all_events = [], []

            async def receive(stream, received):
                async for event in stream:
                    received.append((event["seq"], event["type"]))
                    if all(events and events[-1][0] == 5 for events in (task_events, all_events)):
                        published.set()
                    if event["type"] == "end":
                        return

            receivers = [
                asyncio.create_task(receive(service.follow("task-1", after=0), task_events)),
                asyncio.create_task(receive(service.follow_all(), all_events)),
            ]
            await asyncio.sleep(0)
            components.placement.record("task-1", *TO_RUNNING[:2])
            monkeypatch.setattr("sandbox.journal.writer.os.fdatasync", fail_after_publishing)
            with pytest.raises(OSError, match="Input/output"):
                await asyncio.to_thread(components.placement.record, "task-1", TO_RUNNING[2])
            await components.wait_for_state(service, "task-1", TaskState.READY)
            components.placement.record("task-1", TO_RUNNING[2], *TO_COMPLETED)
            await asyncio.wait_for(asyncio.gather(*receivers), 10)
            return task_events, all_events

    for received in asyncio.run(scenario()):
        seqs = [seq for seq, _ in received]
        assert seqs == sorted(set(seqs))
    assert failed_flushes == [True]


def test_index_row_whose_task_does_not_match_its_offset_is_reloaded(components):
    """After a power loss, the index can contain a current offset and an older task."""

    async def before():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING[:2])
            await components.wait_for_state(service, "task-1", TaskState.READY)

    async def after():
        async with components.server() as service:
            components.placement.record("task-1", TO_RUNNING[2])
            await components.wait_for_state(service, "task-1", TaskState.RUNNING)
            return [event["seq"] for event in await collect(service.recorded_events("task-1"))]

    asyncio.run(before())
    first_two = b"".join(
        (components.data_dir / "tasks/task-1/journal/records").read_bytes().splitlines(keepends=True)[:2]
    )
    components.store.save(IndexedTask(components.store.load("task-1").task, len(first_two)))
    assert asyncio.run(after()) == [1, 2, 3, 4, 5]
