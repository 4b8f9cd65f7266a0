"""A server for workers in the test's own process, with an engine that the test controls."""

import asyncio
import contextlib
import os
import socket
import ssl
from datetime import UTC, datetime
from functools import partial

import msgspec

from doubles.manifests import manifest
from sandbox import __version__
from sandbox.bootstrap.cluster_placement import load_or_create_certificate, store_runner_log
from sandbox.images.image_transfer import ServerImageSource
from sandbox.interfaces.cluster_engine import EngineHost, JobPhase, JobRequest, JobStatus
from sandbox.interfaces.worker_messages import PROTOCOL_VERSION, Claim, ServerMessage
from sandbox.interfaces.workspace import NoCredentialsError
from sandbox.journal.journals import FileJournals, has_task_ended
from sandbox.journal.task_replicas import FileTaskReplicas
from sandbox.model.events import AttemptStarted, TaskSubmitted
from sandbox.model.resources import Resources
from sandbox.placements.cluster.host_drains import HostDrains
from sandbox.placements.cluster.hosts import ClusterHosts, EngineHosts, SeenHosts
from sandbox.placements.cluster.job_state import JobStore
from sandbox.placements.cluster.jobs import Jobs, JobSettings
from sandbox.placements.cluster.worker_authorization import ClaimChecker, ClusterKey
from sandbox.placements.cluster.worker_server import WorkerRequestSources, WorkerServer
from sandbox.primitives.message_stream import encode_message, read_message

SMALL = Resources(1, 2**28, 2**28)
TIMEOUT_SECONDS, OVERHEAD_BYTES = 20, 2**20
HOST, BOOT_ID = "host-1", "boot-1"
NOW = datetime(2026, 1, 29, 10, tzinfo=UTC)
_decoder = msgspec.msgpack.Decoder(ServerMessage)


async def wait_until(condition, description="the condition"):
    """Poll until the condition returns a true value; return that value."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not (value := condition()):
            await asyncio.sleep(0.01)
    assert value, description
    return value


class FakeEngine:
    """Stores jobs. The test sets their phases."""

    def __init__(self):
        self.submitted, self.cancelled, self.statuses = [], [], {}
        self.error, self.host_list = None, [EngineHost(HOST, SMALL)]

    async def submit(self, request):
        if self.error is not None:
            raise self.error
        self.submitted.append(request)
        host = next((each.name for each in self.host_list if each.name not in request.excluded_hosts), HOST)
        self.statuses.setdefault(request.name, JobStatus(JobPhase.RUNNING, host))

    async def maximal_host_sizes(self):
        return [SMALL, Resources(8, 2**33, 2**40), Resources(64, 2**32, 2**40)]

    async def hosts(self):
        if self.error is not None:
            raise self.error
        return self.host_list

    async def cancel(self, name):
        self.cancelled.append(name)

    async def reconcile_jobs(self, names):
        return {name: self.statuses.get(name, JobStatus(JobPhase.UNKNOWN)) for name in names}

    def set_phase(self, job, phase):
        self.statuses[job.name] = JobStatus(phase, HOST, f"It is {phase}.")


class ClusterServer:
    """The jobs of one server, and its connections. `restart` replaces the server, as after a crash.

    cluster_key: the key with which workers have to prove their host; None if no proof is required.
    verifier: checks the identity tokens that workers have instead of join tokens, or None.
    credentials: the git credentials of every host, or an error. credential_lookups: the lookups.
    find_credentials_now: called by each lookup; may block.
    """

    def __init__(self, directory, engine=None, lease_seconds=600.0):
        self.data_dir, self.engine, self.lease_seconds = directory / "data", engine or FakeEngine(), lease_seconds
        self.store, self.cluster_key, self.verifier = directory / "jobs", None, None
        self.journals, self.replicas = FileJournals(self.data_dir), FileTaskReplicas(self.data_dir)
        self.certificate, self.certificate_fingerprint = load_or_create_certificate(directory)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.images = ServerImageSource(self.data_dir)
        self.tasks = set()
        self.credentials, self.credential_lookups = NoCredentialsError("The server has no credentials."), []
        self.find_credentials_now = lambda: None

    async def start(self):
        before = asyncio.all_tasks()
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.certificate)
        self.drains = HostDrains(self.store.with_name("drained.json"))
        settings = JobSettings(self.lease_seconds, OVERHEAD_BYTES, create_job_request, self.verifier is None)
        proof_method = self.verifier or (
            self.cluster_key and ClusterKey(self.cluster_key, self.certificate_fingerprint)
        )
        self.jobs = Jobs(JobStore(self.store), self.engine, settings, self.drains)
        self.hosts, self.engine_hosts = SeenHosts(self.store.with_name("hosts.json")), EngineHosts(self.engine)
        self.cluster_hosts = ClusterHosts(self.hosts, self.engine_hosts, self.drains, self.jobs)
        await WorkerServer(
            ClaimChecker(self.jobs, self.drains, proof_method),
            self.hosts,
            self.replicas,
            partial(store_runner_log, self.data_dir),
            self.has_task_ended,
            WorkerRequestSources(self.find_credentials, self.images),
            tls,
        ).listen("127.0.0.1", self.port)
        self.jobs.start()
        self.hosts.start()
        self.tasks = asyncio.all_tasks() - before

    async def stop(self):
        """Close everything, as if the server's process had ended."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def restart(self):
        await self.stop()
        await self.start()

    def find_credentials(self, url, query):
        self.credential_lookups.append((url, query))
        self.find_credentials_now()
        if isinstance(self.credentials, Exception):
            raise self.credentials
        return self.credentials

    def has_task_ended(self, task_id):
        return has_task_ended(self.journals, task_id)

    async def submit(self, task_id="task-1"):
        """Record a task with an attempt, and submit its job; return the job."""
        job = self.jobs.reserve(task_id, None, SMALL)
        self.record_attempt(job)
        await wait_until(lambda: self.tokens(job), "the submission")
        return job

    def record_attempt(self, job):
        """Record a task with an attempt on the job's worker."""
        task_id = job.stored.task_id
        writer = self.journals.create(task_id)
        recorder = self.journals.recorder(writer, None, lambda: NOW)
        recorder.record(TaskSubmitted(task_id, manifest(task_id)))
        recorder.record(AttemptStarted(job.stored.attempt_id, "bubblewrap", f"cluster:{HOST}", BOOT_ID))
        writer.close()

    def tokens(self, job):
        """Return the join tokens with which a job was submitted."""
        requests = [request for request in self.engine.submitted if request.name == job.name]
        return [bytes.fromhex(request.environment["TOKEN"]) for request in requests]

    def claim(self, job, token=None, nonce=None, **changes):
        fields = {"host": HOST, "boot_id": BOOT_ID, "runtime": "bubblewrap"}
        fields |= {"version": __version__, "protocol": PROTOCOL_VERSION}
        token = token or self.tokens(job)[-1]
        return Claim(job.stored.attempt_id, token, nonce or os.urandom(32), **(fields | changes))

    @contextlib.asynccontextmanager
    async def connect(self, *messages, uses_tls=True):
        """Connect like a worker, and send these messages."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        client = WorkerConnection(
            *await asyncio.open_connection("127.0.0.1", self.port, ssl=context if uses_tls else None)
        )
        try:
            for message in messages:
                await client.send(message)
            yield client
        finally:
            client.writer.transport.abort()


class WorkerConnection:
    """The worker's end of a connection."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    async def send(self, message):
        data = message if isinstance(message, bytes) else encode_message(message)
        with contextlib.suppress(OSError):
            self.writer.write(data)
            await self.writer.drain()

    async def read(self):
        """Return the next message; None at the end of the connection."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            try:
                return await read_message(self.reader, _decoder, 2**28)
            except OSError:
                return None


def create_job_request(name, attempt_id, token, resources):
    return JobRequest(name, ("/bin/worker", attempt_id), {"TOKEN": token.hex()}, resources, 3600)
