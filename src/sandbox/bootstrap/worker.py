"""Builds and runs a worker."""

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from socket import AF_UNIX, SOCK_SEQPACKET, gethostname, socketpair

from sandbox import __version__
from sandbox.agents import registered_agents
from sandbox.bootstrap.local_host import AgentsAndCommands, PlacementContext, create_worker_placement
from sandbox.bootstrap.log import configure_logging
from sandbox.bootstrap.private_directories import choose_run_dir, make_data_dir, make_private_directory
from sandbox.bootstrap.secret_sources import read_cluster_key
from sandbox.bootstrap.settings.schema import ServerSettings
from sandbox.disks.commands import remove_trees
from sandbox.images.image_builder import packages_digest
from sandbox.images.image_transfer import HostImageCopies
from sandbox.images.profiles import ProfileCatalog
from sandbox.interfaces.cluster_engine import (
    HOST_NAME_VARIABLE,
    IDENTITY_FILE_VARIABLE,
    IDENTITY_TOKEN_CHARACTERS_MAX,
    IDENTITY_TOKEN_PATTERN,
)
from sandbox.interfaces.runner import FRAME_BYTES_MAX, RenewLease
from sandbox.interfaces.task_file_layout import TaskLayout, runner_socket
from sandbox.interfaces.worker_messages import HOST_NAME_PATTERN, NO_JOIN_TOKEN, PROTOCOL_VERSION, Claim
from sandbox.journal.journals import FileJournals
from sandbox.journal.task_replicas import FileTaskReplicas
from sandbox.model.errors import SandboxError, error_reason
from sandbox.placements.runner_client import LocalRunnerClient
from sandbox.primitives.message_stream import StreamPair
from sandbox.worker.server_session import Lease
from sandbox.worker.task_image import TaskImage
from sandbox.worker.task_requests import OtherTaskLeftovers, RunnerCredentialRequests, WorkerTask
from sandbox.worker.worker import HostProofReaders, ServerAddress, Worker

TOKEN_VARIABLE = "SANDBOX_JOIN_TOKEN"
"""The environment variable that contains the join token (hex) of a worker."""

_log = logging.getLogger(__name__)

_NODE_NAME = re.compile(HOST_NAME_PATTERN)
_LOCK_SECONDS = 60.0
_LOCK_POLL_SECONDS = 0.1


class WorkerUnusableError(SandboxError):
    """This host cannot run the task, or the worker has no valid join token."""

    code = "worker_unusable"


SLURM_HOST_VARIABLE = "SLURMD_NODENAME"
"""The environment variable that contains the name that Slurm uses for the host. Only Slurm jobs have this variable."""


def host_name(environment: Mapping[str, str]) -> str:
    """Return the name that the engine uses for this host.

    It has no colon, because a colon separates the placement from the host in the journal.
    """
    name = environment.get(SLURM_HOST_VARIABLE) or environment.get(HOST_NAME_VARIABLE) or gethostname()
    return name.replace(":", "-")


def choose_data_dir(data_dir: Path, environment: Mapping[str, str]) -> Path:
    """Return the directory for the files of this host's workers.

    Slurm hosts may share the configured directory, so each host uses a subdirectory.
    Raises WorkerUnusableError.
    """
    if not (node := environment.get(SLURM_HOST_VARIABLE)):
        return data_dir
    if not _NODE_NAME.fullmatch(node):
        raise WorkerUnusableError(f"{SLURM_HOST_VARIABLE} does not contain a valid host name: {node!r}.")
    return data_dir / node


def run(settings: ServerSettings, attempt_id: str, address: ServerAddress) -> int:
    """Run the attempts of one task; return the exit code. Raises SandboxError, OSError."""
    os.umask(0o077)
    data_dir = make_data_dir(choose_data_dir(settings.server.data_dir.absolute(), os.environ))
    if SLURM_HOST_VARIABLE in os.environ:
        _redirect_output(data_dir / "worker.log")
    configure_logging(settings.log.format, settings.log.level)
    return asyncio.run(_run(settings, data_dir, attempt_id, address, take_join_token(os.environ)))


def take_join_token(environment: MutableMapping[str, str]) -> bytes:
    """Return the join token, and remove it from the environment; NO_JOIN_TOKEN if there is an identity token instead.

    Raises WorkerUnusableError.
    """
    if IDENTITY_FILE_VARIABLE in environment:
        return NO_JOIN_TOKEN
    try:
        token = bytes.fromhex(environment.pop(TOKEN_VARIABLE, ""))
    except ValueError:
        token = b""
    if len(token) != 32:
        message = f"{TOKEN_VARIABLE} contains no join token, and {IDENTITY_FILE_VARIABLE} is not set."
        raise WorkerUnusableError(f"{message} Only a cluster engine starts workers.")
    return token


def read_identity_token(path: Path) -> str:
    """Return this worker's identity token. The engine replaces the token from time to time.

    Raises OSError, WorkerUnusableError.
    """
    with path.open("rb") as file:
        token = file.read(IDENTITY_TOKEN_CHARACTERS_MAX + 1).strip().decode(errors="replace")
    if not re.fullmatch(IDENTITY_TOKEN_PATTERN, token) or len(token) > IDENTITY_TOKEN_CHARACTERS_MAX:
        raise WorkerUnusableError(f"{path} has no identity token.")
    return token


def _redirect_output(log: Path) -> None:
    """Redirect the output of this process to the end of a file. Raises OSError."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        for number in (1, 2):
            os.dup2(descriptor, number)
    finally:
        os.close(descriptor)


async def _run(settings: ServerSettings, data_dir: Path, attempt_id: str, address: ServerAddress, token: bytes) -> int:
    run_dir, replicas = choose_run_dir(data_dir), FileTaskReplicas(data_dir)
    context = PlacementContext(data_dir, run_dir, settings, AgentsAndCommands(registered_agents()), replicas)
    lease = Lease()
    own_end, runners_end = socketpair(AF_UNIX, SOCK_SEQPACKET)
    with _parent_death_pipe() as reading, own_end, runners_end, _shared_lock(data_dir):
        placement = await create_worker_placement(context, reading, runners_end.fileno())
        probed = await placement.host.probe()
        if probed.failure is not None:
            raise WorkerUnusableError(probed.failure)
        claim = _make_claim(attempt_id, token, placement.host.identity.boot_id, probed.runtime)
        journals, sockets = FileJournals(data_dir), RunnerSocketDirectory(run_dir, RunnerCredentialRequests(own_end))
        identity_file = os.environ.get(IDENTITY_FILE_VARIABLE)
        await asyncio.to_thread(remove_incomplete_images, data_dir)
        images = HostImageCopies(data_dir)

        def create_worker_task(task_id: str) -> WorkerTask:
            layout, image = TaskLayout(data_dir, task_id), TaskImage(images, probed.tier)
            return WorkerTask(layout, placement, image, journals, replicas, sockets, remove_trees)

        locks = make_private_directory(data_dir / "workers")
        other_leftovers = OtherTaskLeftovers(
            data_dir, placement.files, journals, lambda task_id: lock_task(locks / task_id, waits=False), remove_trees
        )
        worker = Worker(
            address,
            claim,
            lease,
            create_worker_task,
            other_leftovers,
            lambda task_id: lock_task(locks / task_id),
            HostProofReaders(
                lambda: read_cluster_key(settings.cluster.host_key_path),
                partial(read_identity_token, Path(identity_file)) if identity_file else None,
            ),
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.terminate)
        return await worker.run()


def remove_incomplete_images(data_dir: Path) -> None:
    """Remove the incomplete images of killed transfers. Does not affect running transfers. Blocks.

    Errors are only logged.
    """
    try:
        ProfileCatalog(data_dir).remove_stale_builds()
    except OSError as error:
        _log.warning("Incomplete images could not be removed; check %s: %s", data_dir / "profiles", error_reason(error))


def _make_claim(attempt_id: str, token: bytes, boot_id: str, runtime: str) -> Claim:
    host, digest = host_name(os.environ), packages_digest(Path("/"))
    nonce, size = os.urandom(32), _host_size()
    return Claim(attempt_id, token, nonce, host, boot_id, runtime, __version__, *size, PROTOCOL_VERSION, digest)


def _host_size() -> tuple[int, int]:
    """Return the number of CPUs and the memory of the whole host. The engine may let this job use less."""
    return os.cpu_count() or 0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class RunnerSocketDirectory:
    """Implements `worker.task_requests.RunnerSockets`."""

    def __init__(self, run_dir: Path, credential_requests: RunnerCredentialRequests) -> None:
        self._run_dir = run_dir
        self.credential_requests = credential_requests

    async def renew_lease(self, attempt_id: str, deadline: float) -> None:
        """Extend the lease of an attempt's runner. Raises SandboxError."""
        await LocalRunnerClient(runner_socket(self._run_dir, attempt_id)).renew_lease(RenewLease(deadline))

    async def connect(self, attempt_id: str) -> StreamPair:
        """Open a stream to the control socket of an attempt's runner. Raises OSError."""
        return await asyncio.open_unix_connection(runner_socket(self._run_dir, attempt_id), limit=FRAME_BYTES_MAX)


@contextlib.contextmanager
def _parent_death_pipe() -> Iterator[int]:
    """Yield the read end of a pipe. Its write end is closed when the context or this process ends."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)


@contextlib.contextmanager
def _shared_lock(data_dir: Path) -> Iterator[None]:
    """Lock the data directory so that other workers can use it, but no server."""
    descriptor = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkerUnusableError(f"A server uses {data_dir}; workers need another data directory.") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock_task(path: Path, *, waits: bool = True) -> Iterator[None]:
    """Hold the lock of a task on this host. waits: wait for a worker that is about to end. Raises OSError."""
    deadline = time.monotonic() + (_LOCK_SECONDS if waits else 0)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)
