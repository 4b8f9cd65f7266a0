"""Checks of `sandbox doctor`: which runtimes work, what they isolate and limit, and the kernel's settings."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import resource
from pathlib import Path

from sandbox.bootstrap.doctor import Finding
from sandbox.bootstrap.runtime_selection import AUTO, choose_runtime, make_runtime
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.model.fixed_limits import SANDBOX_PROCESSES_MAX
from sandbox.runtimes.probe import MachineBusyError, find_confinement_problem
from sandbox.runtimes.programs.inherited_limits import HOST_PROGRAM_FILES_MAX, OPEN_FILES_MAX

_SYSCTL_ROOT = Path("/proc/sys")
_KERNEL_COMMAND_LINE = Path("/proc/cmdline")
_KERNEL_CONFIG = Path("/proc/config.gz")
_UNLIMITED = 2**63 - 1
"""The kernel's value for no limit."""


def check_open_files(probe: RuntimeProbe) -> list[Finding]:
    """Report whether a single sandbox can open so many files that other processes cannot open any."""
    machine = _read_sysctl("fs/file-max")
    if not probe.is_available or _open_files_per_task(probe) < machine:
        return []
    message = (
        f"one task on {probe.runtime} can open all {machine} files that this machine allows (fs.file-max); "
        "then only root can open more"
    )
    remedy = (
        f"sysctl -w fs.file-max={_UNLIMITED}, as systemd does; "
        "then the memory limit of each task bounds its open files."
    )
    return [Finding("limits", False, message, remedy, blocks_tasks=False)]


def check_preemption(probe: RuntimeProbe) -> list[Finding]:
    """Report whether a sandbox's system call can occupy a host CPU until the call ends."""
    if not probe.is_available or probe.tier != "namespaces" or _preemption_mode() not in ("none", "voluntary"):
        return []
    message = (
        f"one system call of a task on {probe.runtime} can occupy a processor for many seconds, "
        "because the kernel does not interrupt system calls"
    )
    remedy = "Start the kernel with preempt=full, or use a kernel that is built with CONFIG_PREEMPT."
    return [Finding("kernel", False, message, remedy, blocks_tasks=False, runtime=probe.runtime)]


def check_scheduler(probe: RuntimeProbe) -> list[Finding]:
    """Report whether the kernel's version has an error that lets a sandbox keep host programs from running.

    The error came with Linux 6.13. Version 6.18.45 reverts the change ("sched/fair: Fix EEVDF entity placement bug
    causing scheduling lag"). Whether a distribution's kernel contains the revert is unknown.
    """
    version = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", os.uname().release)
    if not probe.is_available or probe.tier != "namespaces" or version is None:
        return []
    major, minor, patch = (int(number or 0) for number in version.groups())
    if not ((6, 13, 0) <= (major, minor, patch) < (6, 18, 45) or (major, minor) == (6, 19)):
        return []
    message = (
        f"programs of one task on {probe.runtime} that constantly wake each other can keep other programs from "
        f"running for many seconds, because Linux {major}.{minor}.{patch} has an error in its scheduler"
    )
    remedy = "Use Linux 6.18.45 or later, the current Linux 6.12 of Debian, or another runtime."
    return [Finding("kernel", False, message, remedy, blocks_tasks=False, runtime=probe.runtime)]


def _preemption_mode() -> str | None:
    """Return the kernel's preemption mode: none, voluntary, lazy or full; None if it cannot be determined.

    The mode comes from the kernel parameter `preempt`, or else from the kernel's configuration.
    """
    parameters = re.findall(r"(?:^|\s)preempt=(\w+)", _KERNEL_COMMAND_LINE.read_text(errors="replace"))
    if parameters:
        return str(parameters[-1])
    for path in (_KERNEL_CONFIG, Path("/boot", f"config-{os.uname().release}")):
        try:
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except OSError:
            continue
        for mode in ("none", "voluntary", "lazy"):
            if re.search(rf"^CONFIG_PREEMPT_{mode.upper()}=y$".encode(), text, re.MULTILINE):
                return mode
        return "full"
    return None


def _open_files_per_task(probe: RuntimeProbe) -> int:
    """Return how many files one task can have open.

    A mapped file remains open after its descriptor is closed, but no longer counts toward process limits. In a tier
    with a separate kernel, one host process holds the open files of all processes in the sandbox.
    """
    if probe.tier == "namespaces":
        return SANDBOX_PROCESSES_MAX * (OPEN_FILES_MAX + _read_sysctl("vm/max_map_count"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return HOST_PROGRAM_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, HOST_PROGRAM_FILES_MAX)


def _read_sysctl(name: str) -> int:
    return int(Path(_SYSCTL_ROOT, name).read_text())


_LIMITS = {
    "memory": "memory",
    "cpus": "CPUs",
    "processes": "processes",
    "sockets": "socket buffers",
}


def check_runtimes(requested: str, run_dir: Path) -> list[Finding]:
    """Check the runtime that a server would choose now, then the others. Raises UnknownRuntimeError."""
    requested_probe = None if requested == AUTO else asyncio.run(choose_runtime(requested, run_dir)).chosen
    auto_choice = asyncio.run(choose_runtime(AUTO, run_dir))
    chosen = requested_probe or auto_choice.chosen
    others = [probe for probe in auto_choice.probes if probe.runtime != chosen.runtime]
    confined = _confinement_findings(chosen, run_dir) if chosen.is_available else []
    rest = [finding for probe in others for finding in _other_findings(probe)]
    kernel = [
        finding
        for check in (check_preemption, check_scheduler)
        for probe in auto_choice.probes
        for finding in check(probe)
    ]
    return [
        *_chosen_findings(chosen),
        *confined,
        *rest,
        *_limit_findings(chosen),
        *check_open_files(chosen),
        *kernel,
    ]


def _chosen_findings(probe: RuntimeProbe) -> list[Finding]:
    if not probe.is_available:
        return [Finding("sandbox", False, f"{probe.runtime} does not work here", probe.remedy)]
    isolates = [Finding("isolates", True, sentence) for sentence in probe.isolation_notes]
    return [
        Finding("sandbox", True, f"sandboxes run with {probe.runtime}", runtime=probe.runtime),
        *isolates,
        *_gap_findings(probe),
    ]


def _confinement_findings(chosen: RuntimeProbe, run_dir: Path) -> list[Finding]:
    try:
        reason = asyncio.run(find_confinement_problem(make_runtime(chosen.runtime, run_dir), run_dir))
    except MachineBusyError as busy:
        message = f"two attempts to confine git failed, but a server still confines it: {busy}"
        remedy = "Run sandbox doctor again when the machine is less busy."
        return [Finding("git", False, message, remedy, blocks_tasks=False)]
    if reason is None:
        return [Finding("git", True, "runs confined when it reads repositories")]
    message = f"git reads repositories with the server's privileges, because it cannot be confined: {reason}"
    remedy = "Install bubblewrap, and allow ordinary users to create namespaces."
    return [Finding("git", False, message, remedy, blocks_tasks=False)]


def _other_findings(probe: RuntimeProbe) -> list[Finding]:
    if not probe.is_available and probe.is_explicit_only:
        message = f"{probe.runtime} works only slowly without KVM, and is used only if selected by name"
        return [Finding("runtime", False, message, blocks_tasks=False, runtime=probe.runtime)]
    if not probe.is_available:
        message = f"{probe.runtime} does not work here"
        return [Finding("runtime", False, message, probe.remedy, blocks_tasks=False)]
    status_text = "works, and is used only if selected by name" if probe.is_explicit_only else "works too"
    return [Finding("runtime", True, f"{probe.runtime} {status_text}"), *_gap_findings(probe)]


def _gap_findings(probe: RuntimeProbe) -> list[Finding]:
    return [
        Finding("gap", False, f"{probe.runtime}: {sentence}", blocks_tasks=False, runtime=probe.runtime)
        for sentence in probe.gaps
    ]


def _limit_findings(probe: RuntimeProbe) -> list[Finding]:
    if not probe.is_available:
        return []
    enforced = [name for limit, name in _LIMITS.items() if limit in probe.enforced_limits]
    missing = {limit: name for limit, name in _LIMITS.items() if limit not in probe.enforced_limits}
    findings = [Finding("limits", True, f"on {', '.join(enforced)} are enforced")] if enforced else []
    if "memory" in probe.enforced_limits and missing.pop("sockets", ""):
        message = "vm.memory does not count socket buffers: the kernel was started with cgroup.memory=nosocket"
        remedy = "Start the kernel without nosocket in cgroup.memory."
        findings.append(Finding("limits", False, message, remedy, blocks_tasks=False))
    if missing:
        advice = (
            "Run as root, or start the server in a separate control group: systemd-run --user --scope sandbox serve"
        )
        remedy = "Mount cgroups writable." if os.getuid() == 0 else advice
        message = f"on {', '.join(missing.values())} are not enforced: no cgroup is writable"
        findings.append(Finding("limits", False, message, remedy, blocks_tasks=False))
    return findings
