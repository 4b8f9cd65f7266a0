"""A look at what a failed task left: a new sandbox on the kept disk, for shells, without agent, gateway and journal."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec

from sandbox.interfaces.agent import AgentStart
from sandbox.interfaces.images import Image
from sandbox.interfaces.layout import AttemptLayout
from sandbox.interfaces.runtime import Sandbox, SandboxSpec
from sandbox.model.errors import FailureCode
from sandbox.model.events import Event, Trouble
from sandbox.model.limits import SANDBOX_PROCESSES_MAX, VISIT_IDLE_SECONDS, VISIT_SECONDS_MAX
from sandbox.model.manifest.schema import Vm
from sandbox.runner.dependencies import Equipment
from sandbox.runner.resource_exhaustion import Shortages
from sandbox.runner.steps.provision import read_handle, write_handle
from sandbox.runner.terminals import HOLDER, Terminals, without_secrets

_log = logging.getLogger(__name__)

_OUT_OF_ROOM = "There is no room for more on the disk of this shell; open another one, or release the sandbox."

Listen = Callable[[], AbstractAsyncContextManager[None]]


class Visit(msgspec.Struct, frozen=True):
    """What is looked at, and with what. start: how the agent was started, whose variables shells get."""

    attempt_id: str
    files: AttemptLayout
    vm: Vm
    start: AgentStart
    image: Image | None
    equipment: Equipment

    async def carry_out(self, terminals: Terminals, listen: Listen) -> None:
        """Until the last client has left. The disk is then as it was kept, with what was done in it.

        listen: lets clients come. Raises AttemptError (provision_failed, sandbox_lost).
        """
        await self._end_earlier()
        await self._open_disk()
        try:
            sandbox = await self._make_sandbox()
            terminals.begin(sandbox, without_secrets(self.start.command.environment, ()), self.start.command.directory)
            async with listen():
                await self._until_over(sandbox, terminals)
        finally:
            terminals.close()
            await self._end_earlier()
            await self.equipment.disks.close(self.files)

    async def _end_earlier(self) -> None:
        """End the sandbox of the handle, this visit's or that of an earlier one whose runner was killed."""
        handle = read_handle(self.files.handle)
        if handle is not None:
            await self.equipment.runtime.destroy(handle, self.files.disk)
            self.files.handle.unlink()

    async def _make_sandbox(self) -> Sandbox:
        runtime, image = self.equipment.runtime, self.image
        if image is not None:
            self.equipment.images.hold(image)
        handle = runtime.plan(self.attempt_id)
        write_handle(self.files.handle, handle)
        spec = SandboxSpec(
            attempt_id=self.attempt_id,
            disk=self.files.disk,
            cpus=self.vm.cpus,
            memory_bytes=self.vm.memory_bytes,
            processes_max=SANDBOX_PROCESSES_MAX,
            image=None if image is None else Path(image.directory),
            disk_was_used=True,
        )
        sandbox = await runtime.create(handle, spec)
        # Nobody serves the gateway's sockets here: what wants to connect is refused at once.
        sandbox.listeners.close()
        await sandbox.start(HOLDER)
        return sandbox

    async def _open_disk(self) -> None:
        """One that is full and does not say so itself gets more room: it is there to be looked at."""
        disks, size_bytes = self.equipment.disks, self.vm.disk_bytes
        await disks.open(self.files, size_bytes)
        with contextlib.suppress(OSError):  # which is for the watch to judge
            while not disks.tells_when_full and (use := await disks.use(self.files)).is_full:
                size_bytes = 2 * max(size_bytes, use.used_bytes)
                await disks.open(self.files, size_bytes)

    async def _until_over(self, sandbox: Sandbox, terminals: Terminals) -> None:
        """Until nobody has been there for a moment, the sandbox or the disk's room has ended, or the longest time."""
        equipment = self.equipment
        shortages = Shortages(self.vm, equipment.disks, self.files, _tell)
        ended = asyncio.create_task(sandbox.wait())
        deserted = asyncio.create_task(terminals.deserted(VISIT_IDLE_SECONDS))
        out_of_room = asyncio.create_task(shortages.watch_disk(equipment.clock))
        past_bounds = asyncio.create_task(shortages.watch_kernel_use(sandbox))
        tasks = (ended, deserted, out_of_room, past_bounds)
        try:
            await asyncio.wait(tasks, timeout=VISIT_SECONDS_MAX, return_when=asyncio.FIRST_COMPLETED)
            if out_of_room.done():
                failure = out_of_room.result()
                terminals.dismiss(_OUT_OF_ROOM if failure.code is FailureCode.DISK_FULL else failure.message)
            elif past_bounds.done():
                terminals.dismiss(past_bounds.result().message)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _tell(event: Event) -> None:
    """A visit has no journal."""
    if isinstance(event, Trouble):
        _log.warning("A preserved sandbox is in trouble: %s", event.message)
