"""Whether a task has ended, from the last record of its journal."""

from doubles.stored_tasks import StoredTasks
from sandbox.journal.journals import has_task_ended


def test_end_of_a_long_task_is_detected_without_reading_its_whole_journal(tmp_path, monkeypatch):
    tasks = StoredTasks(tmp_path)
    for task_id in ("ended", "compressed"):
        tasks.add_completed_task(task_id, lines=3000, line_bytes=300)
    tasks.add_completed_task("short")
    tasks.journals.compress("compressed")
    tasks.add_running_task("running", lines=3000, line_bytes=300)
    tasks.journals.create("empty").close()
    read, sizes = tasks.journals.read, []

    def measure(*arguments, **options):
        batch = read(*arguments, **options)
        sizes.append(len(batch.records))
        return batch

    monkeypatch.setattr(tasks.journals, "read", measure)
    ended = [each for each in (*tasks.journals.task_ids(), "empty", "gone") if has_task_ended(tasks.journals, each)]
    assert sorted(ended) == ["compressed", "empty", "ended", "gone", "short"]
    assert sum(sizes) < 20


def test_task_whose_last_record_is_incomplete_has_not_ended(tmp_path):
    tasks = StoredTasks(tmp_path)
    tasks.add_completed_task("task-1", lines=500)
    records = tmp_path / "tasks" / "task-1" / "journal" / "records"
    assert has_task_ended(tasks.journals, "task-1")
    records.write_bytes(records.read_bytes()[:-1])
    assert not has_task_ended(tasks.journals, "task-1")
