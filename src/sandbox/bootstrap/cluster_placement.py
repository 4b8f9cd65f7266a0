"""The placement that runs tasks on the hosts of a cluster: its engine, its certificate and its workers' jobs."""

import asyncio
import datetime
import hashlib
import logging
import os
import ssl
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from sandbox.bootstrap.local_host import RUNNER_VARIABLES, PlacementContext, measure_capacity
from sandbox.bootstrap.log import FORMAT_VARIABLE, LEVEL_VARIABLE
from sandbox.bootstrap.private_directories import make_private_directory
from sandbox.bootstrap.secret_sources import read_cluster_key
from sandbox.bootstrap.settings.load import ConfigurationError
from sandbox.bootstrap.settings.schema import ClusterSection, KubernetesSection, SlurmSection
from sandbox.bootstrap.worker import TOKEN_VARIABLE, host_name
from sandbox.cluster_engines.kubernetes.api import ApiAddress
from sandbox.cluster_engines.kubernetes.engine import KubernetesEngine
from sandbox.cluster_engines.kubernetes.worker_job import DATA_DIR, WorkerPodSettings
from sandbox.cluster_engines.processes.engine import ProcessEngine
from sandbox.cluster_engines.slurm.commands import SlurmSettings
from sandbox.cluster_engines.slurm.engine import SlurmEngine
from sandbox.images.image_transfer import ServerImageSource
from sandbox.interfaces.cluster_engine import Engine, JobRequest, WorkerVerifier
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.interfaces.workspace import CredentialQuery, Credentials, NoCredentialsError
from sandbox.journal.journals import FileJournals, has_task_ended
from sandbox.model.errors import error_reason
from sandbox.model.resources import Resources
from sandbox.placements.cluster.jobs import JobSettings
from sandbox.placements.cluster.placement import (
    ClusterPlacement,
    ServerTaskStorage,
    WorkerListenerSettings,
    create_cluster_placement,
)
from sandbox.placements.cluster.worker_authorization import CREDENTIAL_LOOKUP_SECONDS, ClusterKey
from sandbox.primitives.files import create_private_file, replace_durably
from sandbox.workspace.clone.remote_access import find_credentials_for_worker
from sandbox.workspace.git_command import GitError

WORKER_OVERHEAD_BYTES = 256 * 1024**2
"""Memory for the worker, the runner and the runtime, in addition to the memory of the task."""

_log = logging.getLogger(__name__)

_GRACE_SECONDS = 30
_OWNER_LENGTH = 40
_VALID_DAYS = 36_500


def load_or_create_certificate(directory: Path) -> tuple[Path, str]:
    """Return the file that contains the server's certificate and key, and return the fingerprint (SHA-256, hex).

    Creates the certificate if there is none. Workers check the fingerprint, so a self-signed certificate suffices.
    The certificate does not expire within the lifetime of a server.
    """
    path = directory / "certificate.pem"
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sandbox")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
            .sign(key, hashes.SHA256())
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        part = path.with_suffix(".part")
        with create_private_file(part) as file:
            file.write(certificate.public_bytes(Encoding.PEM) + private)
        replace_durably(part, path)
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return path, hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


SLURM_VARIABLES = ("HOME", "LANG", "LOGNAME", "PATH", "USER")
"""Environment variables that workers on other hosts get. The user is the same on all hosts, but paths may differ."""

KUBERNETES_WORKER_COMMAND = ("/usr/bin/tini", "--", "/opt/sandbox/packaging/kubernetes/start-worker")
"""The command of a worker in the image that packaging/Containerfile describes."""


def worker_environment(context: PlacementContext, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker, without its join token. It contains no key and no secret."""
    log, server, cluster = context.settings.log, context.settings.server, context.settings.cluster
    names: Sequence[str]
    names, data_dir = RUNNER_VARIABLES, str(context.data_dir / "cluster" / "host")
    if cluster.engine == "slurm":
        names, data_dir = SLURM_VARIABLES, cluster.slurm.data_dir
    elif cluster.engine == "kubernetes":
        names, data_dir = (), DATA_DIR
    host_key = {} if cluster.host_key_file is None else {"SANDBOX_CLUSTER_HOST_KEY_FILE": cluster.host_key_file}
    return {name: environment[name] for name in names if name in environment} | {
        **host_key,
        FORMAT_VARIABLE: log.format,
        LEVEL_VARIABLE: log.level,
        "SANDBOX_CONFIG": os.devnull,
        "SANDBOX_DATA_DIR": data_dir,
        "SANDBOX_RUNTIME": server.runtime,
    }


def worker_command(section: ClusterSection) -> tuple[str, ...]:
    """Return the command that starts a worker, without its arguments."""
    if section.engine == "kubernetes":
        return KUBERNETES_WORKER_COMMAND
    if section.engine == "slurm" and section.slurm.sandbox is not None:
        return (section.slurm.sandbox, "worker")
    return (sys.executable, "-I", "-m", "sandbox", "worker")


def create_engine(context: PlacementContext, directory: Path, certificate_fingerprint: str) -> Engine:
    """Create the engine that the settings name. Raises ConfigurationError.

    directory: where an engine may store files. certificate_fingerprint: SHA-256 (hex) of the server's certificate.
    """
    if context.settings.cluster.engine == "kubernetes":
        return create_kubernetes_engine(context.settings.cluster.kubernetes, certificate_fingerprint, os.environ)
    if context.settings.cluster.engine == "slurm":
        return SlurmEngine(slurm_settings(context.settings.cluster.slurm))
    capacity = measure_capacity(context.data_dir, context.settings.capacity)
    return ProcessEngine(directory / "processes", host_name({}), capacity)


def slurm_settings(section: SlurmSection) -> SlurmSettings:
    """Return the settings of the `slurm` engine."""
    return SlurmSettings(section.partition, section.account, section.options, section.commands, section.configuration)


def create_kubernetes_engine(
    section: KubernetesSection, certificate_fingerprint: str, environment: Mapping[str, str]
) -> KubernetesEngine:
    """Create the `kubernetes` engine. Raises ConfigurationError.

    certificate_fingerprint: identifies the server among those that use the namespace. No other server accepts its
        workers' tokens.
    """
    if section.image is None:
        raise ConfigurationError("cluster.kubernetes.image is not set: it names the image of the workers.")
    server = section.server
    if server is None:
        host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            message = "cluster.kubernetes.server is not set, and this server does not run in a Pod."
            raise ConfigurationError(f"{message} Set it to the URL of the API server ('kubectl cluster-info').")
        server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    labels = dict(label.split("=", 1) for label in section.node_selector)
    owner, audience = certificate_fingerprint[:_OWNER_LENGTH], f"sandbox-{certificate_fingerprint}"
    pods = WorkerPodSettings(section.image, section.service_account, labels, section.tolerations, owner, audience)
    return KubernetesEngine(
        ApiAddress(server, Path(section.token_file), Path(section.ca_file)), section.namespace, pods
    )


def choose_proof_method(
    section: ClusterSection, engine: Engine, certificate_fingerprint: str
) -> ClusterKey | WorkerVerifier | None:
    """Return how workers prove their claims; see `ClaimChecker`. Raises ClusterKeyError, ConfigurationError.

    certificate_fingerprint: SHA-256 (hex) of the server's certificate.
    """
    if not isinstance(engine, KubernetesEngine):
        return load_cluster_key(section, certificate_fingerprint)
    if section.host_key_path is not None:
        message = "with the engine kubernetes, the API server verifies the host of each worker."
        raise ConfigurationError(f"Remove cluster.host_key_file: {message}")
    return engine


def load_cluster_key(section: ClusterSection, certificate_fingerprint: str) -> ClusterKey | None:
    """Return the cluster's host key; None if there is none, with a warning if the engine is slurm.

    Raises ClusterKeyError.

    certificate_fingerprint: SHA-256 (hex) of the server's certificate.
    """
    if section.host_key_path is not None:
        return ClusterKey(read_cluster_key(section.host_key_path), certificate_fingerprint)
    if section.engine == "slurm":
        _log.warning(
            "Workers do not prove that they run on a host of the cluster: cluster.host_key_file is not set. "
            "Any process that can read a job's join token can get the job's task."
        )
    return None


def store_runner_log(data_dir: Path, task_id: str, attempt_id: str, data: bytes) -> None:
    """Store the log of a runner at the path at which a local runner's log would be. Raises OSError."""
    layout = TaskLayout(data_dir, task_id)
    if not layout.root.is_dir():  # the task was removed in the meantime
        return
    path = layout.attempt(attempt_id).runner_log
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with create_private_file(path) as file:
        file.write(data)


def find_clone_credentials(url: str, query: CredentialQuery) -> Credentials:
    """Find credentials with the git configuration of the server's user. Implements `FindCloneCredentials`."""
    try:
        found = find_credentials_for_worker(url, query, os.environ)
        return asyncio.run(asyncio.wait_for(found, CREDENTIAL_LOOKUP_SECONDS))
    except (GitError, OSError, ValueError) as error:
        # The text of a ValueError can contain a URL with a password. `reason` has no details: it is sent to the host.
        detail = "a URL is not valid" if isinstance(error, ValueError) else error_reason(error)
        _log.error("The git configuration of the server's user cannot be used: %s", detail)
        reason = "The server cannot use its git configuration; its log has the reason."
        raise NoCredentialsError(reason, is_transient=isinstance(error, OSError)) from error


async def create_placement(context: PlacementContext) -> ClusterPlacement:
    """Create the placement that runs tasks on workers. Implements `CreatePlacement`."""
    section, data_dir = context.settings.cluster, context.data_dir
    directory = make_private_directory(data_dir / "cluster")
    certificate, certificate_fingerprint = load_or_create_certificate(directory)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.load_cert_chain(certificate)
    environment = worker_environment(context, os.environ)
    if section.engine == "processes":
        make_private_directory(directory / "host")

    engine = create_engine(context, directory, certificate_fingerprint)
    proof_method = choose_proof_method(section, engine, certificate_fingerprint)
    has_join_tokens = not isinstance(engine, KubernetesEngine)

    def create_job_request(name: str, attempt_id: str, token: bytes, resources: Resources) -> JobRequest:
        address = f"{section.host}:{section.port}"
        return JobRequest(
            name,
            (*worker_command(section), attempt_id, "--server", address, "--fingerprint", certificate_fingerprint),
            {**environment, **({TOKEN_VARIABLE: token.hex()} if has_join_tokens else {})},
            resources,
            section.time_limit_seconds,
            _GRACE_SECONDS,
            # Slurm does not run a job if it cannot open the job's output file, so the worker opens its log itself.
            # Kubernetes keeps the output of a Pod.
            str(directory / "host" / "worker.log") if section.engine == "processes" else os.devnull,
        )

    return await create_cluster_placement(
        directory / "jobs",
        engine,
        JobSettings(section.lease_seconds, WORKER_OVERHEAD_BYTES, create_job_request, has_join_tokens),
        WorkerListenerSettings(section.listen_host or section.host, section.port, tls, proof_method),
        ServerTaskStorage(
            context.replicas, partial(store_runner_log, data_dir), partial(has_task_ended, FileJournals(data_dir))
        ),
        ServerImageSource(data_dir),
        find_clone_credentials,
    )
