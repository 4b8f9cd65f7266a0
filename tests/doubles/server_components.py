"""A server's components with one data directory, and runners controlled by the test."""

import asyncio
import os
from contextlib import asynccontextmanager
from datetime import timedelta

from doubles.manifests import manifest
from sandbox.agents.claude_code.output_parser import convert_recorded_line
from sandbox.bootstrap.clock import SystemClock
from sandbox.disks.removal import remove_trees
from sandbox.disks.space import ReserveFile
from sandbox.interfaces.images import ImageUnusableError
from sandbox.interfaces.journal import Recorder, replay_task
from sandbox.interfaces.placement import LaunchOrder, Reply, RunnerUnreachableError
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.interfaces.tasks import Retention
from sandbox.journal.journals import FileJournals
from sandbox.model.disk_space import DiskSpace, Watermark
from sandbox.model.events import (
    AgentExited,
    AgentStarted,
    CancelRequested,
    SandboxCreated,
    TaskFinished,
    WorkspacePrepared,
)
from sandbox.model.task_state import TaskState
from sandbox.server.drain import Drain
from sandbox.server.maintenance.disk_monitor import DiskMonitor
from sandbox.server.maintenance.pruning import Pruner, PruningDependencies
from sandbox.server.preserved_sandboxes import DebugSessions, PreservedSandboxes
from sandbox.server.recovery import recover
from sandbox.server.runner_launcher import Host, RunnerLauncher
from sandbox.server.runtime_prober import ProbeResult, RuntimeProber
from sandbox.server.scheduler import Resources, Scheduler
from sandbox.server.submissions import SubmissionLog
from sandbox.server.task_service import ServerParts, TaskServer
from sandbox.system.files import fsync_path

GIB = 1024**3
TO_RUNNING = (WorkspacePrepared("c" * 40), SandboxCreated("vm", "bubblewrap", "host"), AgentStarted("s"))
AMPLE_RESOURCES = Resources(100, 1000 * GIB, 1000 * GIB)
TO_END = (AgentExited(0, {"is_error": False}), TaskFinished())


class FakeRunners:
    """Placement and runner control; the test acts as the runner."""

    def __init__(self, journals, clock):
        self.journals, self.clock = journals, clock
        self.orders = []
        self.recorders = {}
        self.launch_error, self.failure_count = None, 0

    async def launch(self, order, lock_fd):
        if self.launch_error is not None:
            self.failure_count += 1
            raise self.launch_error
        self.orders.append(order)
        writer = self.journals.adopt(order.task_id, os.dup(lock_fd))
        self.recorders[order.task_id] = Recorder(writer, replay_task(self.journals, order.task_id).task, self.clock.now)

    async def is_responsive(self, attempt_id):
        return True

    async def cancel(self, attempt_id, order):
        for launched in self.orders:
            if launched.attempt_id == attempt_id and launched.task_id in self.recorders:
                try:
                    self.recorders[launched.task_id].record(CancelRequested(order.reason, order.force))
                except OSError as error:
                    return Reply(done=False, message=str(error), was_disk_write_rejected=True)
                return Reply(done=True)
        raise RunnerUnreachableError("gone")

    async def open_terminal(self, attempt_id, order):
        raise RunnerUnreachableError("gone")

    def record(self, task_id, *events):
        for event in events:
            self.recorders[task_id].record(event)
        if self.recorders[task_id].task.state.is_final:
            self.kill(task_id)

    def kill(self, task_id):
        self.recorders.pop(task_id).writer.close()


class AdjustableClock(SystemClock):
    """A wall clock that can be set back."""

    set_back_by = timedelta()

    def now(self):
        return super().now() - self.set_back_by


class RunningServer:
    """The methods of all services of one server, and the parts that it was composed of."""

    def __init__(self, server, parts):
        self.parts = parts
        self.services = server.services
        self.tracked_tasks = server.tracker.tracked_tasks
        self.track = server.tracker.track
        services = server.services
        self.find_submission = services.submissions.find_submission
        self.submit = services.submissions.submit
        self.check_acceptance = services.submissions.check_acceptance
        self.status = services.tasks.status
        self.query = services.tasks.query
        self.wait = services.tasks.wait
        self.cancel = services.cancellation.cancel
        self.replay = services.events.replay
        self.follow = services.events.follow
        self.follow_all = services.events.follow_all
        self.artifacts = services.artifacts.list_artifacts
        self.artifact = services.artifacts.find_artifact
        self.open_terminal = services.sandboxes.open_terminal
        self.has_preserved_sandbox = services.sandboxes.has_preserved_sandbox
        self.release = services.sandboxes.release
        self.prune = services.administration.prune
        self.drain = services.administration.drain
        self.undo_drain = services.administration.undo_drain
        self.drain_status = services.administration.drain_status
        self.health = services.administration.health


class ServerComponents:
    """A server's components with one data directory. Each `server()` starts a new server; the runners continue."""

    def __init__(self, data_dir, store, *, capacity=AMPLE_RESOURCES, permanent_reasons=(), upstream=None):
        self.upstream = upstream
        self.data_dir, self.store, self.capacity, self.permanent_reasons = data_dir, store, capacity, permanent_reasons
        self.journals = FileJournals(data_dir)
        self.clock = AdjustableClock()
        self.runners = FakeRunners(self.journals, self.clock)
        self.memory_available_bytes = 100 * GIB
        self.space, self.reserve = DiskSpace(100 * GIB, 1000 * GIB), ReserveFile(data_dir / "reserve", 4096)
        self.reserve.allocate()
        self.secrets, self.requested_secrets = {}, []
        self.images, self.image_error = {}, ""
        self.remove = remove_trees
        self.runtime_failure = self.next_probe_result = None

    async def probe(self):
        return self.next_probe_result

    async def remove_files(self, paths):
        await self.remove(paths)

    def find_image(self, profile):
        if self.image_error:
            raise ImageUnusableError(self.image_error)
        return self.images.get(profile)

    async def resolve(self, secrets):
        self.requested_secrets += [secret.name for secret in secrets]
        missing = [secret.name for secret in secrets if secret.name not in self.secrets]
        if missing:
            raise SecretUnavailableError(f"Secret {missing[0]} is not available.")
        return {secret.name: self.secrets[secret.name] for secret in secrets}

    @asynccontextmanager
    async def server(self):
        clock, runners = self.clock, self.runners
        template = LaunchOrder("", "", str(self.data_dir), "/run", "bubblewrap", self.upstream)
        probes = [RuntimeProbe("bubblewrap", self.runtime_failure is None, "namespaces", 1)]
        probe_result = ProbeResult(probes, template, "namespaces", self.runtime_failure)
        prober = RuntimeProber(probe_result, self.probe, clock)
        preserved = PreservedSandboxes(self.data_dir, self.remove_files)
        host = Host("here", "b")
        parts = ServerParts(
            data_dir=self.data_dir,
            journals=self.journals,
            store=self.store,
            clock=clock,
            runners=runners,
            scheduler=Scheduler(self.capacity),
            runner_launcher=RunnerLauncher(
                self.journals, runners, clock, self.resolve, self.find_image, prober=prober, host=host
            ),
            prober=prober,
            disk_monitor=DiskMonitor(self.data_dir, lambda: self.space, Watermark(5, 4 * GIB), self.reserve),
            drain=Drain(self.data_dir),
            preserved_sandboxes=preserved,
            debug_sessions=DebugSessions(runners, runners, preserved, self.resolve, self.find_image, prober),
            pruner=Pruner(
                PruningDependencies(
                    self.data_dir, self.journals, self.store, preserved, clock, self.remove_files, fsync_path
                )
            ),
            convert_line=convert_recorded_line,
            retention=Retention(),
            permanent_reasons=self.permanent_reasons,
            read_memory_available_bytes=lambda: self.memory_available_bytes,
        )
        server = TaskServer.compose(parts)
        server.tracker.track(*recover(self.journals, self.store, clock))
        try:
            yield RunningServer(server, parts)
        finally:
            await server.tracker.close()
            await asyncio.to_thread(self.store.close)

    def track_new_task(self, service):
        """Track a task that needs not be acceptable."""
        tracked, _ = SubmissionLog(self.journals, self.store, self.clock).add(manifest(), None)
        service.track(tracked)

    def set_clock_back(self):
        self.clock.set_back_by = timedelta(hours=1)

    async def start_running_task(self, service):
        """Submit task-1 and wait until its state is `running`."""
        await service.submit(manifest())
        await self.wait_for_launch("task-1")
        self.runners.record("task-1", *TO_RUNNING)
        await self.wait_for_state(service, "task-1", TaskState.RUNNING)

    async def wait_for_state(self, service, task_id, state):
        async with asyncio.timeout(10):
            while (await service.status(task_id)).state is not state:
                await asyncio.sleep(0.005)

    async def kill_runners(self, task_id, count):
        """Kill `count` runners of the task, one after the other."""
        for number in range(1, count + 1):
            await self.wait_for_launch(task_id, number)
            self.runners.kill(task_id)

    async def wait_for_launch(self, task_id, count=1):
        async with asyncio.timeout(10):
            while sum(order.task_id == task_id for order in self.runners.orders) < count:
                await asyncio.sleep(0.005)
