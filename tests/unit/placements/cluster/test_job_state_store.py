import json

from sandbox.model.resources import Resources
from sandbox.placements.cluster.job_state import JobStore, StoredJob

JOB = StoredJob("task-1", "a" * 12, Resources(1, 2**30, 2**30), 600.0, is_abandoned=True, was_end_confirmed=True)


def test_keys_of_stored_jobs_stay_the_same(tmp_path):
    """Jobs outlive an upgrade of the server: a key that is not found would start an abandoned attempt again."""
    store = JobStore(tmp_path / "jobs")
    store.save(JOB)
    [file] = (tmp_path / "jobs").iterdir()
    stored = json.loads(file.read_bytes())
    assert (stored["is_given_up"], stored["has_ended"]) == (True, True)
    assert [*store.load_all()] == [JOB]
