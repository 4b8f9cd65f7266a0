"""Sockets in the run directory that killed processes left behind."""

import asyncio
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from sandbox.interfaces.file_layout import (
    ATTEMPT_ID_PATTERN,
    AttemptLayout,
    probe_directory,
)

_ATTEMPT_SOCKET = re.compile(rf"({ATTEMPT_ID_PATTERN})\.(sock|files)")
"""A runner's control socket, and the socket for a guest's files, which exists briefly while the guest is created."""


class SocketLeftovers:
    """Implements `interfaces.placement.LeftoverSource` for the run directory of a single data directory."""

    kind = "socket"
    belongs_to_this_server = True

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def attempt_ids(self) -> Collection[str]:
        """Return the attempts that have a socket, even if no process listens on it. Probes are not included.

        A probe is recognized by its directory, which is created before its socket.
        """
        found = {attempt_id for attempt_id, _ in self._sockets()}
        return {attempt_id for attempt_id in found if not probe_directory(self._run_dir, attempt_id).exists()}

    async def clean_up(self, attempt_id: str, layout: AttemptLayout) -> None:
        """Remove the attempt's sockets."""
        await asyncio.to_thread(self._remove, attempt_id)

    def _remove(self, attempt_id: str) -> None:
        for each, path in self._sockets():
            if each == attempt_id:
                path.unlink(missing_ok=True)

    def _sockets(self) -> Iterator[tuple[str, Path]]:
        try:
            paths = list(self._run_dir.iterdir())
        except FileNotFoundError:  # the directory was removed as an old temporary file
            return
        for path in paths:
            found = _ATTEMPT_SOCKET.fullmatch(path.name)
            if found and _is_socket(path):
                yield found[1], path


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return False
