"""Sockets of runners that were killed."""

import asyncio
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from sandbox.contracts.layout import AttemptLayout, probe_place

_OF_AN_ATTEMPT = re.compile(r"([a-z2-7]{12})\.(sock|files)")
"""A runner's ear, and what a guest's files pass through for a moment while it is made."""


class SocketLeftovers:
    """Implements `contracts.leftovers.Leftovers` for one run directory, which is one data directory's alone."""

    kind = "socket"
    is_private = True

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def attempt_ids(self) -> Collection[str]:
        """Those that have one, whoever listens there; but no probe, whose directory is there before its socket."""
        found = {attempt_id for attempt_id, _ in self._sockets()}
        return {attempt_id for attempt_id in found if not probe_place(self._run_dir, attempt_id).exists()}

    async def end(self, attempt_id: str, files: AttemptLayout) -> None:
        """Remove them."""
        await asyncio.to_thread(self._remove, attempt_id)

    def _remove(self, attempt_id: str) -> None:
        for each, path in self._sockets():
            if each == attempt_id:
                path.unlink(missing_ok=True)

    def _sockets(self) -> Iterator[tuple[str, Path]]:
        try:
            paths = list(self._run_dir.iterdir())
        except FileNotFoundError:  # a cleaner of temporary files was there
            return
        for path in paths:
            found = _OF_AN_ATTEMPT.fullmatch(path.name)
            if found and _is_socket(path):
                yield found[1], path


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return False
