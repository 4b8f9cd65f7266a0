"""The integrity check does not report a record that a live writer may still be writing."""

from doubles.stored_tasks import StoredTasks
from doubles.unreachable_journals import UnreachableJournals
from sandbox.server.maintenance.integrity import DiscrepancyKind, IntegrityCheck


def find_kinds(stored, journals):
    store = stored.store()
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
