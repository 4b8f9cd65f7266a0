"""Finished tasks go whole, and nothing else goes, wherever a crash comes in between."""

import asyncio
import contextlib
import errno
import os
import threading

import msgspec
import pytest

from doubles.server_components import Rooms
from doubles.stored_tasks import KeptTasks
from sandbox.disks.removal import remove_trees
from sandbox.interfaces.layout import TaskLayout
from sandbox.interfaces.store import TaskQuery
from sandbox.interfaces.tasks import Retention, TaskNotFoundError, UnavailableError
from sandbox.model.errors import Failure, FailureCode
from sandbox.server.maintenance import pruning
from sandbox.store.sqlite import SqliteStore

FAILED = Failure(FailureCode.AGENT_FAILED, "It failed.")
EVERYTHING = Retention(older_than_seconds=0)


@pytest.fixture
def kept(tmp_path):
    made = KeptTasks(tmp_path)
    for number in range(1, 6):
        made.finish(f"task-{number}", labels={"number": str(number)})
    made.index()
    return made


@pytest.fixture
def world(kept, tmp_path):
    made = Rooms(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield made
    made.store.close()


def prune(world, retention, **options):
    async def play():
        async with world.server() as service:
            gone = await service.prune(retention, **{"dry_run": False, **options})
            page = await service.query(TaskQuery(order="asc"))
            return [task.id for task in gone], [task.id for task in page.tasks]

    world.store.close()
    world.store = SqliteStore(world.data_dir / "index.sqlite")
    return asyncio.run(play())


def directories(kept):
    return sorted(path.name for path in (kept.data_dir / "tasks").iterdir())


def test_the_oldest_go_and_nothing_is_left_of_them(kept, world):
    assert prune(world, Retention(keep=3), dry_run=True) == (["task-1", "task-2"], [f"task-{n}" for n in range(1, 6)])
    assert len(directories(kept)) == 5
    assert prune(world, Retention(keep=3)) == (["task-1", "task-2"], ["task-3", "task-4", "task-5"])
    assert directories(kept) == ["task-3", "task-4", "task-5"]
    assert list((kept.data_dir / "pruned").iterdir()) == []
    assert prune(world, Retention(keep=3)) == ([], ["task-3", "task-4", "task-5"])


def test_bytes_are_those_on_disk(kept, world):
    sparse = kept.data_dir / "tasks" / "task-2" / "artifacts" / "big"
    sparse.write_bytes(os.urandom(400_000))
    gone, left = prune(world, Retention(max_bytes=300_000))
    assert (gone, left) == (["task-1", "task-2"], ["task-3", "task-4", "task-5"])


def test_what_is_gone_is_not_found_and_its_id_may_come_again(kept, world):
    async def play():
        async with world.server() as service:
            await service.prune(EVERYTHING, dry_run=False)
            for ask in (service.status, service.artifacts):
                with pytest.raises(TaskNotFoundError):
                    await ask("task-1")
            with pytest.raises(TaskNotFoundError):
                await anext(service.replay("task-1"))
            again = await service.submit(kept_manifest())
            await world.launched("task-1")
            world.runners.die("task-1")
            return again.task.last_seq, (await service.query(TaskQuery(labels={"number": "1"}))).total_count

    assert asyncio.run(play()) == (1, 0)


def test_whoever_is_in_the_middle_of_its_story_is_told_that_the_rest_is_gone(kept, world):
    kept.finish("long", lines=20_000)
    kept.index("long")

    async def play():
        async with world.server() as service:
            story = service.replay("long")
            await anext(story)
            await service.prune(EVERYTHING, dry_run=False)
            *_, trouble, end = [frame async for frame in story]
            return trouble, end

    trouble, end = asyncio.run(play())
    assert (trouble["type"], trouble["error"], end["type"]) == ("error", "task_not_found", "end")
    assert "kept no longer" in trouble["message"]


def kept_manifest():
    from doubles.manifests import manifest

    return manifest("task-1")


def test_neither_unfinished_tasks_nor_preserved_sandboxes_go(kept, world):
    running = kept.run("running")
    kept.fail("preserved", FAILED, attempt_id="b" * 12, lifecycle={"failure_action": "preserve"})
    kept.fail("released", FAILED, attempt_id="c" * 12, lifecycle={"failure_action": "preserve"})
    handle = TaskLayout(kept.data_dir, "preserved").attempt("b" * 12).handle
    handle.parent.mkdir(parents=True)
    handle.write_text("{}")
    kept.index("running", "preserved", "released")

    gone, left = prune(world, EVERYTHING)
    assert gone == [*(f"task-{number}" for number in range(1, 6)), "released"]
    assert left == ["running", "preserved"]
    assert handle.exists()
    running.writer.close()


def test_a_task_whose_journal_somebody_holds_stays(kept, world):
    with kept.journals.try_lock("task-1"):
        assert prune(world, EVERYTHING)[1] == ["task-1"]
    assert prune(world, EVERYTHING)[0] == ["task-1"]


def test_a_task_whose_files_are_gone_can_go_too(kept, world):
    import shutil

    shutil.rmtree(kept.data_dir / "tasks" / "task-1")
    assert prune(world, Retention(keep=4)) == (["task-1"], ["task-2", "task-3", "task-4", "task-5"])


@pytest.mark.parametrize("step", ["before the rename", "after the rename"])
def test_a_crash_leaves_a_task_whole_or_gone(kept, world, monkeypatch, step):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        where = (
            "pathlib.Path.rename"
            if step == "before the rename"
            else "sandbox.server.maintenance.pruning.Pruner._move_aside"
        )
        real = __import__("sandbox.server.maintenance.pruning", fromlist=["Pruner"]).Pruner._move_aside
        broken.setattr(where, crash if step == "before the rename" else lambda *a: (real(*a), crash()))
        with pytest.raises(KeyboardInterrupt):
            prune(world, Retention(keep=4))

    world.store.close()
    world.store = SqliteStore(world.data_dir / "index.sqlite")

    async def look():
        async with world.server() as service:
            listed = [task.id for task in (await service.query(TaskQuery(order="asc"))).tasks]
            for task_id in listed:
                assert [frame async for frame in service.replay(task_id)][-1]["type"] == "end"
                assert len(await service.artifacts(task_id)) == 1
            return listed

    whole = [f"task-{number}" for number in range(1, 6)]
    assert asyncio.run(look()) == (whole if step == "before the rename" else whole[1:])
    prune(world, Retention(keep=4))
    assert directories(kept) == whole[1:]
    assert list((kept.data_dir / "pruned").iterdir()) == []


def test_what_cannot_be_moved_stays_whole(kept, world):
    (kept.data_dir / "pruned").write_text("no directory")
    with pytest.raises(UnavailableError):
        prune(world, Retention(keep=4))
    (kept.data_dir / "pruned").unlink()
    assert prune(world, Retention(keep=5)) == ([], [f"task-{number}" for number in range(1, 6)])


def test_where_pruned_tasks_go_is_made_while_a_directory_can_be_made(kept, world):
    """Each file of a file system that takes no further one is one that was there before."""

    async def play():
        async with world.server() as service:
            service.dependencies.pruner.prepare()
            service.dependencies.pruner.prepare()
            assert list((kept.data_dir / "pruned").iterdir()) == []
            (kept.data_dir / "pruned").rmdir()
            (kept.data_dir / "pruned").write_text("no directory")
            service.dependencies.pruner.prepare()

    asyncio.run(play())


def test_what_cannot_be_moved_is_listed_again(kept, world, monkeypatch, caplog):
    def refuse(*_):
        raise OSError("Read-only file system")

    with monkeypatch.context() as broken:
        broken.setattr("sandbox.server.maintenance.pruning.Pruner._move_aside", refuse)
        assert prune(world, Retention(keep=4)) == ([], [f"task-{number}" for number in range(1, 6)])
    assert "is kept: Read-only" in caplog.text
    assert prune(world, Retention(keep=4))[0] == ["task-1"]


def test_a_rename_that_may_not_be_on_disk_yet_is_one_all_the_same(kept, world, monkeypatch):
    real = __import__("sandbox.server.maintenance.pruning", fromlist=["Pruner"]).Pruner._move_aside

    def refuse_afterwards(*arguments):
        real(*arguments)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("sandbox.server.maintenance.pruning.Pruner._move_aside", refuse_afterwards)
        assert prune(world, Retention(keep=4)) == (["task-1"], [f"task-{number}" for number in range(2, 6)])


GONE_BUT_THERE = r"^Finished tasks that are gone for good: 1\..*pruned: Operation not permitted"


def test_a_rest_that_cannot_be_removed_keeps_no_other_task_and_no_bound(kept, world):
    async def refuse(_):
        raise OSError("Operation not permitted")

    world.remove = refuse
    with pytest.raises(UnavailableError, match=GONE_BUT_THERE):
        prune(world, Retention(keep=4))
    assert directories(kept) == [f"task-{number}" for number in range(2, 6)]
    (kept.data_dir / "tasks" / "task-2" / "artifacts" / "big").write_bytes(os.urandom(400_000))
    with pytest.raises(UnavailableError, match=GONE_BUT_THERE):
        prune(world, Retention(keep=4, max_bytes=300_000))
    assert directories(kept) == ["task-3", "task-4", "task-5"]
    world.remove = remove_trees
    assert prune(world, Retention(keep=4)) == ([], ["task-3", "task-4", "task-5"])
    assert list((kept.data_dir / "pruned").iterdir()) == []


def block_lock(kept):
    lock = kept.data_dir / "tasks" / "task-1" / "journal" / "lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    return "Is a directory"


def damage_artifacts(kept):
    kept.damage_row("task-1", "artifacts")
    return "index of tasks is damaged"


def damage_task(kept):
    kept.damage_row("task-1", "task")
    return "index of tasks is damaged"


def damage_task_into_another(kept):
    with contextlib.closing(kept.store()) as store:
        other = store.load("task-2").task
    kept.damage_row("task-1", "task", msgspec.json.encode(other))
    return "index of tasks is damaged .*tells of task task-2"


def damage_time_of_change(kept):
    """A row that comes first by its time, and whose task is as young as can be."""
    kept.damage_row("task-1", "state_changed_at", 0)
    return "index of tasks is damaged .*and at 0 by its row"


ALL_GO = [{"older_than_seconds": 0}, {"keep": 0}, {"max_bytes": 0}]


@pytest.mark.parametrize(
    "hurt", [block_lock, damage_artifacts, damage_task, damage_task_into_another, damage_time_of_change]
)
@pytest.mark.parametrize("bounds", ALL_GO)
def test_a_task_that_cannot_be_looked_at_stays_and_keeps_no_other_from_its_turn(kept, world, hurt, bounds):
    async def play():
        async with world.server() as service:
            reason = hurt(kept)
            with pytest.raises(UnavailableError, match=rf"gone for good: 4\. .*task-1: .*{reason}"):
                await service.prune(Retention(**bounds), dry_run=False)

    asyncio.run(play())
    assert directories(kept) == ["task-1"]


@pytest.mark.parametrize("bounds", ALL_GO)
def test_a_kept_sandbox_that_cannot_be_looked_at_stays_and_keeps_no_other_from_its_turn(
    kept, world, monkeypatch, bounds
):
    preserve(kept, "preserved", "b" * 12, 1)

    def refuse(_, task):
        if task.id == "preserved":
            raise OSError(errno.EIO, "Input/output error")
        return False

    monkeypatch.setattr("sandbox.server.preserved_sandboxes.PreservedSandboxes.is_preserved", refuse)
    gone = [f"task-{number}" for number in range(1, 6)]
    assert prune(world, Retention(**bounds), dry_run=True)[0] == gone
    with pytest.raises(UnavailableError, match=r"gone for good: 5\. .*preserved: .*Input/output error"):
        prune(world, Retention(**bounds))
    assert directories(kept) == ["preserved"]


def test_for_a_disk_that_does_not_answer_nobody_waits_batch_after_batch(kept, world, monkeypatch):
    tried = []

    async def hang(paths):
        tried.append(len(paths))
        raise TimeoutError

    monkeypatch.setattr("sandbox.server.maintenance.pruning._REMOVE_BATCH_SIZE", 1)
    world.remove = hang
    with pytest.raises(UnavailableError, match="it takes too long; see why it stays there"):
        prune(world, Retention(keep=2))
    assert directories(kept) == ["task-4", "task-5"]
    assert tried == [1]


def test_a_task_stays_until_its_sandbox_is_cleared_away(kept, world):
    handle = TaskLayout(kept.data_dir, "task-1").attempt("a" * 12).handle
    handle.parent.mkdir(parents=True, exist_ok=True)
    handle.write_text("{}")
    assert prune(world, EVERYTHING)[1] == ["task-1"]
    handle.unlink()
    assert prune(world, EVERYTHING)[0] == ["task-1"]


def preserve(kept, task_id, attempt_id, size_bytes):
    """A task whose sandbox is kept for its user, with so much in it."""
    kept.fail(task_id, FAILED, attempt_id=attempt_id, lifecycle={"failure_action": "preserve"})
    workspace = TaskLayout(kept.data_dir, task_id).attempt(attempt_id).workspace
    workspace.mkdir(parents=True)
    (workspace / "big").write_bytes(os.urandom(size_bytes))
    kept.index(task_id)


def test_what_cannot_go_takes_no_other_tasks_place(kept, world):
    preserve(kept, "preserved", "b" * 12, 3_000_000)
    unknown = kept.data_dir / "tasks" / "unknown"
    unknown.mkdir()
    (unknown / "big").write_bytes(os.urandom(3_000_000))
    assert prune(world, Retention(max_bytes=1_000_000))[0] == []
    assert prune(world, Retention(keep=5))[0] == []
    assert prune(world, Retention(keep=4))[0] == ["task-1"]


def test_bounds_together_take_no_more_than_each_alone(kept, world):
    for number in range(1, 6):
        (kept.data_dir / "tasks" / f"task-{number}" / "artifacts" / "big").write_bytes(os.urandom(400_000))
    both = Retention(keep=4, max_bytes=1_500_000)
    assert prune(world, both, dry_run=True)[0] == ["task-1", "task-2"]
    assert prune(world, both) == (["task-1", "task-2"], ["task-3", "task-4", "task-5"])


@pytest.fixture
def slow_disk(world, monkeypatch):
    """Measuring task-2 takes until the test lets it go on; how often it was begun."""
    begun, may_end = [], threading.Event()
    real = pruning.disk_usage_bytes

    def measure(directory):
        if directory.name == "task-2":
            begun.append(directory.name)
            may_end.wait(60)
        return real(directory)

    monkeypatch.setattr(pruning, "disk_usage_bytes", measure)
    yield begun, may_end
    may_end.set()


def test_a_measurement_that_takes_longer_than_a_round_is_one_and_serves_the_next(kept, world, slow_disk):
    begun, may_end = slow_disk
    (kept.data_dir / "tasks" / "task-2" / "artifacts" / "big").write_bytes(os.urandom(400_000))
    by_size = Retention(max_bytes=300_000)

    async def play():
        async with world.server() as service:
            for _ in range(40):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await service.prune(by_size, dry_run=False)
            # Whatever else needs a thread gets one.
            async with asyncio.timeout(10):
                await asyncio.to_thread(lambda: None)
                before = len(begun)
                may_end.set()
                gone = await service.prune(by_size, dry_run=False)
            return before, [task.id for task in gone]

    assert asyncio.run(play()) == (1, ["task-1", "task-2"])


def test_nothing_that_is_gone_counts_in_a_measurement_of_before(kept, world, slow_disk):
    begun, may_end = slow_disk
    for number in range(1, 6):
        (kept.data_dir / "tasks" / f"task-{number}" / "artifacts" / "big").write_bytes(os.urandom(400_000))

    async def play():
        async with world.server() as service:
            measuring = asyncio.create_task(service.prune(Retention(max_bytes=1_500_000), dry_run=False))
            async with asyncio.timeout(10):
                while not begun:
                    await asyncio.sleep(0.005)
            world.store.delete("task-1")
            may_end.set()
            return [task.id for task in await measuring]

    assert asyncio.run(play()) == ["task-2"]


def test_a_server_that_ends_waits_for_no_measurement(world, slow_disk):
    begun, may_end = slow_disk

    async def play():
        async with world.server() as service:
            measuring = asyncio.create_task(service.prune(Retention(max_bytes=1), dry_run=False))
            async with asyncio.timeout(10):
                while not begun:
                    await asyncio.sleep(0.005)
            measuring.cancel()

    asyncio.run(play())
    assert not may_end.is_set()


def test_age_and_number_do_not_wait_for_a_measurement(kept, world, slow_disk):
    begun, _ = slow_disk

    async def play():
        async with world.server() as service:
            measuring = asyncio.create_task(service.prune(Retention(max_bytes=10**9), dry_run=False))
            async with asyncio.timeout(10):
                while not begun:
                    await asyncio.sleep(0.005)
                gone = asyncio.create_task(service.prune(Retention(keep=4), dry_run=False))
                while world.store.load("task-1") is not None:
                    await asyncio.sleep(0.005)
            for waiting in (measuring, gone):
                waiting.cancel()

    asyncio.run(play())
