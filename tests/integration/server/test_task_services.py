"""The task service: submit, schedule, launch, follow, cancel and recover tasks."""

import asyncio
import contextlib
import threading

import pytest

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import GIB, TO_RUNNING
from sandbox.interfaces.runner import FinishAttempt
from sandbox.interfaces.server_services import (
    InsufficientResourcesError,
    TaskEndedError,
    TaskNotFoundError,
    UnavailableError,
)
from sandbox.interfaces.store import DuplicateTaskError, TaskQuery
from sandbox.journal.journals import FileJournals
from sandbox.model import fixed_limits
from sandbox.model.events import AgentExited, AttemptFailed, Idempotency, Output, TaskFinished
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import FINISHERS_MAX
from sandbox.model.resources import Resources
from sandbox.model.task_state import TaskState
from sandbox.primitives import fair_client_shares
from sandbox.primitives.fair_client_shares import CONCURRENT_THREADS_MAX, FairShares
from sandbox.server.index_writer import IndexWriter


async def collect(events):
    return [event async for event in events]


async def collect_until_end(events):
    """Return the events of all tasks until one of the tasks has ended."""
    collected = []
    async with contextlib.aclosing(events):
        while not collected or collected[-1]["type"] != "end":
            collected.append(await anext(events))
    return collected


async def test_check_acceptance_matches_submit_and_has_no_effect(components):
    components.capacity = Resources(8, 16 * GIB, 100 * GIB)
    async with components.server() as service:
        await service.check_acceptance(manifest())
        with pytest.raises(InsufficientResourcesError):
            await service.check_acceptance(manifest(vm={"cpus": 9}))
        assert (await service.query(TaskQuery())).total_count == 0
        assert not components.placement.orders
        await service.submit(manifest())
        with pytest.raises(DuplicateTaskError):
            await service.check_acceptance(manifest())
        await service.check_acceptance(manifest("task-2"))
        await components.wait_for_launch("task-1")
        components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
        await service.wait("task-1", 10)


async def test_task_is_submitted_launched_followed_and_completed(components):
    async def scenario():
        async with components.server() as service:
            submitted = await service.submit(manifest())
            assert not submitted.is_replayed
            assert submitted.task.state is TaskState.PENDING
            await components.wait_for_launch("task-1")
            followed = asyncio.create_task(collect(service.follow("task-1", after=0)))
            components.placement.record("task-1", *TO_RUNNING, Output.from_bytes("stdout", b"hello\n"), *TO_COMPLETED)
            task = await service.wait("task-1", 10)
            assert task.state is TaskState.COMPLETED
            return await followed

    events = await scenario()
    states = [event["new_state"] for event in events if event["type"] == "state_change"]
    assert states == ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
    assert events[-1]["type"] == "end"
    assert events[-1]["state"] == "completed"
    assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})
    assert [event["data"] for event in events if event["type"] == "output"] == ["hello\n"]


async def test_task_is_durable_before_submit_returns(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            return FileJournals(components.data_dir).task_ids(), components.store.load("task-1")

    ids, indexed = await scenario()
    assert list(ids) == ["task-1"]
    assert indexed.task.id == "task-1"


async def test_task_without_an_id_gets_a_generated_one(components):
    async def scenario():
        async with components.server() as service:
            return [(await service.submit(manifest(""))).task.id for _ in range(2)]

    first, second = await scenario()
    assert first != second
    assert len(first) == 36


async def test_duplicate_id_is_rejected(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            with pytest.raises(DuplicateTaskError) as raised:
                await service.submit(manifest())
            results = await asyncio.gather(
                *(service.submit(manifest("task-2")) for _ in range(8)), return_exceptions=True
            )
            return raised.value.existing.id, [type(each).__name__ for each in results]

    existing, kinds = await scenario()
    assert existing == "task-1"
    assert kinds.count("Submission") == 1


async def test_oversized_task_is_rejected_and_task_without_free_resources_waits(components):
    components.capacity = Resources(8, 100 * GIB, 100 * GIB)
    async with components.server() as service:
        with pytest.raises(InsufficientResourcesError, match=r"requests 9 CPUs \(8 in all\), more than"):
            await service.submit(manifest("huge", vm={"cpus": 9}))
        await service.submit(manifest("first", vm={"cpus": 8}))
        await service.submit(manifest("second", vm={"cpus": 1}))
        await components.wait_for_launch("first")
        waiting = await service.status("second")
        assert (waiting.state, waiting.state_message) == (TaskState.PENDING, "Waiting for 1 CPUs (0 free)")
        components.placement.record("first", *TO_RUNNING, *TO_COMPLETED)
        await components.wait_for_launch("second")


async def test_task_that_fits_on_any_host_of_the_cluster_is_accepted(components):
    components.capacity = Resources(8, 100 * GIB, 100 * GIB)
    components.maximal_host_sizes = [components.capacity, Resources(2, 900 * GIB, 100 * GIB)]
    components.available_memory_bytes = 1
    async with components.server() as service:
        with pytest.raises(InsufficientResourcesError, match=r"9 CPUs \(8 in all\), more than any host of the cluster"):
            await service.submit(manifest("huge", vm={"cpus": 9}))
        for number in range(3):
            await service.submit(manifest(f"task-{number}", vm={"cpus": 8}))
        await service.submit(manifest("memory", vm={"cpus": 1, "memory": "800G"}))
        for task_id in ("task-0", "task-1", "task-2", "memory"):
            await components.wait_for_launch(task_id)


async def test_submission_above_the_limit_on_unfinished_tasks_is_refused(components):
    components.unfinished_tasks_max = 3
    async with components.server() as service:
        names = [f"task-{number}" for number in range(8)]
        results = await asyncio.gather(*map(service.submit, map(manifest, names)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, UnavailableError)]
        assert len(refused) == 5
        assert str(refused[0]) == "The server has 3 unfinished tasks, its maximum; submit the task again later."
        with pytest.raises(UnavailableError, match="unfinished"):
            await service.check_acceptance(manifest("another"))
        await components.wait_for_launch("task-0")
        components.placement.record("task-0", *TO_RUNNING, *TO_COMPLETED)
        await service.wait("task-0", 10)
        await asyncio.sleep(0.1)
        await service.check_acceptance(manifest("another"))
        await service.submit(manifest("another"))


async def test_submission_that_is_being_indexed_counts_as_unfinished(components, monkeypatch):
    components.unfinished_tasks_max = 3
    is_released, save_all = threading.Event(), components.store.save_all

    def wait_and_save(indexed):
        assert is_released.wait(20)
        save_all(indexed)

    async with components.server() as service:
        monkeypatch.setattr(components.store, "save_all", wait_and_save)
        accepted = [asyncio.create_task(service.submit(manifest(f"task-{number}"))) for number in range(3)]
        async with asyncio.timeout(20):
            while len(components.journals.task_ids()) < 3:
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        try:
            with pytest.raises(UnavailableError, match="3 unfinished tasks"):
                await asyncio.wait_for(service.submit(manifest("another")), 5)
        finally:
            is_released.set()
        await asyncio.gather(*accepted)


async def test_submission_above_the_total_size_of_unfinished_manifests_is_refused(components, monkeypatch):
    monkeypatch.setattr(fixed_limits, "UNFINISHED_MANIFEST_BYTES_MAX", 30_000)
    large = {"name": "n" * 20_000}
    key = Idempotency("key", "0" * 64)
    async with components.server() as service:
        await service.submit(manifest("first", **large), key)
        with pytest.raises(UnavailableError, match="The manifests of unfinished tasks"):
            await service.submit(manifest("second", **large))
        await service.submit(manifest("small"))
        assert (await service.submit(manifest("first", **large), key)).is_replayed
    monkeypatch.setattr(fixed_limits, "UNFINISHED_MANIFEST_BYTES_MAX", 1000)
    async with components.server() as service:
        assert not (await service.status("first")).state.is_final
        with pytest.raises(UnavailableError):
            await service.submit(manifest("third"))


async def test_pending_task_is_cancelled_without_a_runner(components):
    components.capacity = Resources(4, 100 * GIB, 100 * GIB)

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest("first"))
            await service.submit(manifest("second"))
            cancelled = await service.cancel("second", reason="not needed", force=False)
            assert cancelled.task_before.state is TaskState.PENDING
            assert cancelled.requested_at == components.journals.replay("second").task.cancel_requested_at
            assert (await service.wait("second", 10)).state is TaskState.CANCELLED
            with pytest.raises(TaskEndedError):
                await service.cancel("second", reason="", force=False)
            await components.wait_for_launch("first")
            components.placement.record("first", *TO_RUNNING, *TO_COMPLETED)
            await service.wait("first", 10)
        return [order.task_id for order in components.placement.orders]

    assert (await scenario()) == ["first"]


async def test_cancel_is_durable_and_sent_to_the_runner(components):
    async def scenario():
        async with components.server() as service:
            await components.start_running_task(service)
            await service.cancel("task-1", reason="why not", force=False)
            assert components.journals.replay("task-1").task.cancel.reason == "why not"
            components.placement.record(
                "task-1", AgentExited(143, None, Failure(FailureCode.AGENT_FAILED, "x")), TaskFinished()
            )
            return (await service.wait("task-1", 10)).state

    assert (await scenario()) is TaskState.CANCELLED


async def test_repeated_cancel_returns_the_time_of_the_first_request(components):
    async with components.server() as service:
        await components.start_running_task(service)
        first = await service.cancel("task-1", reason="why not", force=False)
        recorded = components.journals.replay("task-1").task.cancel_requested_at
        status = await service.status("task-1")
        second = await service.cancel("task-1", reason="", force=True)
        assert (first.task_before.state, first.state) == (TaskState.RUNNING, TaskState.RUNNING)
        assert first.requested_at == second.requested_at == status.cancel_requested_at == recorded
        assert status.cancel is not None
        assert status.cancel.reason == "why not"


def test_restarted_server_resumes_all_tasks(components):
    components.capacity = Resources(8, 100 * GIB, 100 * GIB)

    async def before():
        async with components.server() as service:
            for name in ("running", "cancelled-late", "waiting"):
                await service.submit(manifest(name, vm={"cpus": 4}))
            await components.wait_for_launch("running")
            components.placement.record("running", *TO_RUNNING, Output.from_bytes("stdout", b"1\n"))
            await components.wait_for_state(service, "running", TaskState.RUNNING)

    async def after():
        async with components.server() as service:
            components.placement.record("running", Output.from_bytes("stdout", b"2\n"), *TO_COMPLETED)
            await service.wait("running", 10)
            await components.wait_for_launch("waiting")
            return await collect(service.follow("running", after=0))

    asyncio.run(before())
    components.placement.record(
        "cancelled-late", AttemptFailed(Failure(FailureCode.CLONE_FAILED, "no")), TaskFinished()
    )
    events = asyncio.run(after())
    assert [event["data"] for event in events if event["type"] == "output"] == ["1\n", "2\n"]
    *results, last = [order.task_id for order in components.placement.orders]
    assert (sorted(results), last) == (["cancelled-late", "running"], "waiting")
    assert components.store.load("cancelled-late").task.state is TaskState.FAILED


def test_lost_index_is_rebuilt_from_the_journals(components):
    async def before():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
            await service.wait("task-1", 10)

    async def after():
        async with components.server() as service:
            return (await service.status("task-1")).state, (await service.query(TaskQuery())).total_count

    asyncio.run(before())
    components.store = MemoryStore()
    assert asyncio.run(after()) == (TaskState.COMPLETED, 1)


async def test_lost_runner_is_detected_and_a_finisher_launched(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING)
            components.placement.kill("task-1")
            await components.wait_for_launch("task-1", 2)
            assert [isinstance(order, FinishAttempt) for order in components.placement.orders] == [False, True]
            assert len({order.attempt_id for order in components.placement.orders}) == 1
            lost = Failure(FailureCode.RUNNER_LOST, "lost")
            components.placement.record("task-1", AgentExited(None, None, lost), TaskFinished())
            return await service.wait("task-1", 10)

    assert (await scenario()).failure.code == "runner_lost"


async def test_task_ends_after_all_finishers_die(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING[:1])
            await components.kill_runners("task-1", 1 + FINISHERS_MAX)
            return await service.wait("task-1", 20)

    assert (await scenario()).failure.code == "runner_lost"


async def test_cancel_of_a_task_with_a_dead_runner_is_recorded(components):
    async def scenario():
        async with components.server() as service:
            await components.start_running_task(service)
            components.placement.kill("task-1")
            await service.cancel("task-1", reason="", force=False)
            await components.wait_for_launch("task-1", 2)
            lost = Failure(FailureCode.RUNNER_LOST, "lost")
            components.placement.record("task-1", AgentExited(None, None, lost), TaskFinished())
            return (await service.wait("task-1", 10)).state

    assert (await scenario()) is TaskState.CANCELLED


async def test_failing_launch_fails_the_task(components):
    components.placement.launch_error = OSError("no more processes")

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            return await service.wait("task-1", 10)

    failed = await scenario()
    assert failed.failure.code == "internal_error"
    assert "no more processes" in failed.failure.message


async def test_submit_is_rejected_while_the_server_is_not_ready(components):
    components.kinds_without_key = {"claude"}

    async def scenario():
        async with components.server() as service:
            health = await service.health()
            assert not health.is_ready
            with pytest.raises(UnavailableError, match="No model key is set: set CLAUDE_KEY and restart"):
                await service.submit(manifest())

    await scenario()
    assert not components.journals.task_ids()


async def test_health_check_does_not_wait_for_the_threads_of_one_client(components):
    share, released = FairShares().of("vera"), asyncio.Event()

    async def read_a_long_list():
        fair_client_shares.set_current_share(share)
        async with fair_client_shares.thread_slot():
            await released.wait()

    async with components.server() as service, asyncio.TaskGroup() as lists:
        for _ in range(2 * CONCURRENT_THREADS_MAX):
            lists.create_task(read_a_long_list())
        fair_client_shares.set_current_share(share)
        try:
            async with asyncio.timeout(30):
                while not share.threads.locked():
                    await asyncio.sleep(0)
                assert (await service.health()).is_ready
        finally:
            released.set()


async def test_health_check_does_not_wait_for_the_threads_of_all_clients(components):
    released, work = threading.Event(), []
    async with components.server() as service:
        try:
            work += [asyncio.create_task(asyncio.to_thread(released.wait, 30)) for _ in range(100)]
            await asyncio.sleep(0)
            async with asyncio.timeout(10):
                assert (await service.health()).is_ready
        finally:
            released.set()
            await asyncio.gather(*work)


async def test_later_health_requests_share_the_next_check(components, monkeypatch):
    started, released, counts = threading.Event(), threading.Event(), []

    def count_slowly(_):
        started.set()
        released.wait(30)
        counts.append(1)
        return {}

    async with components.server() as service:
        monkeypatch.setattr(MemoryStore, "count_by_state", count_slowly)
        first = asyncio.create_task(service.health())
        assert await asyncio.to_thread(started.wait, 30)
        await service.drain()
        later = [asyncio.create_task(service.health()) for _ in range(50)]
        await asyncio.sleep(0)
        later[0].cancel()
        released.set()
        await first
        reports = await asyncio.gather(*later[1:])
    assert len(counts) == 2
    assert all(report.draining_since is not None for report in reports)


async def test_unknown_task_raises_not_found(components):
    async with components.server() as service:
        for call in (
            service.status("nope"),
            service.cancel("nope", reason="", force=False),
            service.wait("nope", 1),
            service.artifacts("nope"),
            collect(service.follow("nope")),
            collect(service.recorded_events("nope")),
        ):
            with pytest.raises(TaskNotFoundError):
                await call


async def test_follow_during_submit_gets_every_event(components, monkeypatch):
    """A task is in the index for a moment before its journal is tailed."""

    async def scenario():
        async with components.server() as service:
            is_indexed, may_continue = asyncio.Event(), asyncio.Event()
            save = IndexWriter.save

            async def save_slowly(*args):
                await save(*args)
                is_indexed.set()
                await may_continue.wait()

            monkeypatch.setattr(IndexWriter, "save", save_slowly)
            submitting = asyncio.create_task(service.submit(manifest()))
            await asyncio.wait_for(is_indexed.wait(), 10)
            following = asyncio.create_task(collect(service.follow("task-1", after=0)))
            await asyncio.sleep(0.1)
            may_continue.set()
            await submitting
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
            return await asyncio.wait_for(following, 10)

    events = await scenario()
    assert events[-1]["type"] == "end"
    assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})


async def test_concurrent_drain_and_undo_are_consistent(components):
    async with components.server() as service:
        await asyncio.gather(*(service.drain() for _ in range(50)), *(service.undo_drain() for _ in range(50)))
        assert (await service.undo_drain()).since is None
        assert (await service.drain()).since is not None


async def test_follow_from_now_starts_with_the_current_state(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING, Output.from_bytes("stdout", b"old\n"))
            async with asyncio.timeout(10):
                while (await service.status("task-1")).last_seq < 6:
                    await asyncio.sleep(0.005)
            stream = service.follow("task-1")
            first = await anext(stream)
            components.placement.record("task-1", Output.from_bytes("stdout", b"new\n"), *TO_COMPLETED)
            return first, await collect(stream)

    first, rest = await scenario()
    assert (first["previous_state"], first["new_state"]) == (None, "running")
    assert [event["data"] for event in rest if event["type"] == "output"] == ["new\n"]
    assert rest[-1]["type"] == "end"


async def test_follow_all_includes_every_task(components):
    async def scenario():
        async with components.server() as service:
            events = []
            stream = service.follow_all()
            next_event = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            for name in ("a", "b"):
                await service.submit(manifest(name))
            events.append(await next_event)
            for name in ("a", "b"):
                await components.wait_for_launch(name)
                components.placement.record(name, *TO_RUNNING, *TO_COMPLETED)
            async with asyncio.timeout(10):
                while sum(event["type"] == "end" for event in events) < 2:
                    events.append(await anext(stream))
            await stream.aclose()
            return events

    events = await scenario()
    assert {event["task_id"] for event in events} == {"a", "b"}


def test_index_ahead_of_its_journal_is_reloaded(components):
    """After a power loss, the journal may have lost its last records although the index has them."""

    async def before():
        async with components.server() as service:
            await components.start_running_task(service)

    async def after():
        async with components.server() as service:
            await components.wait_for_launch("task-1", 2)
            return (await service.status("task-1")).state

    asyncio.run(before())
    components.placement.kill("task-1")
    records = components.data_dir / "tasks/task-1/journal/records"
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:3]))
    assert asyncio.run(after()) is TaskState.PROVISIONING


def test_follow_all_includes_the_end_of_a_truncated_journal(components, caplog):
    """The finisher reuses the sequence numbers of the lost records."""
    caplog.set_level("INFO", "sandbox.server.journal_tailer")

    async def before():
        async with components.server() as service:
            await components.start_running_task(service)

    async def after():
        async with components.server() as service:
            events = asyncio.create_task(collect_until_end(service.follow_all()))
            await components.wait_for_launch("task-1", 2)
            caplog.clear()
            components.placement.record("task-1", AttemptFailed(Failure(FailureCode.HOST_LOST, "lost")), TaskFinished())
            return await asyncio.wait_for(events, 10)

    asyncio.run(before())
    components.placement.kill("task-1")
    records = components.data_dir / "tasks/task-1/journal/records"
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:3]))
    events = asyncio.run(after())
    assert [event["new_state"] for event in events if event["type"] == "state_change"] == ["failed"]
    assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})
    assert "Task task-1 is failed" in caplog.messages


def test_damaged_journal_does_not_block_the_server_start(components):
    components.capacity = Resources(4, 100 * GIB, 100 * GIB)

    async def before():
        async with components.server() as service:
            for name in ("first", "damaged", "last"):
                await service.submit(manifest(name))

    async def after():
        async with components.server() as service:
            return (await service.status("damaged")).state, (await service.query(TaskQuery())).total_count

    asyncio.run(before())
    (components.data_dir / "tasks/damaged/journal/records").write_bytes(b"00000000 {}\n00000000 {}\n")
    assert asyncio.run(after()) == (TaskState.PENDING, 3)
