"""The engines under test, and the jobs that tests submit to them."""

import asyncio
import contextlib
import inspect
import json
import os
import signal
import sys
import time
from pathlib import Path

from doubles import engine_worker, slurm_cluster
from doubles.kubernetes.api_server import NAMESPACE, KubernetesApi
from sandbox.cluster_engines.kubernetes.api import ApiAddress
from sandbox.cluster_engines.kubernetes.engine import KubernetesEngine
from sandbox.cluster_engines.kubernetes.worker_job import WorkerPodSettings
from sandbox.cluster_engines.processes.engine import ProcessEngine
from sandbox.cluster_engines.slurm.commands import SlurmSettings
from sandbox.cluster_engines.slurm.engine import SlurmEngine
from sandbox.interfaces.cluster_engine import JobPhase, JobRequest, job_name
from sandbox.interfaces.task_file_layout import new_attempt_id
from sandbox.model.resources import Resources

TIMEOUT_SECONDS = 60.0
MIB = 1024**2
GIB = 1024**3
SMALL = Resources(1, 100 * MIB, GIB)


class ProcessHarness:
    """Runs jobs as processes of this machine. whole_host: the resources of a job that uses the whole host."""

    kill_seconds = 1.0
    whole_host = Resources(4, 1000 * MIB, 10 * GIB)

    def __init__(self, directory):
        self.directory = directory / "jobs"

    def create_engine(self):
        """Return a new engine, like the one that a restarted server creates."""
        return ProcessEngine(self.directory, "this-host", self.whole_host)

    def close(self):
        """Kill the processes of all jobs."""
        for path in self.directory.glob("*/started.json"):
            if not (path.parent / "ended.json").exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(json.loads(path.read_bytes())["pid"], signal.SIGKILL)


class KubernetesHarness:
    """Runs jobs on the double of Kubernetes, which has one node."""

    kill_seconds = 1.0
    whole_host = Resources(4, 1000 * MIB, 10 * GIB)

    def __init__(self, directory):
        self.api = KubernetesApi(directory / "kubernetes")
        self.cluster = self.api.cluster
        self.cluster.add_node("n1")

    def create_engine(self, owner="server-1", **changes):
        """Return a new engine, like the one that a restarted server creates."""
        fields = {
            "image": "sandbox@sha256:abc",
            "service_account": "sandbox-worker",
            "node_selector": {"kubernetes.io/os": "linux"},
            "tolerations": (),
            "owner": owner,
            "audience": f"audience-of-{owner}",
        }
        address = ApiAddress(self.api.url, self.api.token_file, self.api.ca_file)
        return KubernetesEngine(address, NAMESPACE, WorkerPodSettings(**(fields | changes)))

    def close(self):
        """Kill the processes of all jobs, and check the requests."""
        self.api.close()


class SlurmHarness:
    """Runs jobs on a Slurm cluster, in a partition with one host."""

    kill_seconds = slurm_cluster.KILL_WAIT_SECONDS
    whole_host = Resources(slurm_cluster.CPUS, 1000 * MIB, 10 * GIB)

    def __init__(self, cluster):
        self.cluster = cluster

    def create_engine(self, partition="small", extra_options=()):
        """Return a new engine, like the one that a restarted server creates."""
        return SlurmEngine(
            SlurmSettings(
                partition=partition,
                extra_options=extra_options,
                commands_dir=str(self.cluster.commands),
                configuration_path=str(self.cluster.configuration),
            )
        )

    def close(self):
        """Cancel all jobs, and wait until they have ended."""
        self.cluster.run("scancel", "--me")
        self.cluster.wait_until_idle()


class Job:
    """A job, and what its workers recorded."""

    def __init__(self, directory, *action, **fields):
        self.directory = Path(directory)
        self.directory.mkdir()
        self.name = job_name(new_attempt_id())
        self.activity = engine_worker.ActivityLog(self.directory)
        command = (sys.executable, "-I", "-S", engine_worker.__file__, str(self.directory), *action)
        defaults = {"environment": {}, "resources": SMALL, "time_limit_seconds": 600, "grace_seconds": 1}
        self.request = JobRequest(self.name, command, **(defaults | fields))

    def starts(self):
        """Return the ids of the workers that were started."""
        return [event["worker"] for event in self.activity.read("start")]

    async def wait_for_heartbeat(self):
        """Wait until the worker is running."""
        await wait_until(lambda: self.activity.read("heartbeat"))

    def count_heartbeats(self):
        """Return how many heartbeats the job's workers have recorded so far."""
        return len(self.activity.read("heartbeat"))

    async def is_alive(self):
        """Return whether a worker is running. Wait long enough to detect a worker that is slow on a busy machine."""
        before = self.count_heartbeats()
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline:
            if self.count_heartbeats() > before:
                return True
            await asyncio.sleep(engine_worker.HEARTBEAT_SECONDS)
        return False


async def wait_until(condition, seconds=TIMEOUT_SECONDS):
    """Poll until the condition holds, and return its value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, "the condition was not met in time"
        await asyncio.sleep(0.05)


async def status_of(engine, job):
    return (await engine.reconcile_jobs([job.name]))[job.name]


async def wait_for_phase(engine, job, *phases, seconds=TIMEOUT_SECONDS):
    """Wait until the job is in one of the phases; return its status."""

    deadline = time.monotonic() + seconds
    while (status := await status_of(engine, job)).phase not in phases:
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.05)
    return status


async def wait_for_end(engine, job):
    return await wait_for_phase(engine, job, JobPhase.ENDED)
