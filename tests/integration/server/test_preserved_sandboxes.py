"""A preserved sandbox stays until it is released or expires."""

import asyncio
import contextlib
import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from doubles.failed_task import attempt_layout, fail
from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING, ServerComponents
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.placement import HostUnreachableError
from sandbox.interfaces.runner import OpenTerminal, RunnerUnreachableError
from sandbox.interfaces.server_services import SandboxNotPreservedError, TaskNotFoundError, UnavailableError
from sandbox.model.events import AgentExited, AttemptTornDown
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import DEBUG_SESSION_END_TIMEOUT_SECONDS
from sandbox.model.task_state import TaskState
from sandbox.server import preserved_sandboxes
from sandbox.server.maintenance import LeftoverRemover
from sandbox.server.preserved_sandboxes import PreservationExpiry, PreservedFiles, SandboxInUseError
from sandbox.store.sqlite import SqliteStore

LOST = AgentExited(None, None, Failure(FailureCode.RUNNER_LOST, "gone"))
DAY = 24 * 3600


@pytest.fixture
def components(tmp_path):
    instance = ServerComponents(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)


async def lose_before_disk_takeover(components, service):
    """Lose the second attempt and all finishers before any of them takes over the first attempt's disk.

    Return the files of the first attempt.
    """
    await service.submit(manifest(lifecycle={"failure_action": "preserve", "resume": True}))
    await components.wait_for_launch("task-1")
    preserved = attempt_layout(components, components.placement.orders[0])
    preserved.workspace.mkdir(parents=True)
    preserved.runner_log.write_text("log")
    components.placement.record("task-1", *TO_RUNNING, LOST, AttemptTornDown())
    async with asyncio.timeout(30):
        while not (await service.status("task-1")).state.is_final:
            if "task-1" in components.placement.recorders:
                components.placement.kill("task-1")
            await asyncio.sleep(0.005)
    assert (await service.status("task-1")).attempt_count == 2
    return preserved


def test_disk_without_a_takeover_is_preserved_in_place(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 0.05)
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)
    sessions = []

    async def start_debug_session(order):
        sessions.append(order.attempt_id)

    async def open_terminal(attempt_id, _):
        if not sessions:
            raise RunnerUnreachableError("not yet")
        return attempt_id

    async def scenario():
        async with components.server() as service:
            preserved = await lose_before_disk_takeover(components, service)
            task = await service.status("task-1")
            assert task.state is TaskState.FAILED_PRESERVED
            assert await service.has_preserved_sandbox(task)
            assert service.preserved_sandboxes.find_preserved([task]) == {"task-1"}
            files = [components.placement.files]
            await LeftoverRemover(components.journals, components.store, service.preserved_sandboxes, files).sweep()
            assert preserved.workspace.exists()
            monkeypatch.setattr(components.placement, "start_debug_session", start_debug_session)
            monkeypatch.setattr(components.placement, "open_terminal", open_terminal)
            assert await service.open_terminal("task-1", OpenTerminal(24, 80)) == preserved.root.name
            assert sessions == [preserved.root.name]
            await service.release("task-1")
            assert not await service.has_preserved_sandbox(task)
            assert service.preserved_sandboxes.find_preserved([task]) == set()
            return preserved

    assert [file.name for file in asyncio.run(scenario()).root.iterdir()] == ["runner.log"]


async def test_release_removes_everything_except_the_log(components):
    async def scenario():
        async with components.server() as service:
            preserved = await fail(components, service, "task-1")
            await service.release("task-1")
            with pytest.raises(SandboxNotPreservedError):
                await service.release("task-1")
            return preserved, await service.status("task-1")

    preserved, task = await scenario()
    assert [file.name for file in preserved.root.iterdir()] == [preserved.runner_log.name]
    assert task.state is TaskState.FAILED_PRESERVED


async def test_only_one_of_several_concurrent_releases_succeeds(components):
    async def scenario():
        async with components.server() as service:
            await fail(components, service, "task-1")
            return await asyncio.gather(*(service.release("task-1") for _ in range(8)), return_exceptions=True)

    outcomes = await scenario()
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType"] + ["SandboxNotPreservedError"] * 7


async def test_interrupted_release_can_be_completed(components):
    async def scenario():
        async with components.server() as service:
            preserved = await fail(components, service, "task-1")
            await asyncio.to_thread((preserved.workspace / "a" / "b" / "file").unlink)
            preserved.disk.rename(preserved.root / "half-removed")
            await service.release("task-1")
            return preserved

    preserved = await scenario()
    assert [file.name for file in preserved.root.iterdir()] == [preserved.runner_log.name]


async def test_release_can_be_completed_after_an_interruption_before_image_removal(components):
    async def scenario():
        async with components.server() as service:
            preserved = await fail(components, service, "task-1")
            preserved.handle.unlink()
            preserved.disk.rename(preserved.disk_image)
            await service.release("task-1")
            return preserved

    preserved = await scenario()
    assert [file.name for file in preserved.root.iterdir()] == [preserved.runner_log.name]


async def test_sandbox_cannot_be_locked_during_its_release(components):
    """A sandbox locked during its release could use a partially removed disk, or create one that is never removed."""

    async def scenario():
        async with components.server() as service:
            preserved = await fail(components, service, "task-1")
            task, remove, found = await service.status("task-1"), components.remove, []

            async def remove_while_locking(paths):
                await remove(paths)
                async with service.preserved_sandboxes.try_lock(task) as (lock_state, _):
                    found.append(lock_state)

            components.remove = remove_while_locking
            await service.release("task-1")
            return found, [file.name for file in preserved.root.iterdir()]

    assert (await scenario()) == ([LockState.HELD], ["runner.log"])


async def test_release_waits_for_the_end_of_a_debug_session(components):
    """The user has disconnected; the debug session needs a moment to end."""

    async def scenario():
        async with components.server() as service:
            preserved = await fail(components, service, "task-1")
            async with service.preserved_sandboxes.try_lock(await service.status("task-1")):
                release = asyncio.create_task(service.release("task-1"))
                done, _ = await asyncio.wait([release], timeout=0.5)
                assert not done
            await asyncio.wait_for(release, 30)
            return [file.name for file in preserved.root.iterdir()]

    assert (await scenario()) == ["runner.log"]


async def test_release_during_a_debug_session_is_rejected(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.preserved_sandboxes.DEBUG_SESSION_END_TIMEOUT_SECONDS", 0.2)

    async def scenario():
        async with components.server() as service:
            preserved = await fail(components, service, "task-1")
            lock = service.preserved_sandboxes.try_lock(await service.status("task-1"))
            async with lock:
                with pytest.raises(UnavailableError, match="has an open shell"):
                    await service.release("task-1")
            return preserved.handle.exists()

    assert await scenario()


async def test_release_while_the_host_does_not_respond_is_rejected(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.preserved_sandboxes.DEBUG_SESSION_END_TIMEOUT_SECONDS", 0.2)
    async with components.server() as service:
        preserved = await fail(components, service, "task-1")
        components.placement.disk_lock_state = LockState.UNKNOWN
        with pytest.raises(UnavailableError, match="The host of this sandbox is not responding"):
            await service.release("task-1")
        assert preserved.workspace.exists()
        components.placement.disk_lock_state = None
        await service.release("task-1")
        assert not preserved.workspace.exists()


async def test_exclusive_access_is_not_granted_while_the_host_does_not_respond(components):
    async with components.server() as service:
        await fail(components, service, "task-1")
        preserved, task = service.preserved_sandboxes, await service.status("task-1")
        for lock_state, is_exclusive in ((LockState.UNKNOWN, False), (LockState.HELD, False), (None, True)):
            components.placement.disk_lock_state = lock_state
            async with preserved.try_exclusive_use(task) as exclusive:
                assert exclusive is is_exclusive


async def test_many_releases_during_a_debug_session_wait_in_parallel(components, monkeypatch):
    """Releases that waited one after another would delay the removal of leftovers and the expiry of all tasks."""
    monkeypatch.setattr("sandbox.server.preserved_sandboxes.DEBUG_SESSION_END_TIMEOUT_SECONDS", 0.3)
    async with components.server() as service:
        await fail(components, service, "task-1")
        task, preserved_sandboxes = await service.status("task-1"), service.preserved_sandboxes
        async with preserved_sandboxes.try_lock(task):
            releases = [asyncio.create_task(service.release("task-1")) for _ in range(50)]
            await asyncio.sleep(0)
            async with asyncio.timeout(5), preserved_sandboxes.try_exclusive_use(task) as is_exclusive:
                assert not is_exclusive
            outcomes = await asyncio.gather(*releases, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {SandboxInUseError}
        await service.release("task-1")


async def test_attempt_to_lock_a_released_sandbox_leaves_no_files(components, monkeypatch):
    async def scenario():
        async with components.server() as service:
            preserved = await fail(components, service, "task-1")
            await service.release("task-1")
            results = iter([True, False])  # preserved when checked, but released before it is locked
            monkeypatch.setattr(service.preserved_sandboxes, "is_preserved", lambda _: next(results))
            task = await service.status("task-1")
            with pytest.raises(SandboxNotPreservedError):
                async with service.preserved_sandboxes.try_lock(task):
                    pass
            return [file.name for file in preserved.root.iterdir()]

    assert (await scenario()) == ["runner.log"]


async def test_release_without_a_preserved_sandbox_is_rejected(components):
    async def scenario():
        async with components.server() as service:
            preserved = await fail(components, service, "destroyed", failure_action="destroy")
            await service.submit(manifest("running", lifecycle={"failure_action": "preserve"}))
            await components.wait_for_launch("running")
            components.placement.record("running", *TO_RUNNING)
            await components.wait_for_state(service, "running", TaskState.RUNNING)
            for task_id in ("destroyed", "running"):
                with pytest.raises(SandboxNotPreservedError):
                    await service.release(task_id)
            with pytest.raises(TaskNotFoundError):
                await service.release("nobody")
            components.placement.record("running", *TO_COMPLETED)
            return preserved

    assert (await scenario()).disk.exists()


async def test_expired_sandboxes_are_removed_and_younger_sandboxes_are_kept(components):
    async def scenario():
        async with components.server() as service:
            expiry = PreservationExpiry(components.store, service.preserved_sandboxes, components.clock, DAY)
            components.clock.set_back_by = timedelta(hours=25)
            old = await fail(components, service, "old")
            components.clock.set_back_by = timedelta(hours=23)
            young = await fail(components, service, "young")
            components.clock.set_back_by = timedelta()
            await expiry.sweep()
            first = (old.disk.exists(), young.disk.exists())
            components.clock.set_back_by = -timedelta(hours=2)
            await expiry.sweep()
            return first, (old.disk.exists(), young.disk.exists())

    assert (await scenario()) == ((False, True), (False, False))


async def test_many_expired_sandboxes_are_all_removed(components, monkeypatch):
    async def scenario():
        async with components.server() as service:
            components.clock.set_back_by = timedelta(hours=25)
            preserved = [await fail(components, service, f"task-{number}") for number in range(150)]
            components.clock.set_back_by = timedelta()
            expiry = PreservationExpiry(components.store, service.preserved_sandboxes, components.clock, DAY)
            await expiry.sweep()
            remaining = [each for each in preserved if each.disk.exists()]
            queries = []
            query = components.store.query
            monkeypatch.setattr(components.store, "query", lambda request: queries.append(request) or query(request))
            await expiry.sweep()
            return remaining, [request.cursor is None for request in queries]

    assert (await scenario()) == ([], [False])


async def test_expiry_does_not_wait_for_open_shells(components, caplog):
    """If expiry waited for each shell, a user with 24 open shells could keep all other sandboxes from expiring."""
    caplog.set_level("INFO")
    async with components.server() as service, contextlib.AsyncExitStack() as shells:
        components.clock.set_back_by = timedelta(hours=25)
        preserved = [await fail(components, service, f"task-{number}") for number in range(6)]
        components.clock.set_back_by = timedelta()
        for number in range(5):
            task = await service.status(f"task-{number}")
            await shells.enter_async_context(service.preserved_sandboxes.try_lock(task))
        expiry = PreservationExpiry(components.store, service.preserved_sandboxes, components.clock, DAY)
        async with asyncio.timeout(3 * DEBUG_SESSION_END_TIMEOUT_SECONDS):
            await expiry.sweep()
        assert [each.disk.exists() for each in preserved] == [True] * 5 + [False]
        await expiry.sweep()
        in_use = [record for record in caplog.records if "in use" in record.message]
        assert [record.levelname for record in in_use] == ["INFO"] * 5, (
            "an open shell is logged once, and not as an error"
        )
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
        await shells.aclose()
        await expiry.sweep()
        assert [each.disk.exists() for each in preserved] == [False] * 6


@pytest.mark.parametrize("is_deleted", [True, False])
async def test_sandboxes_of_deleted_tasks_are_no_longer_checked_for_expiry(components, is_deleted):
    async with components.server() as service:
        components.clock.set_back_by = timedelta(hours=25)
        await fail(components, service, "task-1")
        components.clock.set_back_by = timedelta()
        expiry = PreservationExpiry(components.store, service.preserved_sandboxes, components.clock, DAY)
        async with service.preserved_sandboxes.try_lock(await service.status("task-1")):
            await expiry.sweep()
            assert expiry._in_use == {"task-1"}
            if is_deleted:
                components.store.delete("task-1")
            await expiry.sweep()
            assert expiry._in_use == (set() if is_deleted else {"task-1"})


async def test_removal_of_leftovers_does_not_wait_for_release_requests(components):
    """A user can send release requests continuously, for any number of sandboxes with open shells."""
    async with components.server() as service:
        await fail(components, service, "task-1")
        task, sandboxes = await service.status("task-1"), service.preserved_sandboxes
        async with sandboxes.try_lock(task):
            release = asyncio.create_task(service.release("task-1"))
            await asyncio.sleep(0.05)
            seconds = DEBUG_SESSION_END_TIMEOUT_SECONDS / 2
            async with asyncio.timeout(seconds), sandboxes.try_exclusive_use(task) as is_exclusive:
                assert not is_exclusive
            assert not release.done()
        await release


async def test_unreadable_sandbox_is_retried_and_does_not_block_others(components, monkeypatch):
    async def scenario():
        async with components.server() as service:
            components.clock.set_back_by = timedelta(hours=25)
            preserved = [await fail(components, service, name) for name in ("a", "b")]
            components.clock.set_back_by = timedelta()
            expiry = PreservationExpiry(components.store, service.preserved_sandboxes, components.clock, DAY)
            is_preserved = service.preserved_sandboxes.is_preserved

            def raise_error(task):
                if task.id == "a":
                    raise OSError(errno.EIO, "Input/output error")
                return is_preserved(task)

            with monkeypatch.context() as patch:
                patch.setattr(service.preserved_sandboxes, "is_preserved", raise_error)
                assert await service.has_preserved_sandbox(await service.status("a"))
                with pytest.raises(UnavailableError, match="release it again"):
                    await service.release("a")
                await expiry.sweep()
                first = [each.disk.exists() for each in preserved]
            await expiry.sweep()
            return first, [each.disk.exists() for each in preserved]

    assert (await scenario()) == ([True, False], [False, False])


async def test_failing_removal_is_retried_and_does_not_block_others(components, caplog):
    async def scenario():
        async with components.server() as service:
            components.clock.set_back_by = timedelta(hours=25)
            preserved = [await fail(components, service, name) for name in ("a", "b")]
            components.clock.set_back_by = timedelta()
            expiry = PreservationExpiry(components.store, service.preserved_sandboxes, components.clock, DAY)
            remove = components.remove

            async def raise_error(paths):
                if preserved[0].disk in paths:
                    raise OSError("busy")
                await remove(paths)

            components.remove = raise_error
            await expiry.sweep()
            first = [each.disk.exists() for each in preserved]
            assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
                "Task a: The sandbox could not be removed: busy; release it again."
            ]
            components.remove = remove
            await expiry.sweep()
            return first, [each.disk.exists() for each in preserved]

    assert (await scenario()) == ([True, False], [False, False])


async def test_unreachable_host_is_queried_once_for_a_list_of_tasks(components):
    requests: list[str] = []

    def find_files(location):
        requests.append(location.task_id)
        raise HostUnreachableError(location.host)

    async def scenario():
        async with components.server() as service:
            for name in ("a", "b", "c"):
                await fail(components, service, name)
            tasks = [await service.status(name) for name in ("a", "b", "c")]
            return PreservedFiles(find_files).find_preserved(tasks)

    assert (await scenario(), requests) == ({"a", "b", "c"}, ["a"])


@pytest.mark.parametrize(("seconds", "asked"), [(0.0, ["a", "b", "c"]), (3.0, ["a", "b"])])
async def test_slow_hosts_delay_a_list_of_tasks_only_for_a_few_seconds(components, monkeypatch, seconds, asked):
    requests: list[str] = []
    now = 0.0

    class SlowFiles:
        def has_disk_or_handle(self, location):
            nonlocal now
            requests.append(location.task_id)
            now += seconds
            return True

        def has_disk(self, location):
            return True

    async def scenario():
        async with components.server() as service:
            for name in ("a", "b", "c"):
                await fail(components, service, name)
            tasks = [await service.status(name) for name in ("a", "b", "c")]
            monkeypatch.setattr(preserved_sandboxes.time, "monotonic", lambda: now)
            try:
                return PreservedFiles(lambda _: SlowFiles()).find_preserved(tasks)
            finally:
                monkeypatch.undo()

    assert (await scenario(), requests) == ({"a", "b", "c"}, asked)


class SlowFiles:
    """The files of a host that does not respond until `go_on` is set."""

    def __init__(self):
        self.is_asked, self.go_on = False, threading.Event()

    def has_disk_or_handle(self, _):
        self.is_asked = True
        return self.go_on.wait(20)


async def ask_whether_preserved(service, task):
    return await service.has_preserved_sandbox(task)


async def ask_for_a_lock(service, task):
    async with service.preserved_sandboxes.try_exclusive_use(task) as is_exclusive:
        return is_exclusive


@pytest.mark.parametrize("ask", [ask_whether_preserved, ask_for_a_lock])
async def test_slow_hosts_do_not_use_up_the_shared_threads(components, monkeypatch, ask):
    files = SlowFiles()
    async with components.server() as service:
        await fail(components, service, "a")
        task = await service.status("a")
        monkeypatch.setattr(service.preserved_sandboxes, "_find_files", lambda _: files)
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        asking = asyncio.create_task(ask(service, task))
        try:
            async with asyncio.timeout(20):
                while not files.is_asked:
                    await asyncio.sleep(0.01)
                assert await asyncio.to_thread(lambda: "free") == "free"
        finally:
            files.go_on.set()
        assert await asking
