"""Clients share a shell in a preserved sandbox. It starts only while its host can run it."""

import asyncio
import errno
import traceback

import pytest

from doubles.failed_task import fail
from doubles.server_components import ServerComponents
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.runner import OpenTerminal, RunnerUnreachableError, TerminalRefusedError
from sandbox.interfaces.server_services import UnavailableError
from sandbox.server.runner_launcher import TaskSecrets
from sandbox.store.sqlite import SqliteStore

MIB, GIB = 1024**2, 1024**3


@pytest.fixture
def components(tmp_path):
    instance = ServerComponents(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)


async def test_shell_while_the_host_does_not_respond_is_rejected(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.preserved_sandboxes.DEBUG_SESSION_START_TIMEOUT_SECONDS", 0.2)
    sessions = []

    async def start_debug_session(order):
        sessions.append(order)

    async with components.server() as service:
        await fail(components, service, "task-1")
        components.placement.disk_lock_state, components.placement.start_debug_session = (
            LockState.UNKNOWN,
            start_debug_session,
        )
        with pytest.raises(UnavailableError, match="the host of the preserved sandbox is not responding"):
            await service.open_terminal("task-1", OpenTerminal(24, 80))
    assert sessions == []


async def test_clients_that_wait_for_a_session_share_its_polls(components, monkeypatch):
    """If each client polled separately, hundreds of waiting clients would keep the event loop busy."""
    connects, has_started = [], asyncio.Event()

    async def open_terminal(attempt_id, request):
        connects.append(request)
        if not has_started.is_set():
            raise RunnerUnreachableError("The task's runner is not responding.")
        return attempt_id

    async with components.server() as service:
        preserved = await fail(components, service, "task-1")
        monkeypatch.setattr(components.placement, "open_terminal", open_terminal)
        async with service.preserved_sandboxes.try_lock(await service.status("task-1")):
            clients = [asyncio.create_task(service.open_terminal("task-1", OpenTerminal(24, 80))) for _ in range(200)]
            await asyncio.sleep(1)
            assert 1 <= len(connects) <= 25
            has_started.set()
            assert await asyncio.gather(*clients) == [preserved.root.name] * 200


async def test_shell_in_a_released_sandbox_is_rejected(components):
    async with components.server() as service:
        await fail(components, service, "task-1")
        await service.release("task-1")
        with pytest.raises(TerminalRefusedError, match="it was released, or has expired"):
            await service.open_terminal("task-1", OpenTerminal(24, 80))


async def test_shell_opened_during_a_release_is_rejected(components, monkeypatch):
    async with components.server() as service:
        await fail(components, service, "task-1")

        async def release_first(*_):
            await service.release("task-1")
            raise RunnerUnreachableError("not listening yet")

        monkeypatch.setattr(components.placement, "open_terminal", release_first)
        with pytest.raises(TerminalRefusedError, match="it was released, or has expired"):
            await service.open_terminal("task-1", OpenTerminal(24, 80))


def assert_shell_is_rejected(components, break_sandbox, match):
    async def scenario():
        async with components.server() as service:
            break_sandbox(service, await fail(components, service, "task-1"))
            with pytest.raises(UnavailableError, match=match):
                await service.open_terminal("task-1", OpenTerminal(24, 80))

    asyncio.run(scenario())


def test_shell_with_a_failing_lock_file_is_rejected(components):
    def break_sandbox(_, preserved):
        preserved.preserved_disk_lock.symlink_to("/nowhere")

    assert_shell_is_rejected(components, break_sandbox, r"No shell can be opened for task task-1: .*; try again\.")


def test_shell_in_an_unreadable_preserved_sandbox_is_rejected(components, monkeypatch):
    def raise_error(_):
        raise OSError(errno.EIO, "Input/output error")

    def break_sandbox(service, _):
        monkeypatch.setattr(service.preserved_sandboxes, "is_preserved", raise_error)

    assert_shell_is_rejected(components, break_sandbox, "Input/output error; try again")


async def test_agent_terminal_of_a_preserved_sandbox_is_rejected(components):
    async with components.server() as service:
        await fail(components, service, "task-1")
        with pytest.raises(TerminalRefusedError, match="has ended; open a debug shell in its preserved sandbox"):
            await service.open_terminal("task-1", OpenTerminal(24, 80, is_agent_terminal=True))


class SimulatedSessions:
    """Debug sessions that start once `may_start` is set. requested, started: ids of their attempts."""

    def __init__(self, components, monkeypatch):
        self.requested, self.started, self.may_start = [], set(), asyncio.Event()
        for method in (self.start_debug_session, self.open_terminal):
            monkeypatch.setattr(components.placement, method.__name__, method)

    async def start_debug_session(self, order):
        self.requested.append(order.attempt_id)
        await self.may_start.wait()
        self.started.add(order.attempt_id)

    async def open_terminal(self, attempt_id, _):
        if attempt_id not in self.started:
            raise RunnerUnreachableError("not yet")
        return attempt_id


async def test_shell_starts_only_while_the_machine_has_free_memory(components, monkeypatch):
    """The number of preserved sandboxes is unlimited, and their shells do not count towards the machine's capacity."""
    sessions = SimulatedSessions(components, monkeypatch)
    sessions.may_start.set()
    async with components.server() as service:
        preserved = await fail(components, service, "task-1")
        components.available_memory_bytes = 300 * MIB
        with pytest.raises(UnavailableError, match=r"needs 0\.5 GiB of free memory \(.* has 0\.293 GiB\); try"):
            await service.open_terminal("task-1", OpenTerminal(24, 80))
        assert sessions.requested == []
        components.available_memory_bytes = GIB
        assert await service.open_terminal("task-1", OpenTerminal(24, 80)) == preserved.root.name
        components.available_memory_bytes = 0  # another shell of the same session needs no other sandbox
        assert await service.open_terminal("task-1", OpenTerminal(24, 80)) == preserved.root.name


async def test_starting_shells_reserve_memory_and_open_shells_do_not(components, monkeypatch):
    sessions = SimulatedSessions(components, monkeypatch)
    async with components.server() as service:
        first, second = [await fail(components, service, task_id) for task_id in ("task-1", "task-2")]
        components.available_memory_bytes = GIB - 1
        opening = asyncio.create_task(service.open_terminal("task-1", OpenTerminal(24, 80)))
        async with asyncio.timeout(10):
            while not sessions.requested:
                await asyncio.sleep(0.005)
        with pytest.raises(UnavailableError, match="of free memory"):
            await service.open_terminal("task-2", OpenTerminal(24, 80))
        sessions.may_start.set()
        assert await opening == first.root.name
        assert await service.open_terminal("task-2", OpenTerminal(24, 80)) == second.root.name


async def test_shell_without_an_image_is_rejected_with_a_remedy(components):
    async with components.server() as service:
        await fail(components, service, "task-1")
        components.image_error = "The image of the profile tools is gone; build it again."
        with pytest.raises(
            TerminalRefusedError, match="can be opened for task task-1: The image of the profile tools is gone"
        ):
            await service.open_terminal("task-1", OpenTerminal(24, 80))


async def test_shell_with_failing_secrets_is_rejected_without_leaking_them(components, monkeypatch):
    async def raise_error(_):
        raise ValueError("s3cret-value")

    async def scenario():
        async with components.server() as service:
            await fail(components, service, "task-1")
            monkeypatch.setattr(service.debug_sessions, "_secrets", TaskSecrets(raise_error))
            with pytest.raises(UnavailableError, match=r"could not be resolved \(ValueError\)") as refused:
                await service.open_terminal("task-1", OpenTerminal(24, 80))
            return refused.value

    assert "s3cret-value" not in "".join(traceback.format_exception(await scenario()))
