"""The daemon: starts runners on its host. Arguments: the settings as a JSON object, and the path of the socket."""

import asyncio
import contextlib
import inspect
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import msgspec

from doubles.daemon_placement.messages import Report, Response, TaskReport
from sandbox.agents import registered_agents
from sandbox.bootstrap.local_host import AgentsAndCommands, PlacementContext, create_local_placement
from sandbox.bootstrap.private_directories import choose_run_dir, lock_data_dir
from sandbox.bootstrap.settings.load import load
from sandbox.interfaces.placement import AttemptLocation, Leftover
from sandbox.interfaces.runner import FinishAttempt, RunAttempt, RunDebugSession
from sandbox.interfaces.task_file_layout import TaskLayout, runner_socket
from sandbox.journal.journals import FileJournals
from sandbox.journal.task_replicas import FileTaskReplicas
from sandbox.model.errors import SandboxError
from sandbox.model.events import ArtifactCollected
from sandbox.placements.local import placement as local_placement

CHUNK_BYTES = 2**18
MESSAGE_BYTES_MAX = 2**28
"""The size limit for a message from the server. A launch contains a task's secrets and records."""
LARGE_ORDER_BYTES = 2**18
LARGE_ORDER_PAUSE_SECONDS = 0.5


def write_large_orders_in_two_parts():
    """Pause in the middle of each large order, so that a test can kill a runner that has not read its whole order."""
    write_all = local_placement._write_all

    def write_with_pause(pipe_fd, data, timeout_seconds):
        if len(data) > LARGE_ORDER_BYTES:
            write_all(pipe_fd, data[:1000], timeout_seconds)
            data = data[1000:]
            time.sleep(LARGE_ORDER_PAUSE_SECONDS)
        write_all(pipe_fd, data, timeout_seconds)

    local_placement._write_all = write_with_pause


class RpcMethods:
    """The methods that the server can call. Arguments are converted to the annotated types."""

    def __init__(self, context, placement):
        self.context, self.placement = context, placement
        self.journals, self.replicas = FileJournals(context.data_dir), context.replicas

    async def identity(self):
        return self.placement.host.identity

    async def capacity(self):
        return self.placement.host.capacity

    async def profiles(self):
        return self.placement.host.images.list_minimum_tiers()

    async def find_image(self, profile: str, tier: str):
        return self.placement.host.images.find_image(profile, tier)

    async def probe(self):
        return await self.placement.host.probe()

    async def report(self):
        tasks = {}
        for task_id in self.journals.task_ids():
            lock_state = self.journals.lock_state(task_id)
            tasks[task_id] = TaskReport(lock_state.name, self.replicas.end_offset(task_id))
        return Report(self.placement.host.memory_available_bytes(), tasks)

    async def end_offset(self, task_id: str):
        return self.replicas.end_offset(task_id)

    async def read(self, task_id: str, offset: int):
        batch = self.journals.read(task_id, offset)
        data = self.replicas.read(task_id, offset, batch.next_offset - offset)
        return data, [each.event.artifact for each in batch.records if isinstance(each.event, ArtifactCollected)]

    async def fetch(self, task_id: str, name: str, offset: int):
        with (TaskLayout(self.context.data_dir, task_id).artifacts / name).open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)

    async def launch(self, order: RunAttempt | FinishAttempt, offset: int, data: bytes):
        self.replicas.receive(order.task_id, offset, data)
        writer = self.journals.open(order.task_id)
        try:
            await self.placement.launch(order, writer)
        finally:
            writer.close()

    async def kill(self, task_id: str, attempt_id: str):
        return await self.placement.find_runner(AttemptLocation(task_id, attempt_id, "")).kill()

    async def may_be_responsive(self, task_id: str, attempt_id: str):
        return await self.placement.find_runner(AttemptLocation(task_id, attempt_id, "")).may_be_responsive()

    async def has_disk(self, location: AttemptLocation):
        return self.placement.files.has_disk(location)

    async def has_disk_or_handle(self, location: AttemptLocation):
        return self.placement.files.has_disk_or_handle(location)

    async def has_same_secrets(self, location: AttemptLocation, secrets: dict[str, str]):
        return self.placement.files.has_same_secrets(location, secrets)

    async def has_sandbox_handle(self, task_id: str):
        return self.placement.files.has_sandbox_handle(task_id)

    async def scan(self):
        return await self.placement.files.scan()

    async def clean_up(self, leftover: Leftover, keeps_disk: bool):
        with self.journals.try_lock(leftover.location.task_id) as has_lock:
            if has_lock:
                await self.placement.files.clean_up(leftover, keeps_disk=keeps_disk)

    async def clean_up_unowned(self, kind: str, attempt_id: str):
        await self.placement.files.clean_up_unowned(kind, attempt_id)


async def respond(writer, function, arguments=()):
    """Call the function and send its result or error."""
    try:
        types = [each.annotation for each in inspect.signature(function).parameters.values()]
        converted = [msgspec.convert(value, kind) for value, kind in zip(arguments, types, strict=True)]
        response = Response(msgspec.Raw(msgspec.json.encode(await function(*converted))))
    except (OSError, SandboxError) as error:
        response = Response(error=type(error).__name__, message=str(error))
    writer.write(msgspec.json.encode(response) + b"\n")
    await writer.drain()


class Daemon:
    """Serves the connections of the server."""

    def __init__(self, context, placement):
        self.context, self.placement = context, placement
        self.methods = RpcMethods(context, placement)

    async def serve(self, reader, writer):
        with contextlib.suppress(OSError):
            method, arguments = json.loads(await reader.readline())
            match method:
                case "relay":
                    await self.relay(arguments[0], reader, writer)
                case "lock_disk":
                    await self.lock_disk(msgspec.convert(arguments[0], AttemptLocation), reader, writer)
                case _:
                    await respond(writer, getattr(self.methods, method), arguments)
        writer.close()

    async def relay(self, attempt_id, reader, writer):
        """Connect the server to a runner's socket, until either side closes the connection."""
        path = runner_socket(self.context.run_dir, attempt_id)
        runner_reader, runner_writer = await asyncio.open_unix_connection(path)
        copies = [asyncio.create_task(copy(*ends)) for ends in ((reader, runner_writer), (runner_reader, writer))]
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        for each in copies:
            each.cancel()
        runner_writer.close()

    async def lock_disk(self, location, reader, writer):
        """Hold the lock of a preserved disk until the server closes the connection."""
        disk = self.placement.preserved_disk(location)
        async with disk.try_lock() as lock_state:

            async def lock():
                return lock_state.name

            async def start_debug_session(order: RunDebugSession):
                await disk.start_debug_session(order)

            await respond(writer, lock)
            while line := await reader.readline():
                method, arguments = json.loads(line)
                await respond(
                    writer, start_debug_session if method == "start_debug_session" else disk.remove, arguments
                )


async def copy(reader, writer):
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()


async def main(settings, path):
    data_dir = Path(settings.server.data_dir)
    context = PlacementContext(
        data_dir,
        choose_run_dir(data_dir),
        settings,
        AgentsAndCommands(registered_agents()),
        FileTaskReplicas(data_dir),
    )
    with lock_data_dir(data_dir):
        placement = await create_local_placement(context)
        await placement.host.probe()
        server = await asyncio.start_unix_server(Daemon(context, placement).serve, path, limit=MESSAGE_BYTES_MAX)
        print(json.dumps({"socket": path}), flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    os.umask(0o077)
    write_large_orders_in_two_parts()
    asyncio.run(main(load(json.loads(sys.argv[1]), os.environ).settings, sys.argv[2]))
