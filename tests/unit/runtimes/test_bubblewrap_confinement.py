"""A confinement runs in the control group that the attempt's sandbox used."""

import os
import socket
from pathlib import Path

import pytest

from sandbox.interfaces.runtime import ConfinementSpec
from sandbox.runtimes.bubblewrap_confinement import BubblewrapConfinement
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.workspace.git_command import Git, GitError


class FakeLauncher:
    """A program that writes an error to stderr and exits. Afterwards, the kernel's count of OOM kills is `kills`."""

    def __init__(self, events: Path, kills: int) -> None:
        self._events = events
        self._kills = kills

    async def run_command(self, _argv: object, low_fds: tuple[int, ...], _descriptors: object) -> int:
        os.write(low_fds[2], b"fatal: write error: No space left on device\n")
        self._events.write_text(f"oom 1\noom_kill {self._kills}\n")
        return 128


@pytest.mark.parametrize(("kills_after", "is_out_of_memory"), [(1, False), (2, True)])
async def test_earlier_oom_kill_is_not_attributed_to_git(tmp_path: Path, kills_after: int, is_out_of_memory: bool):
    events = tmp_path / "memory.events"
    events.write_text("oom 1\noom_kill 1\n")
    spec = ConfinementSpec(1, 1024**3, 10, [tmp_path])
    with socket.socket() as listener:
        launcher = FakeLauncher(events, kills_after)
        programs = BubblewrapConfinement("attempt", "bwrap", launcher, listener, spec, ControlGroup([tmp_path]), None)
        with pytest.raises(GitError) as raised:
            await Git(os.defpath, confinement=programs).run("diff-tree", directory=tmp_path)
    assert raised.value.is_out_of_memory is is_out_of_memory
    assert "No space left" in raised.value.stderr
