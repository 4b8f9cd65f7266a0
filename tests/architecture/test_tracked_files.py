"""What is in the repository works on any machine, and names no machine and no package index."""

import json
import re
import subprocess
from pathlib import Path

import pytest

# Our own agent's home is a path inside sandboxes, not of a machine; `me` and `user` are made up. `/root` by itself is
# what a sandbox must not see.
MACHINE_PATH = re.compile(r"/home/(?!agent\b|me\b|user\b)[a-z][\w-]*/|/root/\.\w+/|/Users/\w+/")
# Written in two parts, so that this line is not a finding itself.
INDEX_HOSTS = ["py" + "pi.org", "python" + "hosted.org", "registry." + "npmjs.org", "deb." + "debian.org"]


@pytest.fixture(scope="module")
def tracked(root: Path) -> dict[Path, str]:
    """The text files in the repository, or of the source tree where there is no repository."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, timeout=30, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    texts = {}
    for name in listing.stdout.decode().split("\0"):
        path = root / name
        if name and path.is_file():
            content = path.read_bytes()
            if b"\0" not in content:
                texts[path] = content.decode(errors="replace")
    assert root / "pyproject.toml" in texts
    return texts


def findings(tracked: dict[Path, str], pattern: re.Pattern[str]) -> list[str]:
    return [f"{path}: {found[0]}" for path, text in tracked.items() for found in pattern.finditer(text)]


def test_no_path_of_a_machine(tracked: dict[Path, str]):
    assert findings(tracked, MACHINE_PATH) == []


def test_no_package_index(tracked: dict[Path, str]):
    assert findings(tracked, re.compile("|".join(map(re.escape, INDEX_HOSTS)))) == []


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("see /home/" + "somebody/project", True),
        ("/root/" + ".cache/x", True),
        ("HOME=/home/agent/.claude", False),
        ("/home/agent", False),
        ("no /root is visible", False),
    ],
)
def test_the_pattern_for_machine_paths_tells_ours_from_others(line: str, is_found: bool):
    assert (MACHINE_PATH.search(line) is not None) == is_found


def test_every_requirement_is_pinned_by_hash(root: Path):
    for path in sorted((root / "requirements").glob("*.txt")):
        pins = re.split(r"\n(?=\S)", path.read_text().strip())
        assert pins
        assert [
            pin.split()[0] for pin in pins if not re.search(r"^\S+==\S+.*--hash=sha256:[0-9a-f]{64}", pin, re.DOTALL)
        ] == []


@pytest.mark.parametrize("folder", ["npm", "npm-dev"])
def test_every_npm_package_is_pinned_by_hash_and_names_no_place(root: Path, folder: str):
    lock = json.loads((root / "requirements" / folder / "package-lock.json").read_text())
    asked = json.loads((root / "requirements" / folder / "package.json").read_text())["dependencies"]
    packages = {place: package for place, package in lock["packages"].items() if place}
    assert asked == {name: packages[f"node_modules/{name}"]["version"] for name in asked}
    for place, package in packages.items():
        assert re.fullmatch(r"sha512-[A-Za-z0-9+/]{86}==", package["integrity"]), place
        assert "resolved" not in package, place
        assert "hasInstallScript" not in package, place


def test_scripts_can_be_run(root: Path):
    for path in [*(root / "script").iterdir(), root / ".ci" / "run"]:
        assert path.stat().st_mode & 0o111, path
        assert path.read_text().startswith("#!"), path
