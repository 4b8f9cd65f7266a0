"""A second placement, structured like a package of `sandbox/placements/`: one host, reached through a daemon's socket.

The daemon (`daemon.py`) has its own data and run directory, and starts runners with the local placement.
`server.py` composes a server that runs all attempts there. A stopped daemon simulates a host that is not responding.
"""

import asyncio
import contextlib
import socket
import time
from collections import Counter
from pathlib import Path

import msgspec

from doubles.daemon_placement.messages import Report, Response
from sandbox.interfaces.images import Image, ImageUnusableError
from sandbox.interfaces.journal import JournalBusyError, LockState
from sandbox.interfaces.placement import HostIdentity, HostUnreachableError, LeftoverScan, ProbeResult
from sandbox.interfaces.runner import FRAME_BYTES_MAX, RunnerNotStartedError
from sandbox.model.artifacts import Artifact
from sandbox.model.errors import SandboxError
from sandbox.model.fixed_limits import CONTROL_REQUEST_TIMEOUT_SECONDS
from sandbox.model.resources import Resources
from sandbox.placements.runner_client import RunnerClient

NAME = "daemon"
POLL_SECONDS = 0.1
RESPONSE_TIMEOUT_SECONDS = 2.0
_ERRORS = {error.__name__: error for error in (ImageUnusableError, JournalBusyError, RunnerNotStartedError)}


class DaemonClient:
    """Client of the daemon's socket: one connection for each call."""

    def __init__(self, path, host=NAME):
        self.path, self.host = str(path), host

    def call(self, method, *arguments, result=None, timeout=5.0):
        """Call a method of `daemon.RpcMethods`. Blocks.

        Raises HostUnreachableError, or the error that the method raised.
        """
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(timeout)
                connection.connect(self.path)
                connection.sendall(msgspec.json.encode((method, arguments)) + b"\n")
                with connection.makefile("rb") as reader:
                    line = reader.readline()
        except OSError as error:
            raise HostUnreachableError(self.host) from error
        if not line:
            raise HostUnreachableError(self.host)
        return decode_response(line, result)

    async def open(self, method, *arguments):
        """Open a stream. Raises OSError."""
        reader, writer = await asyncio.open_unix_connection(self.path, limit=FRAME_BYTES_MAX)
        writer.write(msgspec.json.encode((method, arguments)) + b"\n")
        return reader, writer


def decode_response(line, result):
    response = msgspec.json.decode(line, type=Response)
    if response.error:
        raise _ERRORS.get(response.error, OSError)(response.message)
    return msgspec.json.decode(response.result, type=result)


class DaemonHost:
    """Implements `Host` and the `ProfileCatalog` of its images."""

    def __init__(self, daemon):
        self._daemon = daemon
        name, boot_id = daemon.call("identity", result=tuple[str, str])
        self.identity = HostIdentity(f"{NAME}:{name}", boot_id)
        self.capacity = daemon.call("capacity", result=Resources)
        self._profiles = daemon.call("profiles", result=dict[str, str])
        self.report, self.seen_at = None, float("-inf")

    @property
    def images(self):
        return self

    @property
    def responds(self):
        return time.monotonic() - self.seen_at < RESPONSE_TIMEOUT_SECONDS

    def list_minimum_tiers(self):
        return self._profiles

    def find_image(self, profile, tier):
        return self._daemon.call("find_image", profile, tier, result=Image | None)

    def blocked_reason(self):
        return None if self.responds else f"The host {self.identity.name} is not responding."

    def memory_available_bytes(self):
        return None if self.report is None else self.report.memory_available_bytes

    async def probe(self):
        return await asyncio.to_thread(self._daemon.call, "probe", result=ProbeResult, timeout=60)


class DaemonFiles:
    """Implements `AttemptFiles`."""

    def __init__(self, daemon):
        self._daemon = daemon

    def has_disk(self, location):
        return self._daemon.call("has_disk", location, result=bool)

    def has_disk_or_handle(self, location):
        return self._daemon.call("has_disk_or_handle", location, result=bool)

    def has_same_secrets(self, location, secrets):
        return self._daemon.call("has_same_secrets", location, secrets, result=bool)

    def has_sandbox_handle(self, task_id):
        return self._daemon.call("has_sandbox_handle", task_id, result=bool)

    async def scan(self):
        return await asyncio.to_thread(self._daemon.call, "scan", result=LeftoverScan)

    async def clean_up(self, leftover, *, keeps_disk):
        await asyncio.to_thread(self._daemon.call, "clean_up", leftover, keeps_disk, timeout=30)

    async def clean_up_unowned(self, kind, attempt_id):
        await asyncio.to_thread(self._daemon.call, "clean_up_unowned", kind, attempt_id, timeout=30)


def copy_artifact(replicas, task_id, artifact, content):
    """Store an artifact in the server's data directory."""
    copy = replicas.create_artifact(task_id, artifact)
    try:
        for data in content:
            copy.write(data)
        copy.flush()
        copy.publish()
    finally:
        copy.close()


class DaemonPlacement:
    """Implements `Placement`."""

    allocator = None

    def __init__(self, daemon, data_dir, replicas):
        self._daemon, self._data_dir, self._replicas = daemon, data_dir, replicas
        self.host, self.files = DaemonHost(daemon), DaemonFiles(daemon)
        daemon.host = self.host.identity.name
        self._lock_states, self._launches, self._reported_launches = {}, Counter(), Counter()

    async def run(self):
        while True:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._copy_all)
            await asyncio.sleep(POLL_SECONDS)

    def _copy_all(self):
        """Copy the records that the daemon reports, then publish which locks are held."""
        launches = self._launches.copy()
        report = self._daemon.call("report", result=Report, timeout=1)
        for task_id, task in report.tasks.items():
            try:
                self._copy(task_id, task)
            except HostUnreachableError:
                raise
            except (SandboxError, OSError):  # the server is writing, or another writer has continued the journal
                continue
            if self._launches[task_id] == launches[task_id]:
                self._lock_states[task_id] = LockState[task.lock_state]
        self.host.report, self._reported_launches, self.host.seen_at = report, launches, time.monotonic()

    def _copy(self, task_id, task):
        while (offset := self._replicas.end_offset(task_id)) < task.end_offset:
            data, artifacts = self._daemon.call("read", task_id, offset, result=tuple[bytes, list[Artifact]])
            for artifact in artifacts:
                copy_artifact(self._replicas, task_id, artifact, self._fetch(task_id, artifact))
            self._replicas.receive(task_id, offset, data)

    def _fetch(self, task_id, artifact):
        offset = 0
        while chunk := self._daemon.call("fetch", task_id, artifact.name, offset, result=bytes):
            yield chunk
            offset += len(chunk)

    async def launch(self, order, writer):
        await asyncio.to_thread(writer.sync)
        await asyncio.shield(self._launch(order))  # a cancelled launch continues, and may start the runner
        return DaemonRunnerHandle(self, order.task_id, order.attempt_id)

    async def _launch(self, order):
        self._launches[order.task_id] += 1
        try:
            await self._send_order(order)
        finally:
            # Reports from before or during the launch do not include the new runner.
            self._launches[order.task_id] += 1
            self._lock_states.pop(order.task_id, None)

    async def _send_order(self, order):
        try:
            offset = await asyncio.to_thread(self._daemon.call, "end_offset", order.task_id, result=int)
        except HostUnreachableError as error:
            raise RunnerNotStartedError(*error.args) from error
        data = await asyncio.to_thread(self._replicas.read, order.task_id, offset, 2**26)
        with contextlib.suppress(
            HostUnreachableError
        ):  # the runner may have been started, so its lock state is unknown
            await asyncio.to_thread(self._daemon.call, "launch", order, offset, data, timeout=40)

    def find_runner(self, location):
        return DaemonRunnerHandle(self, location.task_id, location.attempt_id)

    def preserved_disk(self, location):
        return DaemonPreservedDisk(self._daemon, location)

    def lock_state(self, task_id):
        is_launching = self._launches[task_id] % 2
        if is_launching or not self.host.responds:
            return LockState.UNKNOWN
        if task_id in self._lock_states:
            return self._lock_states[task_id]
        is_reported = self._launches[task_id] == self._reported_launches[task_id]
        # The daemon does not have the task's journal if no runner was ever started.
        is_new = is_reported and task_id not in self.host.report.tasks
        return LockState.FREE if is_new else LockState.UNKNOWN


class DaemonRunnerHandle(RunnerClient):
    """Implements `RunnerHandle`: the daemon connects each stream to the runner's socket."""

    def __init__(self, placement, task_id, attempt_id):
        super().__init__(lambda: placement._daemon.open("relay", attempt_id))
        self._placement, self._task_id, self.attempt_id = placement, task_id, attempt_id

    def lock_state(self):
        return self._placement.lock_state(self._task_id)

    async def may_be_responsive(self):
        """Let the daemon ping the runner, to distinguish an unresponsive host from an unresponsive runner."""
        try:
            return await self._call("may_be_responsive", timeout=CONTROL_REQUEST_TIMEOUT_SECONDS + 1)
        except HostUnreachableError:
            return True

    async def kill(self):
        return await self._call("kill")

    async def _call(self, method, timeout=5.0):
        call, task_id = self._placement._daemon.call, self._task_id
        return await asyncio.to_thread(call, method, task_id, self.attempt_id, result=bool, timeout=timeout)


class DaemonPreservedDisk(RunnerClient):
    """Implements `PreservedDisk`: the daemon holds the lock as long as the connection is open."""

    def __init__(self, daemon, location):
        super().__init__(lambda: daemon.open("relay", location.attempt_id))
        self._daemon, self._location, self._stream = daemon, location, None

    @contextlib.asynccontextmanager
    async def try_lock(self):
        try:
            reader, writer = await self._daemon.open("lock_disk", self._location)
        except OSError:
            yield LockState.UNKNOWN
            return
        self._stream = reader, writer
        try:
            try:
                lock_state = LockState[await self._receive(str)]
            except HostUnreachableError:
                lock_state = LockState.UNKNOWN
            yield lock_state
        finally:
            self._stream = None
            writer.close()

    async def start_debug_session(self, order):
        await self._send("start_debug_session", order)

    async def remove(self):
        await self._send("remove")

    async def _send(self, method, *arguments):
        self._stream[1].write(msgspec.json.encode((method, arguments)) + b"\n")
        await self._receive(None)

    async def _receive(self, result):
        try:
            async with asyncio.timeout(30 if result is None else 5):
                return decode_response(await self._stream[0].readline(), result)
        except (TimeoutError, msgspec.DecodeError) as error:
            raise HostUnreachableError(self._daemon.host) from error


def create_placement_with(path: Path):
    """Return the entry that the registry of placements would contain. path: the path of the daemon's socket."""

    async def create_placement(context):
        return await asyncio.to_thread(DaemonPlacement, DaemonClient(path), context.data_dir, context.replicas)

    return create_placement
