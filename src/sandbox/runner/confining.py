"""What a step confines the host's programs by: the attempt's kernel uid and control group."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from sandbox.contracts.confinement import Confine, Confinement
from sandbox.contracts.runtime import ConfinementSpec
from sandbox.model.limits import SANDBOX_PROCESSES_MAX
from sandbox.runner.equipment import Attempt
from sandbox.runner.steps.provision import plan


def confine_for(attempt: Attempt) -> Confine:
    """Makes confinements for the attempt, the handle on disk before anything of them is there."""
    if attempt.equipment.confine is not None:
        return attempt.equipment.confine
    vm = attempt.task.manifest.vm

    @asynccontextmanager
    async def confine(directories: Sequence[Path], read_only: Sequence[Path]) -> AsyncIterator[Confinement]:
        handle = plan(attempt)
        spec = ConfinementSpec(vm.cpus, vm.memory_bytes, SANDBOX_PROCESSES_MAX, directories, read_only)
        async with attempt.equipment.runtime.confine(handle, spec) as confinement:
            yield confinement

    return confine
