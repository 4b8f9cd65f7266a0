"""An earlier version of Sandbox: its source, and an interpreter that imports it."""

import fcntl
import io
import json
import subprocess
import sysconfig
import tarfile
import venv
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sandbox.runtimes.kernel_uid_pool import LOCK_DIRECTORY

REPLACED_MODULES = {"httpx": "httpx2"}
"""Dependencies of old versions that are no longer installed, and the installed modules that replace them."""

REPOSITORY = Path(__file__).parents[2]


def missing_reason(commit):
    """Return why the commit is not available in this repository; None if it is available."""
    try:
        result = subprocess.run(
            ["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=REPOSITORY, capture_output=True, check=False
        )
    except FileNotFoundError:
        return "git is not installed"
    return None if result.returncode == 0 else f"no commit {commit[:12]} here: {result.stderr.decode(errors='replace')}"


@contextmanager
def lock_retired_uids():
    """Lock the kernel uids that are marked as retired, because old versions ignore the mark and would use the uids."""
    with ExitStack() as stack:
        for marker in LOCK_DIRECTORY.glob("*.retired"):
            lock_file = stack.enter_context(marker.with_suffix("").open("a"))
            try:
                fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # held by another test
        yield


class OldVersion:
    """An environment with the current dependencies and the `sandbox` package of a commit.

    It is a virtual environment because runners are started with `-I`, which ignores PYTHONPATH. It does not use the
    `.pth` files of the current environment, which may point to the current `sandbox`.
    """

    def __init__(self, directory, commit):
        self.source = directory / "src"
        archive = subprocess.run(["git", "archive", commit, "src"], cwd=REPOSITORY, capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(directory, filter="data")
        venv.EnvBuilder(symlinks=True).create(directory / "venv")
        self.python = directory / "venv" / "bin" / "python"
        [packages] = (directory / "venv" / "lib").glob("python*/site-packages")
        paths = [str(self.source), *dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))]
        for old_name, name in REPLACED_MODULES.items():
            (packages / f"{old_name}.py").write_text(f"import sys, {name}\nsys.modules[__name__] = {name}\n")
        (packages / "old.pth").write_text("".join(f"{path}\n" for path in paths))

    def run(self, *arguments, **environment):
        """Run the interpreter with -I, as for runners; return stdout."""
        result = subprocess.run(
            [self.python, "-I", *arguments], env=environment, capture_output=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stderr.decode(errors="replace")
        return result.stdout

    def command(self, *arguments, **environment):
        """Run the old version's command line; return the JSON output."""
        return json.loads(self.run("-m", "sandbox", *arguments, "--format", "json", **environment))
