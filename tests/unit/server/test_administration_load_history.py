"""The content and the number of load samples."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from doubles.fake_tasks import manifest
from doubles.server_components import TO_RUNNING, ServerComponents
from sandbox.interfaces.server_services import LoadSample
from sandbox.model.fixed_limits import LOAD_SAMPLES_MAX
from sandbox.store.sqlite import SqliteStore

GIB = 1024**3


@pytest.fixture
def sample(tmp_path: Path) -> Callable[..., list[LoadSample]]:
    def sample(*loads: dict[str, int], tasks: int = 0, running: int = 0) -> list[LoadSample]:
        """Take a sample for each load, after submitting `tasks` tasks, of which `running` are running."""

        async def take() -> list[LoadSample]:
            components = ServerComponents(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
            async with components.server() as server:
                for number in range(tasks):
                    await server.submit(manifest(f"task-{number}"))
                    await components.wait_for_launch(f"task-{number}")
                    if number < running:
                        components.placement.record(f"task-{number}", *TO_RUNNING)
                for load in loads:
                    components.host_load = replace(components.host_load, **load)
                    server.load.add_sample()
                return list(server.load.load_samples())

        return asyncio.run(take())

    return sample


def test_cpu_is_measured_between_two_samples(sample):
    samples = sample(
        {"cpu_busy_ticks": 100, "cpu_total_ticks": 1000},
        {"cpu_busy_ticks": 175, "cpu_total_ticks": 1100},
        {"cpu_busy_ticks": 175, "cpu_total_ticks": 1100},
        {"cpu_busy_ticks": 170, "cpu_total_ticks": 1200},
    )
    assert [each.cpu_percent for each in samples] == [None, 75.0, None, 0.0]


def test_memory_and_tasks_are_counted(sample):
    (one,) = sample({"memory_available_bytes": GIB, "memory_total_bytes": 4 * GIB}, tasks=3, running=1)
    assert (one.memory_used_bytes, one.memory_total_bytes) == (3 * GIB, 4 * GIB)
    assert (one.running, one.waiting) == (3, 0)
    assert one.cpus_reserved > 0
    assert one.cpus >= one.cpus_reserved


def test_only_the_latest_samples_are_kept(sample):
    samples = sample(*({"cpu_total_ticks": number} for number in range(1, LOAD_SAMPLES_MAX + 10)))
    assert len(samples) == LOAD_SAMPLES_MAX
    assert samples == sorted(samples, key=lambda each: each.at)
