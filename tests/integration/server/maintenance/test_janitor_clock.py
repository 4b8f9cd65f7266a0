"""A machine boots with its clock months ahead: nothing is removed for good before the clock has proved itself."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from doubles.server_components import RoomClock, Rooms
from doubles.stored_tasks import KeptTasks
from sandbox.bootstrap.maintenance import create_maintenance_jobs
from sandbox.bootstrap.settings.schema import PreserveSection, ServerSettings
from sandbox.interfaces.layout import TaskLayout
from sandbox.interfaces.tasks import Retention
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.limits import CLOCK_TRUST_SECONDS
from sandbox.server.maintenance.janitor import Janitor
from sandbox.store.sqlite import SqliteStore

DAYS = timedelta(days=91)
FAILED = Failure(FailureCode.AGENT_FAILED, "It failed.")


class BootedClock(RoomClock):
    """Months ahead, until somebody sets it; an hour may pass at once."""

    ahead, passed = DAYS, timedelta()

    def now(self):
        return super().now() + self.ahead + self.passed

    def monotonic(self):
        return super().monotonic() + self.passed.total_seconds()


@pytest.fixture
def world(tmp_path):
    """Two tasks that ended just now, one of which left its sandbox for its user."""
    kept = KeptTasks(tmp_path / "data")
    kept.at = datetime.now(UTC) - timedelta(minutes=10)
    kept.finish("done")
    kept.fail("preserved", FAILED, attempt_id="b" * 12, lifecycle={"failure_action": "preserve"})
    files = TaskLayout(kept.data_dir, "preserved").attempt("b" * 12)
    files.disk.mkdir(parents=True)
    files.handle.write_text("{}")
    kept.index()
    (tmp_path / "run").mkdir()
    made = Rooms(kept.data_dir, SqliteStore(kept.data_dir / "index.sqlite"))
    made.clock = BootedClock()
    yield made
    made.store.close()


def rounds(world, bounds, *steps, time_to_live="24h"):
    """What is there after a round of the janitor at the start, and one after each step."""
    settings = ServerSettings(preserve=PreserveSection(time_to_live=time_to_live))

    async def play():
        async with world.server() as service:
            rooms, found = replace(service.dependencies, retention=bounds), []
            janitor = Janitor(create_maintenance_jobs(world.data_dir, world.data_dir.parent / "run", rooms, settings))
            for step in (lambda: None, *steps):
                step()
                await janitor.run_once()
                files = TaskLayout(world.data_dir, "preserved").attempt("b" * 12)
                found.append((TaskLayout(world.data_dir, "done").root.exists(), files.disk.exists()))
            return found

    return asyncio.run(play())


def test_what_was_set_right_in_time_has_cost_nothing(world):
    def set_right():
        world.clock.ahead = timedelta()

    def hour():
        world.clock.passed += timedelta(seconds=CLOCK_TRUST_SECONDS)

    assert rounds(world, Retention(older_than_seconds=90 * 86_400), set_right, hour, hour) == [(True, True)] * 4


def test_a_clock_that_goes_evenly_for_an_hour_is_believed(world):
    def hour():
        world.clock.passed += timedelta(seconds=CLOCK_TRUST_SECONDS)

    bounds = Retention(older_than_seconds=90 * 86_400)
    assert rounds(world, bounds, hour) == [(True, True), (False, False)]


def test_number_and_bounds_below_an_hour_wait_for_no_clock(world):
    assert rounds(world, Retention(older_than_seconds=90 * 86_400, keep=1), time_to_live="1s") == [(False, False)]
