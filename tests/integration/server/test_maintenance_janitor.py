"""The janitor continues after a failed action, and removes nothing because of its age until the clock is trusted."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from doubles.server_components import AdjustableClock, ServerComponents
from doubles.stored_tasks import StoredTasks
from sandbox.bootstrap.server import create_maintenance_actions
from sandbox.interfaces.server_services import Retention
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import CLOCK_TRUST_SECONDS
from sandbox.server.maintenance import Janitor, MaintenanceAction
from sandbox.store.sqlite import SqliteStore

CLOCK_OFFSET = timedelta(days=91)
FAILED = Failure(FailureCode.AGENT_FAILED, "It failed.")


class MisadjustedClock(AdjustableClock):
    """A clock that is months ahead until it is corrected, and that can skip time."""

    offset, skipped = CLOCK_OFFSET, timedelta()

    def now(self):
        return super().now() + self.offset + self.skipped

    def monotonic(self):
        return super().monotonic() + self.skipped.total_seconds()


@pytest.fixture
def components(tmp_path):
    """Two tasks that have just ended, one with a preserved sandbox."""
    stored = StoredTasks(tmp_path / "data")
    stored.current_time = datetime.now(UTC) - timedelta(minutes=10)
    stored.add_completed_task("done")
    stored.add_failed_task("preserved", FAILED, attempt_id="b" * 12, lifecycle={"failure_action": "preserve"})
    files = TaskLayout(stored.data_dir, "preserved").attempt("b" * 12)
    files.disk.mkdir(parents=True)
    files.handle.write_text("{}")
    stored.index()
    (tmp_path / "run").mkdir()
    instance = ServerComponents(stored.data_dir, SqliteStore(stored.data_dir / "index.sqlite"))
    instance.clock = MisadjustedClock()
    yield instance
    instance.store.close()


def run_janitor(components, retention, *steps, time_to_live_seconds=86_400):
    """Run the janitor at the start and after each step; return whether the task and the preserved disk still exist."""

    async def scenario():
        async with components.server() as service:
            context = SimpleNamespace(
                data_dir=components.data_dir,
                run_dir=components.data_dir.parent / "run",
                settings=SimpleNamespace(
                    retention=SimpleNamespace(retention=retention),
                    preserve=SimpleNamespace(time_to_live_seconds=time_to_live_seconds),
                ),
            )
            actions = create_maintenance_actions(
                context,
                service.placements,
                components.journals,
                components.store,
                components.clock,
                service.preserved_sandboxes,
                service.pruner,
            )
            janitor, results = Janitor(actions), []
            for step in (lambda: None, *steps):
                step()
                await janitor.run_once()
                files = TaskLayout(components.data_dir, "preserved").attempt("b" * 12)
                results.append((TaskLayout(components.data_dir, "done").root.exists(), files.disk.exists()))
            return results

    return asyncio.run(scenario())


def test_nothing_is_removed_when_the_clock_is_corrected(components):
    def correct_clock():
        components.clock.offset = timedelta()

    def skip_an_hour():
        components.clock.skipped += timedelta(seconds=CLOCK_TRUST_SECONDS)

    assert (
        run_janitor(components, Retention(older_than_seconds=90 * 86_400), correct_clock, skip_an_hour, skip_an_hour)
        == [(True, True)] * 4
    )


def test_clock_is_trusted_after_a_steady_hour(components):
    def skip_an_hour():
        components.clock.skipped += timedelta(seconds=CLOCK_TRUST_SECONDS)

    retention = Retention(older_than_seconds=90 * 86_400)
    assert run_janitor(components, retention, skip_an_hour) == [(True, True), (False, False)]


def test_count_limit_and_short_ttl_do_not_need_a_trusted_clock(components):
    assert run_janitor(components, Retention(older_than_seconds=90 * 86_400, keep=1), time_to_live_seconds=1) == [
        (False, False)
    ]


async def test_failing_or_hanging_action_does_not_block_others(monkeypatch, caplog):
    monkeypatch.setattr("sandbox.server.maintenance.MAINTENANCE_ACTION_TIMEOUT_SECONDS", 0.05)
    completed = []

    async def failing():
        raise OSError("no such luck")

    async def hanging():
        await asyncio.Event().wait()

    async def working():
        completed.append("works")

    janitor = Janitor(
        [
            MaintenanceAction("a", failing, "Fix a."),
            MaintenanceAction("b", hanging, "Fix b."),
            MaintenanceAction("c", working, "Fix c."),
        ]
    )
    with caplog.at_level(logging.ERROR):
        await janitor.run_once()
    assert completed == ["works"]
    assert [record.getMessage() for record in caplog.records] == [
        "Maintenance of a failed: no such luck; retrying in 5 minutes. Fix a.",
        "Maintenance of b failed: TimeoutError; retrying in 5 minutes. Fix b.",
    ]
