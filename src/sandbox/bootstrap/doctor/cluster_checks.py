"""Checks of the cluster engine: Slurm's commands, partition and limits, and the API and permissions of Kubernetes."""

import asyncio
import hashlib
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sandbox.bootstrap.cluster_placement import choose_proof_method, create_kubernetes_engine
from sandbox.bootstrap.doctor import Finding, is_loopback_or_unspecified
from sandbox.bootstrap.secret_sources import ClusterKeyError, read_cluster_key
from sandbox.bootstrap.settings.schema import ClusterSection, ServerSettings, SlurmSection
from sandbox.cluster_engines.kubernetes.engine import KubernetesEngine
from sandbox.cluster_engines.slurm.engine import SYSTEM_PATH
from sandbox.images.profiles import ProfileCatalog
from sandbox.interfaces.cluster_engine import EngineHost, EngineUnavailableError
from sandbox.model.display_text import replace_unprintable, replacement_character
from sandbox.model.errors import error_reason
from sandbox.model.manifest.schema import Vm
from sandbox.placements.cluster.hosts import load_seen_hosts

_COMMANDS = ("sbatch", "squeue", "scancel", "sinfo")
_COMMAND_SECONDS = 15.0
_CONNECT_SECONDS = 5.0
_KILL_WAIT_SECONDS_MIN = 20
"""Minimum KillWait: after SIGTERM, a worker needs 10 s to send its last records and 10 s to remove its files."""

_USABLE_STATES = frozenset({"idle", "mixed", "allocated", "completing", "planned"})
_USABLE_MARKS = "+-~#"
"""Suffixes of the states of usable hosts: completing jobs, planned for a job, powered off to save power, starting."""

_NOT_TESTED_PLUGIN = "task/cgroup"
_TESTED_TRACKING = "proctrack/linuxproc"
_SETTING = re.compile(r"(\w+)\s*= (.*)")
_SERVER = re.compile(r"(?P<host>[^:\s]+|\[[0-9A-Fa-f:]+\])(?::(?P<port>\d{1,5}))?")
_MIB = 1024**2
_NAMES_MAX = 5
"""Maximum number of hosts with the same packages that a message names."""


class _SlurmHost(NamedTuple):
    """A host in the output of sinfo. reason: why it is unavailable; empty if it is available."""

    name: str
    state: str
    cpus: int
    memory_bytes: int
    reason: str

    @property
    def is_usable(self) -> bool:
        """Whether the host responds and accepts jobs. A host whose state ends with `*`, for example, is not usable."""
        return self.state.rstrip(_USABLE_MARKS) in _USABLE_STATES

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(filter(None, (self.state, self.reason)))})"


def check_slurm(settings: ServerSettings) -> list[Finding]:
    """Check what a server with these settings needs from Slurm. Raises EngineUnavailableError."""
    cluster = settings.cluster
    if cluster.engine != "slurm":
        return []
    for name in _COMMANDS:
        _find_command(cluster.slurm, name)
    version = _run(cluster.slurm, "sbatch", "--version")
    hosts, configuration = _list_hosts(cluster.slurm), _read_configuration(cluster.slurm)
    return [
        Finding("slurm", True, f"{version}; {_describe_user('submits the jobs')}"),
        *_check_hosts(hosts, cluster.slurm.partition),
        *_check_configuration(configuration),
        *_check_listen_address(cluster.host, cluster.port, hosts),
        *_check_cluster_key(cluster.host_key_path),
        *_check_packages(settings.server.data_dir.absolute(), hosts),
    ]


def settings_of_worker_host(settings: ServerSettings) -> ServerSettings:
    """Return the settings with the data directory of this host's workers, so that its disk and locks are checked."""
    return replace(settings, server=replace(settings.server, data_dir=Path(settings.cluster.slurm.data_dir)))


def check_worker_host(settings: ServerSettings, server: str) -> list[Finding]:
    """Check what workers on this machine need. server: the address that workers connect to, with or without a port.

    Raises EngineUnavailableError.
    """
    section = settings.cluster.slurm
    findings = [check_server_address(server, settings.cluster.port)]
    version, configuration = _run(section, "scontrol", "--version"), _read_configuration(section)
    findings.append(Finding("slurm", True, f"{version}; {_describe_user('runs this check')}"))
    key = _check_cluster_key(settings.cluster.host_key_path)
    return [*findings, *_check_user(), *_check_configuration(configuration), *key]


def check_server_address(server: str, default_port: int) -> Finding:
    """Check that a server for workers responds at the address."""
    found = _SERVER.fullmatch(server)
    port = int(found["port"] or default_port) if found else 0
    if found is None or not 0 < port < 2**16:
        return Finding("server", False, f"{server!r} is not HOST or HOST:PORT", "Pass the server's cluster.host.")
    host = found["host"].strip("[]")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent, and the fingerprint is shown
    try:
        with (
            socket.create_connection((host, port), _CONNECT_SECONDS) as connection,
            context.wrap_socket(connection) as tls,
        ):
            certificate = tls.getpeercert(binary_form=True) or b""
    except OSError as error:
        message = f"{host}:{port} does not accept workers: {error_reason(error)}"
        remedy = "Start the server with [cluster], and let this machine connect to cluster.host and cluster.port."
        return Finding("server", False, message, remedy)
    fingerprint = hashlib.sha256(certificate).hexdigest()
    return Finding("server", True, f"{host}:{port} responds; its certificate has the fingerprint {fingerprint}")


def _check_user() -> list[Finding]:
    if os.geteuid() == 0:
        return []
    message = "if the jobs run as this user, all sandboxes of this host share one user id, and limits are weaker"
    return [Finding("user", False, message, "Start the server as root, so its jobs run as root.", blocks_tasks=False)]


def _check_cluster_key(path: Path | None) -> list[Finding]:
    if path is None:
        return []
    try:
        read_cluster_key(path)
    except ClusterKeyError as error:
        return [Finding("host key", False, error.message)]
    return [Finding("host key", True, f"{path} is readable")]


def _check_hosts(hosts: list[_SlurmHost], partition: str | None) -> list[Finding]:
    where = f"the partition {partition}" if partition else "the default partition"
    usable = [host for host in hosts if host.is_usable]
    lost = [str(host) for host in hosts if not host.is_usable]
    remedy = "Start slurmd on the hosts, and check each with: scontrol show node NAME"
    if not usable:
        message = f"no host in {where} is available: {', '.join(lost)}" if lost else f"{where} has no hosts"
        return [Finding("hosts", False, message, remedy)]
    message = f"{len(usable)} of {len(hosts)} hosts in {where} are available"
    findings = [Finding("hosts", True, f"{message}: {', '.join(host.name for host in usable)}")]
    if lost:
        findings.append(Finding("hosts", False, f"unavailable hosts: {', '.join(lost)}", remedy, blocks_tasks=False))
    default = Vm()
    if not any(host.cpus >= default.cpus and host.memory_bytes >= default.memory_bytes for host in usable):
        message = f"no host has {default.cpus} CPUs and the memory for a task without vm in its manifest"
        remedy = "Lower vm.cpus or vm.memory in manifests, or add larger hosts."
        findings.append(Finding("hosts", False, message, remedy, blocks_tasks=False))
    return findings


def _check_packages(data_dir: Path, hosts: list[_SlurmHost]) -> list[Finding]:
    """Check whether all hosts have the same programs for tasks without an image. Uses the last workers' reports."""
    profiles = [entry.name for entry in ProfileCatalog(data_dir).entries() if entry.metadata is None]
    names = {host.name for host in hosts}
    by_packages_digest = defaultdict(list)
    for seen in load_seen_hosts(data_dir / "cluster" / "hosts.json"):
        if seen.packages_digest and seen.name in names:
            by_packages_digest[seen.packages_digest].append(seen.name)
    if len(by_packages_digest) < 2 or not profiles:
        return []
    groups = sorted((sorted(group) for group in by_packages_digest.values()), key=lambda group: (-len(group), group))
    shown = "; ".join(", ".join(group[:_NAMES_MAX]) + (", …" if len(group) > _NAMES_MAX else "") for group in groups)
    message = f"the hosts have different packages ({shown}), and {', '.join(profiles)} use the host's own /usr"
    remedy = f"Build the images here, for example: sandbox profile build {profiles[0]}"
    return [Finding("hosts", False, message, remedy, blocks_tasks=False)]


def _check_configuration(configuration: dict[str, str]) -> list[Finding]:
    """Check the Slurm settings that determine how a worker is ended."""
    tracking, task = configuration.get("ProctrackType", ""), configuration.get("TaskPlugin", "")
    # Slurm prints its configuration of control groups only if they are not disabled.
    cgroups = configuration.get("CgroupPlugin", "disabled")
    message = f"ProctrackType={tracking}, TaskPlugin={task}, CgroupPlugin={cgroups}"
    if tracking == _TESTED_TRACKING:
        message += "; if Slurm kills a worker, its runner ends by itself"
    findings = [Finding("slurm", True, message)]
    if tracking == "proctrack/cgroup" or _NOT_TESTED_PLUGIN in task:
        message = (
            "Sandbox has not been tested with Slurm's cgroup plugins: a sandbox may be outside its job's control group"
        )
        remedy = f"Set ProctrackType={_TESTED_TRACKING} and a TaskPlugin without {_NOT_TESTED_PLUGIN} in slurm.conf."
        findings.append(Finding("slurm", False, message, remedy, blocks_tasks=False))
    elif tracking != _TESTED_TRACKING:
        message = f"Sandbox has not been tested with {tracking}: Slurm may not find all processes of a worker"
        remedy = f"Set ProctrackType={_TESTED_TRACKING} in slurm.conf."
        findings.append(Finding("slurm", False, message, remedy, blocks_tasks=False))
    wait = re.match(r"\d+", configuration.get("KillWait", ""))
    if wait is not None and int(wait[0]) < _KILL_WAIT_SECONDS_MIN:
        message = f"KillWait={wait[0]} s is too short for a worker that has to send its last records"
        remedy = f"Set KillWait={_KILL_WAIT_SECONDS_MIN} or more in slurm.conf."
        findings.append(Finding("slurm", False, message, remedy, blocks_tasks=False))
    return findings


def _check_listen_address(host: str, port: int, hosts: list[_SlurmHost]) -> list[Finding]:
    others = [one.name for one in hosts if one.name != socket.gethostname().partition(".")[0]]
    if is_loopback_or_unspecified(host) and others:
        message = f"workers on other hosts ({', '.join(others[:3])}) cannot connect to {host}:{port}"
        remedy = "Set cluster.host to an address of this machine that the hosts can reach."
        return [Finding("cluster", False, message, remedy, blocks_tasks=False)]
    return [Finding("cluster", True, f"workers connect to {host}:{port}")]


def _list_hosts(section: SlurmSection) -> list[_SlurmHost]:
    selection = [f"--partition={section.partition}"] if section.partition else []
    output = _run(section, "sinfo", "--noheader", "--Node", "--exact", "--format=%N|%T|%c|%m|%P|%E", *selection)
    hosts = {}
    for line in filter(None, output.splitlines()):
        try:
            name, state, cpus, memory_mib, partition, reason = line.strip().split("|", 5)
            numbers = int(cpus), int(memory_mib) * _MIB
        except ValueError:
            raise EngineUnavailableError(
                f"sinfo printed output in an unknown format: {_printable(line[:100])}."
            ) from None
        if section.partition or partition.endswith("*"):
            reason = "" if reason == "none" else _printable(reason)
            hosts[name] = _SlurmHost(_printable(name), _printable(state), *numbers, reason)
    return list(hosts.values())


def _read_configuration(section: SlurmSection) -> dict[str, str]:
    output = _run(section, "scontrol", "show", "config")
    values = {found[1]: found[2].strip() for line in output.splitlines() if (found := _SETTING.match(line))}
    return {name: "none" if value == "(null)" else _printable(value) for name, value in values.items()}


def _run(section: SlurmSection, name: str, *arguments: str) -> str:
    """Run one of Slurm's commands; return its output. Raises EngineUnavailableError."""
    program = _find_command(section, name)
    environment = {"SLURM_CONF": section.configuration} if section.configuration else {}
    try:
        completed = subprocess.run(
            [program, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineUnavailableError(
            f"{name} has not responded within {_COMMAND_SECONDS:g} s; {_START_SLURM_ADVICE}"
        ) from None
    if completed.returncode != 0:
        reason = _printable(" ".join(completed.stderr.split())[-300:]) or f"exit code {completed.returncode}"
        raise EngineUnavailableError(f"{name} fails: {reason.removesuffix('.')}; {_START_SLURM_ADVICE}")
    return completed.stdout.strip()


_START_SLURM_ADVICE = "start slurmctld and slurmd, and check them with 'scontrol ping'."


def _find_command(section: SlurmSection, name: str) -> str:
    program = shutil.which(name, path=section.commands or SYSTEM_PATH)
    if program is None:
        where = section.commands or SYSTEM_PATH
        message = f"{name} is not in {where}; apt-get install slurm-wlm, or set cluster.slurm.commands."
        raise EngineUnavailableError(message)
    return program


def _describe_user(role: str) -> str:
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        name = str(os.geteuid())
    return f"the user {name} {role}"


def _printable(text: str) -> str:
    return replace_unprintable(text, replacement_character)


MANIFESTS = "packaging/kubernetes/sandbox.yaml"
"""The file with the objects that the engine needs."""

_NO_FINGERPRINT = "0" * 64
"""The checks create no Jobs, so they need no certificate."""


def check_kubernetes(settings: ServerSettings) -> list[Finding]:
    """Check what a server with these settings needs from Kubernetes.

    Raises EngineUnavailableError, ConfigurationError.
    """
    cluster = settings.cluster
    engine = create_kubernetes_engine(cluster.kubernetes, _NO_FINGERPRINT, os.environ)
    choose_proof_method(cluster, engine, _NO_FINGERPRINT)
    return [
        *asyncio.run(_check_api(engine, cluster)),
        _check_image(cluster.kubernetes.image or ""),
        _check_host(cluster),
    ]


async def _check_api(engine: KubernetesEngine, cluster: ClusterSection) -> Sequence[Finding]:
    namespace = cluster.kubernetes.namespace
    findings = [Finding("kubernetes", True, f"the API server responds: {await engine.version()}")]
    if permissions := await engine.missing_permissions():
        names = ", ".join(str(each) for each in permissions)
        message = f"the server may not {names}; permissions for jobs and pods are in the namespace {namespace}"
        return [*findings, Finding("kubernetes", False, message, f"kubectl apply -f {MANIFESTS}")]
    findings.append(Finding("kubernetes", True, "the server has all required permissions"))
    if missing := await engine.missing_objects():
        message = f"missing in Kubernetes: {', '.join(missing)}"
        return [*findings, Finding("kubernetes", False, message, f"kubectl apply -f {MANIFESTS}")]
    findings.append(Finding("kubernetes", True, f"the namespace {namespace} and the service account exist"))
    return [*findings, *_check_nodes(await engine.hosts())]


def _check_nodes(hosts: Sequence[EngineHost]) -> list[Finding]:
    usable = [host for host in hosts if not host.problem]
    problems = "; ".join(f"{host.name}: {host.problem}" for host in hosts if host.problem)
    remedy = "Check the nodes with: kubectl describe node NAME"
    if not usable:
        return [Finding("hosts", False, f"no node starts workers: {problems}", remedy)]
    names = ", ".join(host.name for host in usable)
    findings = [Finding("hosts", True, f"{len(usable)} of {len(hosts)} nodes start workers: {names}")]
    if problems:
        findings.append(Finding("hosts", False, f"these start no workers: {problems}", remedy, blocks_tasks=False))
    default = Vm()
    if not any(
        host.resources.cpus >= default.cpus and host.resources.memory_bytes >= default.memory_bytes for host in usable
    ):
        message = f"no node has {default.cpus} CPUs and the memory for a task without vm in its manifest"
        remedy = "Lower vm.cpus or vm.memory in manifests, or add larger nodes."
        findings.append(Finding("hosts", False, message, remedy, blocks_tasks=False))
    return findings


def _check_image(image: str) -> Finding:
    if "@sha256:" in image:
        return Finding("image", True, f"workers use {image}")
    message = f"{image} has no digest, so nodes may have different images"
    return Finding("image", False, message, "Set cluster.kubernetes.image to NAME@sha256:DIGEST.", blocks_tasks=False)


def _check_host(cluster: ClusterSection) -> Finding:
    if not is_loopback_or_unspecified(cluster.host):
        return Finding("cluster", True, f"workers connect to {cluster.host}:{cluster.port}")
    message = f"workers in Pods cannot connect to {cluster.host}:{cluster.port}"
    return Finding("cluster", False, message, "Set cluster.host to an address of this server that Pods can reach.")
