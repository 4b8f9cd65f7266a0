"""Checks of `sandbox doctor`: which runtimes work, and what they isolate and limit."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from sandbox.bootstrap.doctor import Finding
from sandbox.bootstrap.doctor.kernel_checks import check_open_files, check_preemption, check_scheduler
from sandbox.bootstrap.runtime_selection import AUTO, choose_runtime, make_runtime
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.runtimes.probe import MachineBusyError, find_confinement_problem

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
