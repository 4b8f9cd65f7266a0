"""The `Runtime` that makes sandboxes in guests of QEMU's."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from sandbox.contracts.runtime import Listeners, Probe, SandboxHandle, SandboxSpec
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.runtimes.bubblewrap.probe import find_program
from sandbox.runtimes.cgroups import ControlGroup
from sandbox.runtimes.kernel_uid import SANDBOX_UIDS
from sandbox.runtimes.launch import Launch, start_launcher
from sandbox.runtimes.launching import LaunchedSandboxes
from sandbox.runtimes.places import take_places
from sandbox.runtimes.qemu import cage, machine
from sandbox.runtimes.qemu.machine import Accelerator
from sandbox.runtimes.qemu.parts import find_parts
from sandbox.runtimes.qemu.probe import NAME, TIER, probe_by_trying
from sandbox.runtimes.qemu.programs import split_programs
from sandbox.runtimes.qemu.sandbox import BootError, QemuSandbox

_BOOTS_MAX = 3
_BOOT_SECONDS = {Accelerator.KVM: 3.0, Accelerator.TCG: 30.0}


class QemuKind:
    """The launcher becomes the cage of a guest, for which there must be a plan by then."""

    name = NAME

    def __init__(self) -> None:
        self.plans: dict[str, cage.Plan] = {}

    def find_program(self) -> str:
        """bubblewrap's path."""
        program = find_program()
        if program is None:
            raise AttemptError(FailureCode.PROVISION_FAILED, "bubblewrap is missing; install it (package bubblewrap).")
        return program

    def files_uid(self, kernel_uid: int) -> int:
        """The same."""
        return kernel_uid

    def count_tasks(self, processes_max: int) -> int:
        """Those of the cage, whatever there is inside."""
        return machine.CAGE_TASKS

    def launch(self, spec: SandboxSpec, kernel_uid: int | None) -> Launch:
        """Lay everything for bubblewrap to bind."""
        return start_launcher(spec.attempt_id, kernel_uid, cage.staged_paths(self.plans[spec.attempt_id]))

    def make_sandbox(
        self, handle: SandboxHandle, spec: SandboxSpec, group: ControlGroup, launch: Launch, listeners: Listeners
    ) -> QemuSandbox:
        """Of a launcher that is ready; its guest is not booted."""
        return QemuSandbox(handle, self.plans[spec.attempt_id], self.find_program(), group, launch, listeners)


class QemuRuntime(LaunchedSandboxes):
    """Sandboxes with a kernel of their own, emulated where KVM does not work.

    run_dir: a short private directory, for what the probe makes.
    """

    name = NAME
    tier = TIER

    def __init__(self, run_dir: Path, uid_range: range = SANDBOX_UIDS) -> None:
        kind = QemuKind()
        super().__init__(kind, uid_range)
        self._plans = kind.plans
        self._run_dir = run_dir

    async def probe(self) -> Probe:
        """Boot a guest, run `true` in it, end it."""
        return await probe_by_trying(self, self._run_dir, self.hierarchies)

    async def create(self, handle: SandboxHandle, spec: SandboxSpec) -> QemuSandbox:
        """Boot a guest. An emulated one may stop on the way for no reason of ours, so it is tried again."""
        try:
            laid, hidden = await asyncio.to_thread(split_programs, spec.programs)
        except OSError as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, f"A program cannot be laid in: {error}.") from error
        plan = cage.Plan(replace(spec, programs={**laid, **hidden}), find_parts(), hidden, Accelerator.TCG)
        self._plans[handle.attempt_id] = plan
        try:
            return await self._boot(handle, replace(spec, memory_bytes=spec.memory_bytes + machine.CAGE_BYTES))
        finally:
            del self._plans[handle.attempt_id]

    async def _boot(self, handle: SandboxHandle, widened: SandboxSpec) -> QemuSandbox:
        reasons = []
        for _ in range(_BOOTS_MAX):
            made = await super().create(handle, widened)
            assert isinstance(made, QemuSandbox)
            try:
                await made.boot(_BOOT_SECONDS[Accelerator.TCG])
                return made
            except BootError as error:
                reasons.append(str(error))
                await self._end(handle, widened.disk)
            except BaseException:
                await self._end(handle, widened.disk)
                raise
        raise AttemptError(FailureCode.PROVISION_FAILED, f"The guest did not boot, {_BOOTS_MAX} times: {reasons[-1]}")

    async def _end(self, handle: SandboxHandle, disk: Path) -> None:
        """As `destroy`, but the kernel uid stays the attempt's."""
        made = self._sandboxes.pop(handle.attempt_id)
        await made.close()
        await self._sweep(handle)
        if os.getuid() == 0:
            await asyncio.to_thread(take_places, disk)
        self._orphans.end(handle.attempt_id)
