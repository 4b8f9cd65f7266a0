"""Servers for the contract tests of `Placement`. Each uses one placement.

Runners are real. They run on this machine, on a host with a daemon, or on the workers of a cluster.

Run as a program, the module launches an attempt and waits to be killed. Its arguments are the kind of host, the
directory, the repository URL and the task id.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from doubles import daemon_placement
from doubles.daemon_placement import DaemonClient, DaemonPlacement
from doubles.deployment import Process, preinstall_agent
from doubles.manifests import manifest
from doubles.runner_processes import find_runners
from sandbox.agents import registered_agents
from sandbox.bootstrap.clock import SystemClock
from sandbox.bootstrap.cluster_placement import create_placement as create_cluster_placement
from sandbox.bootstrap.local_host import AgentsAndCommands, PlacementContext, create_local_placement
from sandbox.bootstrap.private_directories import choose_run_dir
from sandbox.bootstrap.settings.load import load
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.placement import AttemptLocation, HostPendingError
from sandbox.interfaces.runner import FinishAttempt, RunAttempt
from sandbox.interfaces.task_file_layout import TaskLayout, new_attempt_id
from sandbox.journal.journals import FileJournals
from sandbox.journal.task_replicas import FileTaskReplicas
from sandbox.model.events import TaskSubmitted
from sandbox.model.resources import Resources

RUNTIME = "bubblewrap"
TIMEOUT_SECONDS = 40
PACKAGE = Path(daemon_placement.__file__).parent


class SingleHostPlacementHarness:
    """A placement with one host."""

    def reserve(self, placement, task_id):
        return new_attempt_id(), placement.host.identity

    def kill_remaining_processes(self, task_id):
        for pid in find_runners(self.host_data_dir, task_id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class LocalPlacementHarness(SingleHostPlacementHarness):
    """A host that also runs the servers."""

    kind = "local"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data_dir = self.host_data_dir = directory / "data"
        if not self.data_dir.exists():
            preinstall_agent(self.data_dir)

    async def create_placement(self):
        settings = load({"data_dir": str(self.data_dir)}, {"SANDBOX_RUNTIME": RUNTIME}).settings
        context = PlacementContext(
            self.data_dir,
            choose_run_dir(self.data_dir),
            settings,
            AgentsAndCommands(registered_agents()),
            FileTaskReplicas(self.data_dir),
        )
        placement = await create_local_placement(context)
        await placement.host.probe()
        return placement

    def start(self):
        pass

    def close(self):
        shutil.rmtree(choose_run_dir(self.data_dir), ignore_errors=True)


class DaemonPlacementHarness(SingleHostPlacementHarness):
    """A host that has its own data directory, and that servers reach through the socket of a daemon."""

    kind = "daemon"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data_dir, self.host_data_dir = directory / "data", directory / "host"
        self.data_dir.mkdir(exist_ok=True)
        self.socket = directory / "daemon.sock"
        self.daemon = None

    def start(self):
        if not self.host_data_dir.exists():
            preinstall_agent(self.host_data_dir)
        settings = json.dumps({"data_dir": str(self.host_data_dir)})
        command = [sys.executable, str(PACKAGE / "daemon.py"), settings, str(self.socket)]
        environment = {**os.environ, "SANDBOX_RUNTIME": RUNTIME}

        def start(**streams):
            return subprocess.Popen(command, env=environment, **streams)

        self.daemon = Process(start, log=self.directory / "daemon.log")

    def pause(self):
        """Make the host unresponsive, like a host behind a broken network: connections get no response."""
        self.daemon.send_signal(signal.SIGSTOP)

    def resume(self):
        self.daemon.send_signal(signal.SIGCONT)

    def kill(self):
        """Kill the daemon; its runners continue."""
        self.daemon.stop(signal.SIGKILL)
        self.socket.unlink(missing_ok=True)

    async def create_placement(self):
        return await asyncio.to_thread(
            DaemonPlacement, DaemonClient(self.socket), self.data_dir, FileTaskReplicas(self.data_dir)
        )

    def close(self):
        if self.daemon is not None:
            self.daemon.stop(signal.SIGKILL)
        shutil.rmtree(choose_run_dir(self.host_data_dir), ignore_errors=True)


class ClusterPlacementHarness:
    """This machine as a host of a cluster: the `processes` engine starts one worker for each task."""

    kind = "cluster"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data_dir = directory / "data"
        self.host_data_dir = self.data_dir / "cluster" / "host"

    def start(self):
        if self.data_dir.exists():
            return
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for data_dir in (self.data_dir, self.host_data_dir):
            preinstall_agent(data_dir)
        (self.directory / "port").write_text(str(port))
        self.host_data_dir.parent.chmod(0o700)

    async def create_placement(self):
        port = (self.directory / "port").read_text()
        variables = {"SANDBOX_RUNTIME": RUNTIME, "SANDBOX_CLUSTER_ENGINE": "processes", "SANDBOX_CLUSTER_PORT": port}
        settings = load({"data_dir": str(self.data_dir)}, variables).settings
        agents, replicas = AgentsAndCommands(registered_agents()), FileTaskReplicas(self.data_dir)
        context = PlacementContext(self.data_dir, choose_run_dir(self.data_dir), settings, agents, replicas)
        return await create_cluster_placement(context)

    def reserve(self, placement, task_id):
        """Wait until the task has a worker; return the attempt's id and the worker's host."""
        workers, resources = placement.allocator._workers, Resources(1, 2**28, 2**28)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            try:
                reserved = workers.thread.run_blocking(placement.allocator._reserve(task_id, None, resources, "basic"))
            except HostPendingError:
                assert time.monotonic() < deadline, (self.host_data_dir / "worker.log").read_text()
            else:
                return reserved.attempt_id, reserved.identity

    def worker_pids(self):
        """Return the workers of all jobs, which are the children of the jobs' supervisors."""
        found = []
        for job in self._jobs():
            with contextlib.suppress(OSError):
                pid = json.loads((job / "started.json").read_bytes())["pid"]
                if not (job / "ended.json").exists():
                    found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found

    def pause(self):
        """Pause the workers, so that they do not respond."""
        self._signal(signal.SIGSTOP)

    def resume(self):
        self._signal(signal.SIGCONT)

    def _signal(self, number):
        for pid in self.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _jobs(self):
        return (self.data_dir / "cluster" / "processes").glob("sandbox-*")

    def kill_remaining_processes(self, task_id):
        """Kill the worker of a task together with its runners."""
        for path in (self.data_dir / "cluster" / "jobs").glob("*.json"):
            with contextlib.suppress(OSError):
                if json.loads(path.read_bytes())["task_id"] == task_id:
                    self._kill_supervisor(self.data_dir / "cluster" / "processes" / f"sandbox-{path.stem}")

    def _kill_supervisor(self, job):
        with contextlib.suppress(OSError):
            if not (job / "ended.json").exists():
                os.kill(json.loads((job / "started.json").read_bytes())["pid"], signal.SIGKILL)

    def close(self):
        for job in self._jobs():
            self._kill_supervisor(job)
        for data_dir in (self.data_dir, self.host_data_dir):
            shutil.rmtree(choose_run_dir(data_dir), ignore_errors=True)


class ServerHarness:
    """Uses a placement as a server does: submits tasks, launches runners, and reads their records."""

    def __init__(self, host, placement, repository_url):
        self.host, self.placement, self.repository_url = host, placement, repository_url
        self.journals = FileJournals(host.data_dir)

    def submit(self, task_id, *, flushes=True):
        """Record a task and its first attempt; return the recorder and the attempt's location."""
        writer = self.journals.create(task_id)
        if not flushes:
            writer.append = partial(append_unflushed, writer.append)
        recorder = self.journals.recorder(writer, None, SystemClock().now)
        repository = {"url": self.repository_url}
        recorder.record(TaskSubmitted(task_id, manifest(task_id, repository=repository)))
        attempt_id, identity = self.host.reserve(self.placement, task_id)
        recorder.record(identity.attempt_started_event(attempt_id, RUNTIME, number=1, resumes=False))
        return recorder, AttemptLocation(task_id, attempt_id, identity.name)

    def order(self, location, **fields):
        return RunAttempt(location.task_id, location.attempt_id, **fields)

    async def launch_recorded(self, recorder, location, **fields):
        """Launch an attempt that is already recorded; return its handle."""
        try:
            return await self.placement.launch(self.order(location, **fields), recorder.writer)
        finally:
            recorder.writer.close()

    async def launch(self, task_id, **fields):
        """Submit a task and launch its attempt; return the location and the handle."""
        recorder, location = self.submit(task_id)
        return location, await self.launch_recorded(recorder, location, **fields)

    async def relaunch(self, location):
        """Launch the same attempt again; return its handle."""
        return await self._launch_with_new_writer(self.order(location))

    async def finish(self, location):
        """Launch a finisher; return its handle."""
        return await self._launch_with_new_writer(FinishAttempt(location.task_id, location.attempt_id))

    async def _launch_with_new_writer(self, order):
        writer = self.journals.open(order.task_id)
        try:
            return await self.placement.launch(order, writer)
        finally:
            writer.close()

    def location(self, task_id):
        attempt = self.task(task_id).attempt
        return AttemptLocation(task_id, attempt.id, attempt.host)

    def events(self, task_id):
        """Return the events in the server's data directory."""
        return [record.event for record in self.journals.read(task_id).records]

    def events_on_host(self, task_id):
        """Return the events in the data directory of the attempt's host."""
        return [record.event for record in FileJournals(self.host.host_data_dir).read(task_id).records]

    def task(self, task_id):
        return self.journals.replay(task_id).task

    def runner_pid(self, task_id):
        return next(iter(find_runners(self.host.host_data_dir, task_id)), None)

    def log(self, location):
        path = TaskLayout(self.host.host_data_dir, location.task_id).attempt(location.attempt_id).runner_log
        return path.read_text() if path.exists() else ""


def append_unflushed(append, event, transition=None, *, at, durable=False):
    """Append a record without flushing it to disk, even if the recorder requests a flush."""
    return append(event, transition, at=at, durable=False)


@contextlib.asynccontextmanager
async def serving(host, repository_url):
    """Yield a new server, which copies the records of other hosts until the block ends."""
    placement = await host.create_placement()
    copying = asyncio.create_task(placement.run())
    try:
        yield ServerHarness(host, placement, repository_url)
    finally:
        copying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await copying


async def wait_until(condition, description, seconds=TIMEOUT_SECONDS):
    """Poll until the condition returns a true value; return that value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {description}"
        await asyncio.sleep(0.01)
    return value


async def wait_for_lock_state(handle, expected):
    await wait_until(lambda: handle.lock_state() is expected, f"{expected} of {handle.attempt_id}")


@contextlib.contextmanager
def unresponsive_repository():
    """Yield the URL of a git host that accepts connections and never responds, so that a runner's clone never ends."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/repository.git"


HOSTS = {host.kind: host for host in (LocalPlacementHarness, DaemonPlacementHarness, ClusterPlacementHarness)}


async def _launch_and_wait(kind, directory, repository_url, task_id):
    async with serving(HOSTS[kind](Path(directory)), repository_url) as server:
        location, handle = await server.launch(task_id)
        await wait_for_lock_state(handle, LockState.HELD)
        print(json.dumps(location), flush=True)
        await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(_launch_and_wait(*sys.argv[1:]))
