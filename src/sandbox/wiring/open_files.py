"""What `sandbox doctor` says of the number of open files that the machine has for all (fs.file-max, proc_sys_fs(5))."""

import resource
from pathlib import Path

from sandbox.contracts.runtime import Probe
from sandbox.model.limits import SANDBOX_PROCESSES_MAX
from sandbox.runtimes.process_limits import OPEN_FILES_MAX
from sandbox.wiring.finding import Finding

_SETTINGS = Path("/proc/sys")
_ANY_NUMBER = 2**63 - 1
"""What the kernel takes for no bound."""


def find_open_files(probe: Probe) -> list[Finding]:
    """Nothing, where one sandbox cannot hold so many that others get none."""
    machine = _read("fs/file-max")
    if not probe.works or _held_by_one(probe) < machine:
        return []
    message = (
        f"one task on {probe.runtime} can hold all {machine} files that this machine may have open (fs.file-max); "
        "then nobody but root can open one"
    )
    mend = f"sysctl -w fs.file-max={_ANY_NUMBER}, as systemd does; what files take of a task's memory bounds them then."
    return [Finding("limits", False, message, mend, is_needed=False)]


def _held_by_one(probe: Probe) -> int:
    """A file that is mapped and closed is open all the same, and counts for no limit of the process.

    In a tier with a kernel of its own one process of the host holds the files of all.
    """
    if probe.tier == "namespaces":
        return SANDBOX_PROCESSES_MAX * (OPEN_FILES_MAX + _read("vm/max_map_count"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _ANY_NUMBER if hard == resource.RLIM_INFINITY else hard


def _read(name: str) -> int:
    return int(Path(_SETTINGS, name).read_text())
