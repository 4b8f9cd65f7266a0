"""What the server's janitor looks after."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sandbox.bootstrap.runtime import make_runtime
from sandbox.bootstrap.settings.schema import ServerSettings
from sandbox.disks.leftovers import DiskLeftovers
from sandbox.disks.removal import remove
from sandbox.images.catalog import Catalog
from sandbox.interfaces.placement import Leftovers
from sandbox.placements.local.placement import SocketLeftovers
from sandbox.runtimes.processes import SandboxLeftovers
from sandbox.server.maintenance.compaction import Packing
from sandbox.server.maintenance.garbage_collector import Clearing, Rooms
from sandbox.server.maintenance.janitor import Calendar, Duty
from sandbox.server.maintenance.probe_cleanup import ProbeClearing
from sandbox.server.maintenance.pruning import Expiry
from sandbox.server.task_service import Equipment


def gather_duties(data_dir: Path, run_dir: Path, rooms: Equipment, settings: ServerSettings) -> Sequence[Duty]:
    """In the order in which they are done."""
    kinds: Sequence[Leftovers] = (
        # Any runtime ends the sandboxes of all; this one needs nothing to be installed.
        SandboxLeftovers(make_runtime("bubblewrap", run_dir)),
        DiskLeftovers(data_dir),
        SocketLeftovers(run_dir),
    )
    calendar, time_to_live_seconds = Calendar(rooms.clock), settings.preserve.time_to_live_seconds
    expiry = Expiry(rooms.store, rooms.preservation, rooms.clock, time_to_live_seconds)
    clearing = Clearing(Rooms(data_dir, rooms.journals, rooms.store, rooms.preservation, remove), kinds)
    probes = ProbeClearing(run_dir, kinds, remove)

    packing = Packing(rooms.journals, rooms.store, rooms.clock)

    async def expire() -> None:
        if calendar.is_believed(time_to_live_seconds):
            await expiry.sweep()

    async def prune() -> None:
        bounds = rooms.retention
        if not calendar.is_believed(bounds.older_than_seconds or 0):
            bounds = replace(bounds, older_than_seconds=None)
        await rooms.pruning.prune(bounds)

    async def clear_profiles() -> None:
        await asyncio.to_thread(Catalog(data_dir).clear)

    return (
        Duty("preserved sandboxes", expire, "Look at the index and the disk of the data directory."),
        Duty("what crashes left of attempts", clearing.clear, "docs/operations.md tells how to remove it by hand."),
        Duty("journals of finished tasks", packing.sweep, "Make room on the disk of the data directory."),
        Duty("tasks that are kept no longer", prune, "Look at [retention] and the disk of the data directory."),
        Duty("what probes left", probes.clear, f"Look into {run_dir}."),
        Duty("half-made images", clear_profiles, f"Look into {data_dir / 'profiles'}."),
    )
