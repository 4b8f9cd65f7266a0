"""An earlier version of the product beside the present one: its source, and an interpreter that imports it."""

import io
import json
import subprocess
import sysconfig
import tarfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def missing_reason(commit):
    """Why the history of this repository does not have the commit; None where it has."""
    try:
        done = subprocess.run(
            ["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=REPOSITORY, capture_output=True, check=False
        )
    except FileNotFoundError:
        return "there is no git"
    return None if done.returncode == 0 else f"no commit {commit[:12]} here: {done.stderr.decode(errors='replace')}"


class OldVersion:
    """Has the dependencies of this environment, and the `sandbox` of the commit.

    Runners are started with `-I`, which ignores PYTHONPATH. So the interpreter is that of a virtual environment. No
    `.pth` file of this environment counts there, so that its own `sandbox` is not found where it is only a link.
    """

    def __init__(self, directory, commit):
        self.source = directory / "src"
        archive = subprocess.run(["git", "archive", commit, "src"], cwd=REPOSITORY, capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as opened:
            opened.extractall(directory, filter="data")
        venv.EnvBuilder(symlinks=True).create(directory / "venv")
        self.python = directory / "venv" / "bin" / "python"
        [packages] = (directory / "venv" / "lib").glob("python*/site-packages")
        paths = [str(self.source), *dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))]
        (packages / "old.pth").write_text("".join(f"{path}\n" for path in paths))

    def run(self, *arguments, **environment):
        """Run its interpreter as runners run; gives what it says."""
        done = subprocess.run(
            [self.python, "-I", *arguments], env=environment, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    def command(self, *arguments, **environment):
        """Run its command line, which answers in JSON."""
        return json.loads(self.run("-m", "sandbox", *arguments, "--format", "json", **environment))
