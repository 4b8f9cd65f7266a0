"""Who collects a sandbox's processes when bubblewrap or runsc, their parent, has ended before them.

The host's first process should, and in many containers does not. So a process that has sandboxes adopts orphaned
descendants as long as it has any, and `processes.reap_adopted` collects them.
"""

import ctypes

_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37


class OrphanAdoption:
    """Adopts while at least one attempt asks for it; then all is as it was before."""

    def __init__(self) -> None:
        self._attempts: set[str] = set()
        self._held_before = False

    def begin(self, attempt_id: str) -> None:
        """Adopt from now on."""
        if not self._attempts:
            before = ctypes.c_int(0)
            ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
            self._held_before = bool(before.value)
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._attempts.add(attempt_id)

    def end(self, attempt_id: str) -> None:
        """This attempt needs it no more; nothing happens when it never did."""
        had_any = bool(self._attempts)
        self._attempts.discard(attempt_id)
        if had_any and not self._attempts and not self._held_before:
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
