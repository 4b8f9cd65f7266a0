"""Tracked files contain no machine-specific paths and no package index hosts."""

import json
import re
import subprocess
from pathlib import Path

import pytest

# The agent's home is a path inside sandboxes, not on a machine; `me` and `user` are placeholders. `/root` itself is
# allowed: tests check that sandboxes cannot see it.
MACHINE_PATH = re.compile(r"/home/(?!agent\b|me\b|user\b)[a-z][\w-]*/|/root/\.\w+/|/Users/\w+/")
# The names are split so that this line does not match.
INDEX_HOSTS = ["py" + "pi.org", "python" + "hosted.org", "registry." + "npmjs.org", "deb." + "debian.org"]

VENDORED_ASSETS = {
    "highlight.min.js": "@highlightjs/cdn-assets/es/highlight.min.js",
    "htmx.min.js": "htmx.org/dist/htmx.min.js",
    "markdown-it.min.js": "markdown-it/dist/browser/markdown-it.esm.min.mjs",
}


@pytest.fixture(scope="module")
def tracked(root: Path) -> dict[Path, str]:
    """The tracked text files. Outside a git checkout, the test is skipped."""
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
    return [f"{path}: {match[0]}" for path, text in tracked.items() for match in pattern.finditer(text)]


def test_no_file_contains_machine_paths(tracked: dict[Path, str]):
    assert findings(tracked, MACHINE_PATH) == []


def test_no_file_contains_package_indexes(tracked: dict[Path, str]):
    assert findings(tracked, re.compile("|".join(map(re.escape, INDEX_HOSTS)))) == []


@pytest.mark.parametrize(
    ("line", "is_match"),
    [
        ("see /home/" + "somebody/project", True),
        ("/root/" + ".cache/x", True),
        ("HOME=/home/agent/.claude", False),
        ("/home/agent", False),
        ("no /root is visible", False),
    ],
)
def test_machine_path_pattern_matches_only_home_directories(line: str, is_match: bool):
    assert (MACHINE_PATH.search(line) is not None) == is_match


def test_each_requirement_is_pinned_by_hash(root: Path):
    for path in sorted((root / "requirements").glob("*.txt")):
        build_option, *pins = re.split(r"\n+(?=\S)", path.read_text().strip())
        assert build_option == "--only-binary :all:"
        assert pins
        assert [
            pin.split()[0] for pin in pins if not re.search(r"^\S+==\S+.*--hash=sha256:[0-9a-f]{64}", pin, re.DOTALL)
        ] == []


@pytest.mark.parametrize("directory", ["npm", "npm-dev"])
def test_each_npm_package_is_pinned_by_hash_without_location(root: Path, directory: str):
    lock = json.loads((root / "requirements" / directory / "package-lock.json").read_text())
    requested = json.loads((root / "requirements" / directory / "package.json").read_text())["dependencies"]
    packages = {location: package for location, package in lock["packages"].items() if location}
    assert requested == {name: packages[f"node_modules/{name}"]["version"] for name in requested}
    for location, package in packages.items():
        assert re.fullmatch(r"sha512-[A-Za-z0-9+/]{86}==", package["integrity"]), location
        assert "resolved" not in package, location
        assert "hasInstallScript" not in package, location


@pytest.mark.parametrize(("asset", "package_file"), VENDORED_ASSETS.items())
def test_vendored_asset_matches_the_locked_package(root: Path, asset: str, package_file: str):
    installed = root / ".venv/share/npm-dev/node_modules" / package_file
    if not installed.exists():
        pytest.skip("the npm packages are missing; run script/setup --dev with access to a registry")
    assert (root / "src/sandbox/dashboard/assets" / asset).read_bytes() == installed.read_bytes()


def test_bundled_asset_is_built_from_the_locked_package(root: Path, tmp_path: Path):
    packages = root / ".venv/share/npm-dev/node_modules"
    if not (packages / "yaml").exists():
        pytest.skip("the npm packages are missing; run script/setup --dev with access to a registry")
    bundle = tmp_path / "yaml.bundle.js"
    subprocess.run([root / "script" / "bundle-yaml", bundle], timeout=120, check=True)
    assets = root / "src/sandbox/dashboard/assets"
    assert bundle.read_bytes() == (assets / "yaml.bundle.js").read_bytes()
    assert (packages / "yaml/LICENSE").read_bytes() == (assets / "yaml.LICENSE").read_bytes()


def test_every_minified_asset_is_a_vendored_one(root: Path):
    assert {path.name for path in (root / "src/sandbox/dashboard/assets").glob("*.min.*")} == VENDORED_ASSETS.keys()


def test_scripts_are_executable(root: Path):
    for path in [*(root / "script").iterdir(), root / ".ci" / "run"]:
        assert path.stat().st_mode & 0o111, path
        assert path.read_text().startswith("#!"), path
