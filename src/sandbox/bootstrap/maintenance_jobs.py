"""The janitor's jobs."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sandbox.bootstrap.runtime import make_runtime
from sandbox.disks.leftovers import DiskLeftovers
from sandbox.disks.removal import remove_trees
from sandbox.images.catalog import ProfileCatalog
from sandbox.interfaces.placement import LeftoverSource
from sandbox.placements.local.leftovers import ProbeCleanup, SocketLeftovers
from sandbox.runtimes.processes import SandboxLeftovers
from sandbox.server.maintenance.compression import JournalCompressor
from sandbox.server.maintenance.garbage_collector import GarbageCollector
from sandbox.server.maintenance.janitor import ClockCheck, PeriodicJob
from sandbox.server.maintenance.pruning import PreservationExpiry
from sandbox.server.task_service import ServerParts


def create_maintenance_jobs(parts: ServerParts, run_dir: Path, time_to_live_seconds: float) -> Sequence[PeriodicJob]:
    """Create the jobs in the order of their execution. time_to_live_seconds: of preserved sandboxes."""
    data_dir = parts.data_dir
    leftover_sources: Sequence[LeftoverSource] = (
        # Every runtime can end the sandboxes of all runtimes. This one needs no installed program for that.
        SandboxLeftovers(make_runtime("bubblewrap", run_dir)),
        DiskLeftovers(data_dir),
        SocketLeftovers(run_dir),
    )
    clock_check = ClockCheck(parts.clock)
    expiry = PreservationExpiry(parts.store, parts.preserved_sandboxes, parts.clock, time_to_live_seconds)
    garbage_collector = GarbageCollector(
        data_dir, parts.journals, parts.store, parts.preserved_sandboxes, remove_trees, leftover_sources
    )
    probes = ProbeCleanup(run_dir, leftover_sources, remove_trees)

    compressor = JournalCompressor(parts.journals, parts.store, parts.clock)

    async def expire() -> None:
        if clock_check.is_trusted(time_to_live_seconds):
            await expiry.sweep()

    async def prune() -> None:
        bounds = parts.retention
        if not clock_check.is_trusted(bounds.older_than_seconds or 0):
            bounds = replace(bounds, older_than_seconds=None)
        await parts.pruner.prune(bounds)

    async def clear_profiles() -> None:
        await asyncio.to_thread(ProfileCatalog(data_dir).remove_stale_builds)

    return (
        PeriodicJob("preserved sandboxes", expire, "Check the index and the disk of the data directory."),
        PeriodicJob(
            "leftovers of crashed attempts",
            garbage_collector.sweep,
            "docs/operations.md describes how to remove them by hand.",
        ),
        PeriodicJob("journals of finished tasks", compressor.sweep, "Free space on the disk of the data directory."),
        PeriodicJob("expired tasks", prune, "Check [retention] and the disk of the data directory."),
        PeriodicJob("leftovers of probes", probes.sweep, f"Check {run_dir}."),
        PeriodicJob("incomplete images", clear_profiles, f"Check {data_dir / 'profiles'}."),
    )
