"""Plays a part of a test as somebody who is not root, whoever runs the tests."""

import asyncio
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from doubles.child_processes import OWN_PROCESSES

_UID = 65534
_SECONDS = 60


@contextmanager
def ordinary_place(*, for_sandboxes=False):
    """A directory that is the ordinary user's. Skips the test where the kernel gives such users no namespace.

    for_sandboxes: also where it lets them mount no /proc in one, as in containers that cover parts of theirs.
    """
    place = Path(tempfile.mkdtemp(prefix="ordinary-"))
    try:
        if os.geteuid() == 0:
            os.chown(place, _UID, _UID)
        lowered = ("setpriv", f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups") if os.geteuid() == 0 else ()
        wanted = ("--pid", "--fork", "--mount-proc") if for_sandboxes else ()
        tried = subprocess.run([*lowered, "unshare", "--user", "--map-root-user", *wanted, "true"], check=False)
        if tried.returncode != 0:
            pytest.skip("ordinary users get no user namespace here" + (", or no /proc in it" if for_sandboxes else ""))
        yield place
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", "--", str(place)], check=False)
        shutil.rmtree(place)


def as_ordinary_user(story, *arguments):
    """Run a coroutine function in a process of such a user. Its assertions count."""
    child = OWN_PROCESSES.Process(target=_lowered, args=(story, *arguments))
    child.start()
    child.join(_SECONDS)
    if child.exitcode is None:
        child.kill()
        child.join()
    assert child.exitcode == 0


def _lowered(story, *arguments):
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_UID, _UID, _UID)
        os.setresuid(_UID, _UID, _UID)
    asyncio.run(story(*arguments))
