"""Runs parts of tests as a user who is not root, even if the tests run as root."""

import asyncio
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from doubles.multiprocessing_forkserver import MULTIPROCESSING_FORKSERVER

_UID = 65534
_TIMEOUT_SECONDS = 60


@contextmanager
def ordinary_user_directory(*, for_sandboxes=False):
    """Yield a directory owned by the ordinary user. Skips the test if ordinary users cannot create user namespaces.

    for_sandboxes: also skip the test if they cannot mount /proc in such a namespace, as in containers that mask parts
    of /proc.
    """
    directory = Path(tempfile.mkdtemp(prefix="ordinary-"))
    try:
        if os.geteuid() == 0:
            os.chown(directory, _UID, _UID)
        prefix = ("setpriv", f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups") if os.geteuid() == 0 else ()
        options = ("--pid", "--fork", "--mount-proc") if for_sandboxes else ()
        probe = subprocess.run([*prefix, "unshare", "--user", "--map-root-user", *options, "true"], check=False)
        if probe.returncode != 0:
            pytest.skip("ordinary users cannot create user namespaces" + (", or mount /proc" if for_sandboxes else ""))
        yield directory
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", "--", str(directory)], check=False)
        shutil.rmtree(directory)


def run_as_ordinary_user(coroutine_function, *arguments):
    """Run a coroutine function in a process of the ordinary user; a failed assertion fails the test."""
    child = MULTIPROCESSING_FORKSERVER.Process(target=_run_unprivileged, args=(coroutine_function, *arguments))
    child.start()
    child.join(_TIMEOUT_SECONDS)
    if child.exitcode is None:
        child.kill()
        child.join()
    assert child.exitcode == 0


def _run_unprivileged(coroutine_function, *arguments):
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_UID, _UID, _UID)
        os.setresuid(_UID, _UID, _UID)
    asyncio.run(coroutine_function(*arguments))
