"""The example repository: a small project with a bug, in a reproducible commit."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

REPOSITORY_NAME = "example.git"
GIT_TIMEOUT_SECONDS = 30.0

FILES: Mapping[str, str] = {
    "README.md": "# Basket\n\nAdds up a basket of prices. `python3 -m unittest` runs the tests.\n",
    "CLAUDE.md": "Prices are whole cents. Run the tests with `python3 -m unittest`; there is nothing to install.\n",
    ".gitignore": "__pycache__/\n",
    "basket.py": '''\
"""Adds up a basket."""


def total_cents(prices):
    """Return the sum of the prices, in cents."""
    total = 0
    for index in range(len(prices) - 1):
        total += prices[index]
    return total
''',
    "test_basket.py": """\
import unittest

from basket import total_cents


class BasketTest(unittest.TestCase):
    def test_three_items_cost_what_they_cost_together(self):
        self.assertEqual(total_cents([250, 120, 999]), 1369)


if __name__ == "__main__":
    unittest.main()
""",
}

_IDENTITY = {"NAME": "Example", "EMAIL": "example@sandbox.invalid", "DATE": "2026-01-29T10:00:00+00:00"}


def git_environment() -> dict[str, str]:
    """Return an environment in which git ignores all configuration and never prompts."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_TERMINAL_PROMPT": "0",
    }


def make_example_repository(directory: Path) -> Path:
    """Create the bare repository `example.git`, with a `main` branch, in `directory`; return its path.

    Raises OSError, or subprocess.SubprocessError if git fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    bare = directory / REPOSITORY_NAME
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        work = Path(scratch)
        for name, text in FILES.items():
            (work / name).write_text(text)
        _git(work, "init", "--quiet", "--initial-branch=main", "--template=")
        _git(work, "add", ".")
        _git(work, "commit", "--quiet", "--message=Add up a basket")
        _git(work, "clone", "--quiet", "--bare", "--template=", "--no-hardlinks", ".", str(bare))
    return bare


def _git(directory: Path, *arguments: str) -> None:
    identity_variables = {
        f"GIT_{role}_{field}": value for role in ("AUTHOR", "COMMITTER") for field, value in _IDENTITY.items()
    }
    subprocess.run(
        ["git", *arguments],  # noqa: S607  (found by the PATH of the environment below)
        cwd=directory,
        env=git_environment() | identity_variables,
        check=True,
        capture_output=True,
        timeout=GIT_TIMEOUT_SECONDS,
    )
