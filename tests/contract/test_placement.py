"""The contract of placements and their runner handles, tested with real runners.

Runners run on the server's host (`LocalPlacement`), under a daemon with a separate data directory (`DaemonPlacement`),
or on workers that an engine starts (`ClusterPlacement`).
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from doubles import placement_harnesses
from doubles.placement_harnesses import (
    HOSTS,
    find_runners,
    serving,
    unresponsive_repository,
    wait_for_lock_state,
    wait_until,
)
from doubles.random_seed import seed
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.journal import JournalBusyError, LockState
from sandbox.interfaces.placement import AttemptLocation, HostUnreachableError
from sandbox.interfaces.runner import (
    CancelAttempt,
    EndFrame,
    InputFrame,
    OpenTerminal,
    OutputFrame,
    RunAttempt,
    RunDebugSession,
    RunnerNotStartedError,
    RunnerUnreachableError,
    TerminalRefusedError,
)
from sandbox.interfaces.task_file_layout import TaskLayout, new_attempt_id
from sandbox.model.events import ArtifactCollected, CancelRequested, ErrorReported, TaskFinished
from sandbox.model.failure import FailureCode
from sandbox.model.fixed_limits import CONTROL_REQUEST_TIMEOUT_SECONDS
from sandbox.model.task_state import TaskState
from sandbox.placements.local import placement as local_placement
from sandbox.primitives.secret_digests import make_fingerprint
from sandbox.server.placements import Placements

REQUEST_TIMEOUT_SECONDS = CONTROL_REQUEST_TIMEOUT_SECONDS + 3
"""The time limit for a request to a runner or a host, plus a margin for a busy machine."""
LARGE_SECRETS = {"LARGE": "k" * 300_000}
"""Secrets that make an order larger than a pipe's buffer, so that a launch waits until the runner reads the order."""
SHELL_REQUEST = OpenTerminal(24, 80)
task_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def repository_url():
    with unresponsive_repository() as url:
        yield url


@pytest.fixture(scope="module", params=HOSTS)
def host(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp(request.param)
        patch.setenv("HOME", str(directory))
        host = HOSTS[request.param](directory)
        try:
            host.start()
            yield host
        finally:
            host.close()


@pytest.fixture
async def server(host, repository_url):
    async with serving(host, repository_url) as server:
        yield server


@pytest.fixture
def task_id(host):
    """The id of a task. The task's runners are killed after the test."""
    task_id = f"task-{next(task_numbers)}"
    yield task_id
    host.kill_remaining_processes(task_id)


def kill_runners(host, task_id):
    for pid in find_runners(host.host_data_dir, task_id):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def assert_faster_than(seconds=REQUEST_TIMEOUT_SECONDS):
    started_at = time.monotonic()
    yield
    assert time.monotonic() - started_at < seconds


async def cancel_and_wait_for_end(server, handle):
    """Cancel the attempt, and wait until its runner has ended."""
    assert (await wait_for_reply(handle)).done
    await wait_for_lock_state(handle, LockState.FREE)


async def wait_for_reply(handle):
    """Request cancellation repeatedly until the runner replies; return the reply."""
    deadline = time.monotonic() + placement_harnesses.TIMEOUT_SECONDS
    while True:
        try:
            return await handle.cancel(CancelAttempt("enough"))
        except RunnerUnreachableError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


# Launch.


async def test_runner_takes_over_the_journal(server, task_id):
    location, handle = await server.launch(task_id)
    assert handle.attempt_id == location.attempt_id
    await wait_for_lock_state(handle, LockState.HELD)
    await cancel_and_wait_for_end(server, handle)
    task = server.task(task_id)
    assert (task.state, task.cancel.reason) == (TaskState.CANCELLED, "enough")
    epochs = [record.epoch for record in server.journals.read(task_id).records]
    assert (epochs[:2], set(epochs[2:])) == ([1, 1], {2})


async def test_launch_passes_on_records_that_are_not_flushed(server, task_id):
    recorder, location = server.submit(task_id, flushes=False)
    handle = await server.launch_recorded(recorder, location)
    await cancel_and_wait_for_end(server, handle)
    assert server.task(task_id).state is TaskState.CANCELLED


async def test_files_of_an_attempt_exist_before_its_runner(server, task_id):
    """Even a runner that is killed immediately has a log, and its journal names its attempt."""
    recorder, location = server.submit(task_id)
    found = []

    def look():
        while not find_runners(server.host.host_data_dir, task_id):
            pass
        layout = TaskLayout(server.host.host_data_dir, task_id)
        records = (layout.root / "journal" / "records").read_bytes()
        found.append((layout.attempt(location.attempt_id).runner_log.exists(), location.attempt_id.encode() in records))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    handle = await server.launch_recorded(recorder, location)
    await wait_until(lambda: found, "the runner")
    looking.join()
    assert found == [(True, True)]
    await cancel_and_wait_for_end(server, handle)


async def test_lock_is_not_free_between_launch_and_end(server, task_id):
    """The lock is held while the server's writer is open, and stays held after the writer is closed."""
    recorder, location = server.submit(task_id)
    handle = await server.placement.launch(server.order(location), recorder.writer)
    seen = {handle.lock_state()}
    recorder.writer.close()
    deadline = time.monotonic() + 1
    while LockState.HELD not in seen or time.monotonic() < deadline:
        seen.add(handle.lock_state())
        await asyncio.sleep(0.001)
    assert LockState.FREE not in seen
    await cancel_and_wait_for_end(server, handle)


@pytest.mark.parametrize("concurrently", [False, True])
async def test_writer_is_handed_to_one_runner(server, task_id, concurrently):
    recorder, location = server.submit(task_id)
    launch = partial(server.placement.launch, server.order(location), recorder.writer)
    results = []
    if concurrently:
        results = await asyncio.gather(launch(), launch(), return_exceptions=True)
    else:
        results = [await launch(), *(await asyncio.gather(launch(), return_exceptions=True))]
    recorder.writer.close()
    [handle] = [result for result in results if not isinstance(result, BaseException)]
    assert [type(result) for result in results if result is not handle] == [JournalBusyError]
    await check_one_runner(server, task_id)
    await cancel_and_wait_for_end(server, handle)


async def test_attempt_with_a_runner_is_not_launched_again(server, task_id):
    location, handle = await server.launch(task_id)
    runner = await check_one_runner(server, task_id)
    for relaunch in (server.relaunch, server.finish):
        with pytest.raises(JournalBusyError):
            await relaunch(location)
    assert find_runners(server.host.host_data_dir, task_id) == [runner]
    await cancel_and_wait_for_end(server, handle)
    assert server.task(task_id).state is TaskState.CANCELLED


async def test_launch_that_failed_can_be_repeated_with_the_same_writer(server, task_id):
    recorder, location = server.submit(task_id)
    attempts = TaskLayout(server.host.host_data_dir, task_id).attempt(location.attempt_id).root.parent
    attempts.parent.mkdir(parents=True, exist_ok=True)
    attempts.write_text("in the way")
    with pytest.raises(OSError, match=r"File exists|Not a directory") as failed:
        await server.placement.launch(server.order(location), recorder.writer)
    # In a cluster, a failed launch means that the runner was not started, so another host may run the next attempt.
    assert isinstance(failed.value, RunnerNotStartedError) is (server.host.kind == "cluster")
    assert find_runners(server.host.host_data_dir, task_id) == []
    attempts.unlink()
    await cancel_and_wait_for_end(server, await server.launch_recorded(recorder, location))


async def test_runner_that_dies_before_it_reads_its_order_counts_as_not_started(server, task_id, monkeypatch):
    is_started, is_killed, write_all = True, threading.Event(), local_placement._write_all

    def write_in_two_parts(pipe_fd, data, timeout_seconds):
        write_all(pipe_fd, data[:1000], timeout_seconds)
        is_killed.wait(timeout_seconds)
        write_all(pipe_fd, data[1000:], timeout_seconds)

    monkeypatch.setattr(local_placement, "_write_all", write_in_two_parts)
    for number in range(20):  # runners on other hosts may read their orders before they are killed
        is_killed.clear()
        attempt_task_id = f"{task_id}-{number}"
        launching = asyncio.create_task(server.launch(attempt_task_id, secrets=LARGE_SECRETS))
        await kill_runner(server, attempt_task_id)
        is_killed.set()
        try:
            await launching
        except RunnerNotStartedError:
            is_started = False
        location = server.location(attempt_task_id)
        handle = server.placement.find_runner(location)
        await wait_for_lock_state(handle, LockState.FREE)
        await check_finisher(server, location)
        if not is_started:
            break
    assert not is_started


async def test_large_order_is_accepted(server, task_id):
    _, handle = await server.launch(task_id, secrets=LARGE_SECRETS)
    await cancel_and_wait_for_end(server, handle)


async def test_cancelled_launch_leaves_at_most_one_runner(server, task_id):
    recorder, location = server.submit(task_id)
    launching = asyncio.create_task(server.placement.launch(server.order(location), recorder.writer))
    await asyncio.sleep(0.001)
    launching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await launching
    recorder.writer.close()
    await check_at_most_one_runner_and_end_attempt(server, location)


async def check_one_runner(server, task_id):
    """Wait for the runner, check that there is no other, and return its pid."""
    await wait_until(lambda: server.runner_pid(task_id), "the runner")
    [runner] = find_runners(server.host.host_data_dir, task_id)
    return runner


async def check_at_most_one_runner_and_end_attempt(server, location):
    """Wait until the host responds. Check that a launch with an unknown result has started at most one runner."""
    handle = server.placement.find_runner(location)
    await wait_until(lambda: handle.lock_state() is not LockState.UNKNOWN, "a known state")
    if handle.lock_state() is LockState.HELD:
        await check_one_runner(server, location.task_id)
        await cancel_and_wait_for_end(server, handle)
    else:
        await check_finisher(server, location)


# LockState.


async def test_lock_of_an_attempt_whose_runner_was_never_started_is_free(server, task_id):
    """The server may have died after it recorded `AttemptStarted` and before the launch."""
    recorder, location = server.submit(task_id)
    recorder.writer.close()
    handle = server.placement.find_runner(location)
    await wait_for_lock_state(handle, LockState.FREE)
    await check_finisher(server, location)


async def test_lock_is_free_only_after_every_record_and_artifact(server, task_id):
    _, handle = await server.launch(task_id)
    await wait_for_lock_state(handle, LockState.HELD)
    assert (await wait_for_reply(handle)).done
    is_free = False
    while not is_free:
        is_free = handle.lock_state() is LockState.FREE
        events = server.events(task_id)
        for event in events:
            if isinstance(event, ArtifactCollected):
                content = (TaskLayout(server.host.data_dir, task_id).artifacts / event.artifact.name).read_bytes()
                assert event.artifact.checksum == f"sha256:{hashlib.sha256(content).hexdigest()}"
        await asyncio.sleep(0)
    assert isinstance(events[-1], TaskFinished)
    assert any(isinstance(event, ArtifactCollected) for event in events)


@pytest.mark.parametrize("moment", ["start", "work", "end", "random"])
async def test_lock_of_a_killed_runner_is_free_and_a_finisher_ends_the_attempt(server, task_id, moment):
    location, handle = await server.launch(task_id)
    match moment:
        case "start":
            await kill_runner(server, task_id)
        case "work":
            await wait_until_listening(handle)
        case "end":
            await wait_until_listening(handle)
            assert (await handle.cancel(CancelAttempt())).done
        case "random":
            await asyncio.sleep(random.Random(seed()).random())
    kill_runners(server.host, task_id)
    await wait_for_lock_state(handle, LockState.FREE)
    if not server.task(task_id).state.is_final:
        await check_finisher(server, location, is_cancelled=moment == "end")


async def test_lock_of_a_killed_finisher_is_free_and_another_finisher_ends_the_attempt(server, task_id):
    location, handle = await server.launch(task_id)
    assert await kill_runner(server, task_id)
    await wait_for_lock_state(handle, LockState.FREE)
    finisher = await server.finish(location)
    kill_runners(server.host, task_id)
    await wait_for_lock_state(finisher, LockState.FREE)
    if not server.task(task_id).state.is_final:
        await check_finisher(server, location)


async def kill_runner(server, task_id):
    pid = await wait_until(lambda: server.runner_pid(task_id), "the runner")
    os.kill(pid, signal.SIGKILL)
    return pid


async def wait_until_listening(handle):
    """Wait until the runner responds to requests."""
    async with asyncio.timeout(placement_harnesses.TIMEOUT_SECONDS):
        while True:
            try:
                await handle.open_terminal(SHELL_REQUEST)
            except TerminalRefusedError:
                return
            except RunnerUnreachableError:
                await asyncio.sleep(0.02)


async def check_finisher(server, location, *, is_cancelled=False):
    """Check that a finisher ends the attempt of a runner that died."""
    finisher = await server.finish(location)
    await wait_for_lock_state(finisher, LockState.FREE)
    task = server.task(location.task_id)
    if is_cancelled:
        assert task.state is TaskState.CANCELLED
    else:
        assert task.is_between_attempts, server.log(location)
        assert task.attempt.failure.code is FailureCode.RUNNER_LOST


# Tests of a server that follows the runners of an earlier server.


async def test_runner_survives_a_server_that_closes(host, repository_url, task_id):
    async with serving(host, repository_url) as first:
        location, _ = await first.launch(task_id)
    await check_runner_of_earlier_server(host, repository_url, location)


async def test_runner_survives_a_server_that_is_killed(host, repository_url, task_id):
    command = [sys.executable, placement_harnesses.__file__, host.kind, str(host.directory), repository_url, task_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        try:
            location = AttemptLocation(*json.loads(await asyncio.to_thread(first.stdout.readline)))
        finally:
            first.kill()
    await check_runner_of_earlier_server(host, repository_url, location)


async def check_runner_of_earlier_server(host, repository_url, location):
    [runner] = await wait_until(lambda: find_runners(host.host_data_dir, location.task_id), "the runner")
    async with serving(host, repository_url) as server:
        handle = server.placement.find_runner(location)
        assert handle.attempt_id == location.attempt_id
        assert handle.lock_state() is not LockState.FREE
        await wait_for_lock_state(handle, LockState.HELD)
        assert await handle.may_be_responsive()
        assert find_runners(host.host_data_dir, location.task_id) == [runner]
        await cancel_and_wait_for_end(server, handle)
        assert server.task(location.task_id).state is TaskState.CANCELLED
        assert isinstance(server.events(location.task_id)[-1], TaskFinished)


async def test_next_server_detects_that_a_runner_ended_while_no_server_was_running(host, repository_url, task_id):
    async with serving(host, repository_url) as first:
        location, handle = await first.launch(task_id)
        await wait_for_reply(handle)
    await wait_until(lambda: not find_runners(host.host_data_dir, task_id), "the runner's end")
    async with serving(host, repository_url) as server:
        await wait_for_lock_state(server.placement.find_runner(location), LockState.FREE)
        assert server.task(task_id).state is TaskState.CANCELLED


# Requests to a runner.


async def test_cancel_request_is_on_disk_when_its_reply_arrives(server, task_id):
    _, handle = await server.launch(task_id)
    await wait_until_listening(handle)
    with assert_faster_than():
        reply = await handle.cancel(CancelAttempt("enough", force=True))
    assert reply.done
    requests = [event for event in server.events_on_host(task_id) if isinstance(event, CancelRequested)]
    assert requests == [CancelRequested("enough", True)]
    await wait_for_lock_state(handle, LockState.FREE)
    assert server.task(task_id).cancel.force


async def test_attempt_without_a_runner_is_unreachable_but_not_unresponsive(server, task_id):
    recorder, location = server.submit(task_id)
    recorder.writer.close()
    handle = server.placement.find_runner(location)
    await check_unreachable(handle)
    assert await handle.kill() is False


async def test_ended_runner_is_unreachable_but_not_unresponsive(server, task_id):
    _, handle = await server.launch(task_id)
    await cancel_and_wait_for_end(server, handle)
    await wait_until(lambda: not find_runners(server.host.host_data_dir, task_id), "the runner's end")
    await check_unreachable(handle)
    assert await handle.kill() is False


async def check_unreachable(handle, *, may_be_responsive=True):
    """Check that requests fail in time, and that they allow no conclusion about the runner."""
    requests = handle.may_be_responsive(), handle.cancel(CancelAttempt()), handle.open_terminal(SHELL_REQUEST)
    with assert_faster_than():
        response, *errors = await asyncio.gather(*requests, return_exceptions=True)
    assert response is may_be_responsive
    assert [type(error) for error in errors] == [RunnerUnreachableError] * 2


async def test_terminal_is_refused_while_there_is_no_sandbox(server, task_id):
    _, handle = await server.launch(task_id)
    await wait_until_listening(handle)
    with assert_faster_than(), pytest.raises(TerminalRefusedError):
        await handle.open_terminal(SHELL_REQUEST)
    await cancel_and_wait_for_end(server, handle)


async def test_stuck_runner_is_unresponsive_until_it_continues(server, task_id):
    _, handle = await server.launch(task_id)
    await wait_until_listening(handle)
    assert await handle.may_be_responsive()
    [runner] = find_runners(server.host.host_data_dir, task_id)
    os.kill(runner, signal.SIGSTOP)
    await check_unreachable(handle, may_be_responsive=False)
    assert handle.lock_state() is LockState.HELD
    os.kill(runner, signal.SIGCONT)
    assert await handle.may_be_responsive()


async def test_kill_ends_a_stuck_runner(server, task_id):
    location, handle = await server.launch(task_id)
    await wait_until_listening(handle)
    [runner] = find_runners(server.host.host_data_dir, task_id)
    os.kill(runner, signal.SIGSTOP)
    with assert_faster_than():
        assert await handle.kill()
    await wait_for_lock_state(handle, LockState.FREE)
    assert not await handle.kill()
    await check_finisher(server, location)


async def test_kill_spares_a_server_that_holds_the_lock(server, task_id):
    recorder, location = server.submit(task_id)
    assert not await server.placement.find_runner(location).kill()
    recorder.writer.close()


async def test_handle_of_another_attempt_can_kill_the_runner_but_not_send_requests(server, task_id):
    """`lock_state` and `kill` apply to the task's journal, whichever attempt holds it; requests, to one attempt."""
    location, handle = await server.launch(task_id)
    await wait_until_listening(handle)
    other = server.placement.find_runner(location._replace(attempt_id=new_attempt_id()))
    await wait_for_lock_state(other, LockState.HELD)
    await check_unreachable(other)
    assert await other.kill()
    await wait_for_lock_state(handle, LockState.FREE)


async def test_placement_stops_running_when_it_is_cancelled(host):
    placement = await host.create_placement()
    running = asyncio.create_task(placement.run())
    await asyncio.wait({running}, timeout=0.3)
    assert not running.done()
    running.cancel()
    with assert_faster_than(2):
        await asyncio.wait({running})


# Preserved disks and files.


on_hosts_with_leftovers = pytest.mark.parametrize("host", ["local", "daemon"], indirect=True)
"""Excludes clusters, whose workers remove all files of ended tasks and the leftovers on their hosts."""


@pytest.fixture
async def preserved_location(server, task_id):
    """The location of an ended attempt whose disk is preserved."""
    location, handle = await server.launch(task_id)
    await wait_until_listening(handle)
    await cancel_and_wait_for_end(server, handle)
    layout = attempt_layout(server, location)
    for directory in (layout.disk / "workspace", layout.disk / "home", layout.disk / "tmp"):
        directory.mkdir(parents=True)
    (layout.disk / "workspace" / "kept.txt").write_text("kept\n")
    return location


def attempt_layout(server, location):
    return TaskLayout(server.host.host_data_dir, location.task_id).attempt(location.attempt_id)


@on_hosts_with_leftovers
async def test_preserved_disk_can_be_locked_by_one_user_at_a_time(server, preserved_location):
    first, second = (server.placement.preserved_disk(preserved_location) for _ in range(2))
    async with first.try_lock() as lock_state:
        assert lock_state is LockState.FREE
        async with second.try_lock() as other:
            assert other is LockState.HELD
    async with second.try_lock() as lock_state:
        assert lock_state is LockState.FREE


@on_hosts_with_leftovers
async def test_debug_session_holds_the_disk_until_its_shells_end(server, preserved_location):
    disk = server.placement.preserved_disk(preserved_location)
    with assert_faster_than(), pytest.raises(RunnerUnreachableError):
        await disk.open_terminal(SHELL_REQUEST)
    async with disk.try_lock() as lock_state:
        assert lock_state is LockState.FREE
        await disk.start_debug_session(RunDebugSession(preserved_location.task_id, preserved_location.attempt_id))
    assert await disk_lock_state(server, preserved_location) is LockState.HELD
    terminal = await open_shell(server, preserved_location)
    await terminal.send(InputFrame(b"cat kept.txt; exit 7\n"))
    output, frame = b"", None
    async with asyncio.timeout(placement_harnesses.TIMEOUT_SECONDS):
        while not isinstance(frame := await terminal.read(), EndFrame):
            output += frame.data if isinstance(frame, OutputFrame) else b""
    await terminal.close()
    assert b"kept\r\n" in output
    await wait_for_disk_lock_state(server, preserved_location, LockState.FREE)
    assert server.placement.files.has_disk_or_handle(preserved_location)


async def open_shell(server, location):
    """Open a shell as soon as the debug session is listening."""
    async with asyncio.timeout(placement_harnesses.TIMEOUT_SECONDS):
        while True:
            with contextlib.suppress(RunnerUnreachableError):
                return await server.placement.preserved_disk(location).open_terminal(SHELL_REQUEST)
            await asyncio.sleep(0.02)


async def disk_lock_state(server, location):
    async with server.placement.preserved_disk(location).try_lock() as lock_state:
        return lock_state


async def wait_for_disk_lock_state(server, location, expected):
    async with asyncio.timeout(placement_harnesses.TIMEOUT_SECONDS):
        while await disk_lock_state(server, location) is not expected:
            await asyncio.sleep(0.02)


@on_hosts_with_leftovers
async def test_removed_disk_leaves_only_the_log(server, preserved_location):
    files, layout = server.placement.files, attempt_layout(server, preserved_location)
    assert files.has_disk_or_handle(preserved_location)
    assert files.has_disk(preserved_location)
    disk = server.placement.preserved_disk(preserved_location)
    async with disk.try_lock() as lock_state:
        assert lock_state is LockState.FREE
        await disk.remove()
    assert not files.has_disk_or_handle(preserved_location)
    assert not files.has_disk(preserved_location)
    assert list(layout.root.iterdir()) == [layout.runner_log]


@on_hosts_with_leftovers
async def test_files_of_a_running_attempt_are_not_removed(server, task_id):
    location, handle = await server.launch(task_id)
    await wait_until_listening(handle)
    layout = attempt_layout(server, location)
    layout.disk.mkdir(exist_ok=True)
    [leftover] = [each for each in (await server.placement.files.scan()).leftovers if each.location.task_id == task_id]
    with server.journals.try_lock(task_id) as has_lock:
        assert has_lock is (server.host.kind == "daemon")
        if has_lock:
            await server.placement.files.clean_up(leftover, keeps_disk=False)
    assert layout.disk.exists()
    assert await handle.may_be_responsive()
    await cancel_and_wait_for_end(server, handle)


@on_hosts_with_leftovers
async def test_leftovers_of_a_killed_runner_are_removed_once(server, task_id):
    location, handle = await server.launch(task_id)
    await wait_until_listening(handle)
    await kill_runner(server, task_id)
    await wait_for_lock_state(handle, LockState.FREE)
    layout, files = attempt_layout(server, location), server.placement.files
    layout.disk.mkdir(exist_ok=True)
    [leftover] = [each for each in (await files.scan()).leftovers if each.location.task_id == task_id]
    assert leftover.location.attempt_id == location.attempt_id
    assert leftover.has_sandbox_handle is files.has_sandbox_handle(task_id)
    for keeps_disk in (True, False, False):
        with server.journals.try_lock(task_id) as has_lock:
            assert has_lock
            await files.clean_up(leftover, keeps_disk=keeps_disk)
        assert files.has_disk(location) is keeps_disk
    assert list(layout.root.iterdir()) == [layout.runner_log]
    assert task_id not in {each.location.task_id for each in (await files.scan()).leftovers}


@on_hosts_with_leftovers
async def test_secrets_are_compared_with_those_of_the_attempt(server, preserved_location):
    attempt_layout(server, preserved_location).secret_fingerprint.write_bytes(make_fingerprint({"NAME": "value"}))
    files = server.placement.files
    assert files.has_same_secrets(preserved_location, {"NAME": "value"})
    assert not files.has_same_secrets(preserved_location, {"NAME": "other"})


# Tests of hosts that do not respond. The server's own host always responds.


on_daemon_host = pytest.mark.parametrize("host", ["daemon"], indirect=True)
on_any_remote_host = pytest.mark.parametrize("host", ["daemon", "cluster"], indirect=True)


@pytest.fixture
def remote_host(host):
    """A host that the test can pause. It is resumed after the test."""
    yield host
    host.resume()


@pytest.fixture
async def unresponsive_runner(remote_host, server, task_id):
    """The location and the handle of a runner whose host has just stopped responding."""
    location, handle = await server.launch(task_id)
    await wait_until_listening(handle)
    await wait_for_lock_state(handle, LockState.HELD)
    remote_host.pause()
    await wait_for_lock_state(handle, LockState.UNKNOWN)
    return location, handle


@on_any_remote_host
async def test_lock_state_of_a_runner_on_an_unresponsive_host_is_unknown(
    remote_host, server, unresponsive_runner, task_id
):
    location, handle = unresponsive_runner
    [runner] = find_runners(remote_host.host_data_dir, task_id)
    with assert_faster_than():
        assert await handle.may_be_responsive()
    for each in (handle, server.placement.find_runner(location)):
        with assert_faster_than(0.5):
            assert each.lock_state() is LockState.UNKNOWN
    remote_host.resume()
    await wait_for_lock_state(handle, LockState.HELD)
    assert find_runners(remote_host.host_data_dir, task_id) == [runner]
    await cancel_and_wait_for_end(server, handle)


@on_any_remote_host
async def test_requests_to_an_unresponsive_host_fail_in_time(remote_host, server, unresponsive_runner, task_id):
    """The requests may still be carried out later, because the host may have received them."""
    location, handle = unresponsive_runner
    _, killed = await asyncio.gather(check_unreachable(handle), handle.kill(), return_exceptions=True)
    assert isinstance(killed, HostUnreachableError)
    assert handle.lock_state() is LockState.UNKNOWN
    remote_host.resume()
    await wait_for_lock_state(handle, LockState.FREE)
    if not server.task(task_id).state.is_final:
        await check_finisher(server, location, is_cancelled=server.task(task_id).cancel is not None)


@on_any_remote_host
async def test_dead_runner_of_an_unresponsive_host_is_released_once_the_host_responds(
    remote_host, server, unresponsive_runner, task_id
):
    location, handle = unresponsive_runner
    await kill_runner(server, task_id)
    assert handle.lock_state() is LockState.UNKNOWN
    remote_host.resume()
    await wait_for_lock_state(handle, LockState.FREE)
    await check_finisher(server, location)


@on_daemon_host
async def test_unresponsive_host_starts_nothing_and_reveals_no_files(server, unresponsive_runner, task_id):
    location, handle = unresponsive_runner
    recorder, other = server.submit(f"{task_id}-b")
    files = server.placement.files
    questions = (files.has_disk, files.has_disk_or_handle, partial(files.has_same_secrets, secrets={}))
    with assert_faster_than():
        disk, launched, *answers = await asyncio.gather(
            disk_lock_state(server, location),
            server.launch_recorded(recorder, other),
            files.scan(),
            *(asyncio.to_thread(question, location) for question in questions),
            asyncio.to_thread(files.has_sandbox_handle, task_id),
            return_exceptions=True,
        )
    assert disk is LockState.UNKNOWN
    assert isinstance(launched, RunnerNotStartedError)
    assert [type(answer) for answer in answers] == [HostUnreachableError] * 5
    assert server.placement.host.blocked_reason() is not None
    assert handle.lock_state() is LockState.UNKNOWN


@on_daemon_host
async def test_runner_survives_the_restart_of_its_daemon(remote_host, server, task_id):
    _, handle = await server.launch(task_id)
    await wait_until_listening(handle)
    [runner] = find_runners(remote_host.host_data_dir, task_id)
    remote_host.kill()
    await wait_for_lock_state(handle, LockState.UNKNOWN)
    await check_unreachable(handle)
    await asyncio.to_thread(remote_host.start)
    await wait_for_lock_state(handle, LockState.HELD)
    assert find_runners(remote_host.host_data_dir, task_id) == [runner]
    await cancel_and_wait_for_end(server, handle)


@on_daemon_host
@pytest.mark.parametrize("delay_seconds", [0, 0.005, 0.02])
async def test_launch_that_loses_its_host_starts_at_most_one_runner(remote_host, server, task_id, delay_seconds):
    """The runner's state is known again once the host responds."""
    recorder, location = server.submit(task_id)

    def kill_daemon():
        time.sleep(delay_seconds)
        remote_host.kill()

    killing = on_request(server, "launch", lambda: threading.Thread(target=kill_daemon).start())
    with killing, contextlib.suppress(RunnerNotStartedError):
        await server.launch_recorded(recorder, location)
    assert server.placement.find_runner(location).lock_state() is not LockState.FREE
    await asyncio.to_thread(remote_host.start)
    await check_at_most_one_runner_and_end_attempt(server, location)


@contextlib.contextmanager
def on_request(server, method, act):
    """Call `act` before each request that the server sends with this method."""
    client = server.placement._daemon
    call = client.call

    def acting_call(name, *arguments, **options):
        if name == method:
            act()
        return call(name, *arguments, **options)

    client.call = acting_call
    try:
        yield
    finally:
        client.call = call


@on_daemon_host
async def test_lock_state_reports_from_before_a_slow_launch_are_ignored(remote_host, server, task_id):
    location, handle = await server.launch(task_id)
    await kill_runner(server, task_id)
    await wait_for_lock_state(handle, LockState.FREE)
    started = threading.Event()

    def delay():
        started.set()
        time.sleep(0.5)  # several reports

    seen = set()
    with on_request(server, "launch", delay):
        launching = asyncio.create_task(server.finish(location))
        await wait_until(started.is_set, "the launch")
        while not launching.done():
            seen.add(handle.lock_state())
            await asyncio.sleep(0.001)
    finisher = await launching
    seen.add(finisher.lock_state())
    assert LockState.UNKNOWN in seen
    assert LockState.FREE not in seen, "a report from before the launch was used"
    await wait_for_lock_state(finisher, LockState.FREE)


@on_daemon_host
async def test_rejected_journal_copy_does_not_stop_the_copies_of_other_tasks(remote_host, server, task_id):
    location, handle = await server.launch(task_id)
    await wait_until_listening(handle)
    writer = server.journals.open(task_id)  # another writer appends to the server's copy
    writer.append(ErrorReported("test", "Not on the host."), at=SystemClock().now(), durable=True)
    writer.close()
    assert (await wait_for_reply(handle)).done
    await wait_until(lambda: not find_runners(remote_host.host_data_dir, task_id), "the runner's end")
    _, other = await server.launch(f"{task_id}-b")
    await cancel_and_wait_for_end(server, other)
    assert handle.lock_state() is not LockState.FREE, "the copy lacks records"
    assert server.placement.find_runner(location).lock_state() is not LockState.FREE


async def test_placement_that_the_server_does_not_have_is_unreachable():
    location = AttemptLocation("task-1", new_attempt_id(), "gone:host")
    placements = Placements({}, {})
    handle = placements.find_runner(location)
    assert handle.attempt_id == location.attempt_id
    assert handle.lock_state() is LockState.UNKNOWN
    await check_unreachable(handle)
    assert not await handle.kill()
    disk = placements.preserved_disk(location)
    async with disk.try_lock() as lock_state:
        assert lock_state is LockState.UNKNOWN
    with pytest.raises(RunnerUnreachableError):
        await disk.open_terminal(SHELL_REQUEST)
    with pytest.raises(HostUnreachableError):
        placements.files(location)
    with pytest.raises(RunnerNotStartedError):
        await placements.launch(RunAttempt(location.task_id, location.attempt_id), location.host, None)
