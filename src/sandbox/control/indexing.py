"""Works tasks out of their journals into the store."""

from collections.abc import Collection, Iterable

from sandbox.contracts.journal import Journals
from sandbox.contracts.recorder import read_task
from sandbox.contracts.store import Indexed, Store
from sandbox.model.errors import SandboxError

_TASKS_AT_ONCE = 200


def catch_up(journals: Journals, store: Store) -> dict[str, str]:
    """Bring in what the store does not know, or knows by other rules; as `index_journals`."""
    unknown, outdated = set(journals.task_ids()) - store.task_ids(), frozenset(store.outdated())
    return index_journals(journals, store, sorted(unknown | outdated), known=outdated)


def index_journals(
    journals: Journals, store: Store, task_ids: Iterable[str], *, known: Collection[str] = ()
) -> dict[str, str]:
    """Bring these tasks into the store as their journals tell them now; gives why where that was not possible.

    What the store knew of such a task stays as it is. known: of these a journal that tells of no task is a fault, and
    not what a crash left before a submission was acknowledged. Raises StoreError.
    """
    refused: dict[str, str] = {}
    found: list[Indexed] = []
    for task_id in task_ids:
        try:
            found += _read(journals, task_id, is_known=task_id in known)
        except (SandboxError, OSError) as error:
            refused[task_id] = str(error)
        if len(found) >= _TASKS_AT_ONCE:
            store.save_all(found)
            found.clear()
    store.save_all(found)
    return refused


def _read(journals: Journals, task_id: str, *, is_known: bool) -> list[Indexed]:
    reading = read_task(journals, task_id)
    if reading.task is None:
        if is_known:
            raise OSError(f"The journal of {task_id} tells of no task any more; restore it from a backup.")
        return []
    if reading.task.id != task_id:
        raise OSError(f"The journal in the directory of {task_id} is of task {reading.task.id}; put it back there.")
    return [Indexed(reading.task, reading.offset)]
