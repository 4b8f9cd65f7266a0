"""The integrity check does not report what a running server may be writing, and checks all tasks that have results."""

import shutil

from doubles.stored_tasks import StoredTasks
from doubles.unreachable_journals import UnreachableJournals
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.journal.journals import FileJournals
from sandbox.server.integrity import DiscrepancyKind, IntegrityCheck


def find_kinds(stored, journals):
    store = stored.open_store()
    try:
        check = IntegrityCheck(journals, store, stored.data_dir, deep=False, wait_for_indexing=lambda: None)
        return [discrepancy.kind for discrepancy in check.find_discrepancies()]
    finally:
        store.close()


def test_incomplete_record_of_a_writer_that_may_be_alive_is_not_reported(tmp_path):
    stored = StoredTasks.with_three_tasks(tmp_path)
    with stored.records("task-2").open("ab") as records:
        records.write(b"0123")
    journals = UnreachableJournals(tmp_path)
    assert find_kinds(stored, journals) == []
    journals.is_unknown = False
    assert find_kinds(stored, journals) == [DiscrepancyKind.JOURNAL_TORN]


def test_results_that_cannot_be_listed_are_reported(tmp_path):
    stored = StoredTasks.with_three_tasks(tmp_path)
    artifacts = TaskLayout(tmp_path, "task-2").artifacts
    shutil.rmtree(artifacts)
    artifacts.symlink_to(artifacts)
    assert find_kinds(stored, FileJournals(tmp_path)) == [DiscrepancyKind.ARTIFACT_DAMAGED]


def test_task_with_results_but_without_a_journal_is_reported(tmp_path):
    stored = StoredTasks.with_three_tasks(tmp_path)
    without_results = TaskLayout(tmp_path, "task-3")
    for name in ("task-2", "task-3"):
        shutil.rmtree(TaskLayout(tmp_path, name).root / "journal")
        store = stored.open_store()
        store.delete(name)
        store.close()
    for path in without_results.artifacts.iterdir():
        path.rename(path.with_name(f"inherited-{path.name}"))
    assert find_kinds(stored, FileJournals(tmp_path)) == [DiscrepancyKind.JOURNAL_MISSING]


def test_task_that_ends_during_the_check_is_in_the_index(tmp_path):
    stored = StoredTasks.with_three_tasks(tmp_path)

    class BusyJournals(FileJournals):
        """Another task ends just after the journals are listed."""

        def task_ids(self):
            listed = list(super().task_ids())
            if "task-4" not in listed:
                stored.add_completed_task("task-4")
            return listed

    store = stored.open_store()
    indexed = store.task_ids

    def end_task():
        found = indexed()
        stored.index()
        return found

    store.task_ids = end_task
    check = IntegrityCheck(BusyJournals(tmp_path), store, tmp_path, deep=False, wait_for_indexing=lambda: None)
    assert list(check.find_discrepancies()) == []
    store.close()
