"""Locates the claude binary and installs the copy that sandboxes run."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import stat
from pathlib import Path
from shutil import copyfileobj

from sandbox.model.errors import SandboxError

_PACKAGE = "claude_agent_sdk"
_EXECUTE_ONLY = 0o111


class BinaryMissingError(SandboxError):
    """The claude binary was not found on this machine."""

    code = "agent_missing"


def find_binary() -> Path:
    """Return the claude binary in the installed claude-agent-sdk wheel. Raises BinaryMissingError."""
    spec = importlib.util.find_spec(_PACKAGE)
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(directory) / "_bundled" / "claude"
        if binary.is_file():
            return binary
    raise BinaryMissingError(
        "There is no claude binary; install the claude-agent-sdk wheel for this platform (its sdist contains none)."
    )


def binary_version(binary: Path) -> str:
    """Return the version, such as `2.1.332`, from a file next to the binary; `unknown` if the file cannot be read."""
    try:
        words = binary.with_name("claude.version").read_text().split()
    except OSError:
        return "unknown"
    return words[0].replace("/", "_") if words else "unknown"


def install_binary(data_dir: Path, source: Path | None = None) -> Path:
    """Return the path of the execute-only copy under `data_dir`; create the copy if it does not exist.

    The kernel makes a process non-dumpable if its user cannot read its program. Therefore, processes that the agent
    starts cannot trace the agent, read its environment, or open its stdout to forge a result, although they run with
    the same uid. For this to work, the launcher must have dropped CAP_DAC_OVERRIDE before it executes the copy.

    Raises BinaryMissingError, or OSError if the copy cannot be written.
    """
    source = source or find_binary()
    directory = data_dir / "agent"
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    target = directory / f"claude-{binary_version(source)}-{source.stat().st_size}"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_installed(target):
            _copy(source, target)
    return target


def _is_installed(target: Path) -> bool:
    """Return whether the complete copy exists. A copy gets its final name only when it is complete."""
    return target.is_file() and stat.S_IMODE(target.stat().st_mode) == _EXECUTE_ONLY


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name("partial")
    partial.unlink(missing_ok=True)
    with source.open("rb") as reader, partial.open("xb") as writer:
        copyfileobj(reader, writer, 16 * 1024 * 1024)
        writer.flush()
        os.fchmod(writer.fileno(), _EXECUTE_ONLY)
        os.fsync(writer.fileno())
    partial.replace(target)
