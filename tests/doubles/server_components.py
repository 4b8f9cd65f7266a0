"""A server's components with one data directory, and runners controlled by the test."""

import asyncio
import os
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

from doubles.manifests import manifest
from sandbox.agents.claude_code.output_parser import convert_recorded_line
from sandbox.bootstrap.clock import SystemClock
from sandbox.disks.commands import remove_trees
from sandbox.disks.reserve_file import ReserveFile
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import ImageUnusableError
from sandbox.interfaces.placement import HostIdentity, ProbeResult
from sandbox.interfaces.runner import Reply, RunnerUnreachableError
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.interfaces.server_services import HostLoad, Retention, TaskServices
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import JournalRecorder
from sandbox.model.events import (
    AgentStarted,
    CancelRequested,
    SandboxCreated,
    WorkspacePrepared,
)
from sandbox.model.fixed_limits import UNFINISHED_TASKS_MAX
from sandbox.model.resources import DiskSpace, Resources, Watermark
from sandbox.model.task_state import TaskState
from sandbox.placements.local.attempt_files import LocalAttemptFiles
from sandbox.placements.local.placement import LocalPreservedDisk, kill_lock_holder
from sandbox.server.administration import Administration, HealthCheck, Hosts, LoadHistory
from sandbox.server.derived_tasks import DerivedTaskPlanner
from sandbox.server.dispatcher import Dispatcher
from sandbox.server.event_streams import Broadcast, EventStream
from sandbox.server.index_writer import IndexWriter
from sandbox.server.journal_tailer import JournalTailer
from sandbox.server.placements import Placements, ProbedHost
from sandbox.server.preserved_sandboxes import DebugSessions, PreservedSandboxes
from sandbox.server.pruning import Pruner
from sandbox.server.recovery import RunnerRecovery, recover
from sandbox.server.runner_launcher import RunnerLauncher, TaskSecrets
from sandbox.server.scheduler import Scheduler
from sandbox.server.start_conditions import DiskMonitor, Drain, StartConditions, UnfinishedTaskLimit
from sandbox.server.submissions import Submissions, SubmissionStore, TaskTracker
from sandbox.server.task_services import (
    Canceller,
    TaskArtifacts,
    TaskCancellation,
    TaskDeletion,
    TaskQueries,
    TaskSandboxes,
)

GIB = 1024**3
TO_RUNNING = (WorkspacePrepared("c" * 40), SandboxCreated("vm", "bubblewrap", "host"), AgentStarted("s"))
UPSTREAM = ModelUpstream("http://model.example", api_key="k")
AMPLE_RESOURCES = Resources(100, 1000 * GIB, 1000 * GIB)


class FakePlacement:
    """A placement without runner processes. The test simulates the runners."""

    allocator = None

    def __init__(self, host, data_dir, journals, clock, files):
        self.host, self.files = host, files
        self.data_dir, self.journals, self.clock = data_dir, journals, clock
        self.lock_state, self.disk_lock_state = journals.lock_state, None
        self.orders = []
        self.recorders = {}
        self.launch_error, self.failure_count = None, 0

    async def launch(self, order, writer):
        if self.launch_error is not None:
            self.failure_count += 1
            raise self.launch_error
        self.orders.append(order)
        with self.journals.hand_over(writer) as lock_fd:
            adopted = self.journals.adopt(order.task_id, os.dup(lock_fd))
        self.recorders[order.task_id] = JournalRecorder(
            adopted, self.journals.replay(order.task_id).task, self.clock.now
        )
        return FakeRunnerHandle(self, order.task_id, order.attempt_id)

    def find_runner(self, location):
        return FakeRunnerHandle(self, location.task_id, location.attempt_id)

    def preserved_disk(self, location):
        layout = TaskLayout(self.data_dir, location.task_id).attempt(location.attempt_id)
        return FakePreservedDisk(self, layout)

    async def start_debug_session(self, order):
        raise OSError("no debug session")

    async def may_be_responsive(self, attempt_id):
        return True

    def kill_lock_holder(self, task_id):
        return kill_lock_holder(self.journals.lock_path(task_id))

    async def cancel(self, attempt_id, request):
        for launched in self.orders:
            if launched.attempt_id == attempt_id and launched.task_id in self.recorders:
                try:
                    self.recorders[launched.task_id].record(CancelRequested(request.reason, request.force))
                except OSError as error:
                    return Reply(done=False, message=str(error), was_disk_write_rejected=True)
                return Reply(done=True)
        raise RunnerUnreachableError("gone")

    async def open_terminal(self, attempt_id, request):
        raise RunnerUnreachableError("gone")

    def record(self, task_id, *events):
        for event in events:
            self.recorders[task_id].record(event)
        if self.recorders[task_id].task.state.is_final:
            self.kill(task_id)

    def kill(self, task_id):
        self.recorders.pop(task_id).writer.close()


class FakeRunnerHandle:
    """The handle of a simulated runner."""

    def __init__(self, placement, task_id, attempt_id):
        self.placement, self.task_id, self.attempt_id = placement, task_id, attempt_id

    def lock_state(self):
        return self.placement.lock_state(self.task_id)

    async def may_be_responsive(self):
        return await self.placement.may_be_responsive(self.attempt_id)

    async def cancel(self, request):
        return await self.placement.cancel(self.attempt_id, request)

    async def open_terminal(self, request):
        return await self.placement.open_terminal(self.attempt_id, request)

    async def kill(self):
        return self.placement.kill_lock_holder(self.task_id)


class FakePreservedDisk(LocalPreservedDisk):
    """A preserved disk with a real lock, and with sessions that the test simulates."""

    def __init__(self, placement, layout):
        super().__init__(layout, Path("/none"), None, placement.files)
        self.placement, self.attempt_id = placement, layout.root.name

    @asynccontextmanager
    async def try_lock(self):
        if self.placement.disk_lock_state is not None:
            yield self.placement.disk_lock_state
            return
        async with super().try_lock() as lock_state:
            yield lock_state

    async def start_debug_session(self, order):
        await self.placement.start_debug_session(order)

    async def open_terminal(self, request):
        return await self.placement.open_terminal(self.attempt_id, request)


class AdjustableClock(SystemClock):
    """A wall clock that can be set back."""

    set_back_by = timedelta()

    def now(self):
        return super().now() - self.set_back_by


class RunningServer:
    """The methods of a server's services, and the objects that tests use directly."""

    def __init__(self, components):
        data_dir, clock, tracked_tasks = components.data_dir, components.clock, {}
        journals, store, remove = components.journals, components.store, components.remove_files
        probes = [RuntimeProbe("bubblewrap", components.runtime_failure is None, "namespaces", 1)]
        probe_result = ProbeResult(probes, "bubblewrap", "namespaces", components.runtime_failure)
        self.host = host = ProbedHost(probe_result, components, clock)
        placement, names = components.placement, components.placement_names
        self.placements = placements = Placements(
            dict.fromkeys(names, placement), dict.fromkeys(names, host), names[-1]
        )
        self.preserved_sandboxes = preserved = PreservedSandboxes(placements)
        secrets = TaskSecrets(components.resolve)
        self.debug_sessions = DebugSessions(preserved, secrets, placements)
        self.pruner = Pruner(data_dir, journals, store, preserved, clock, remove)
        disk_monitor = DiskMonitor(data_dir, lambda: components.space, Watermark(5, 4 * GIB), components.reserve)
        drain, broadcast = Drain(data_dir), Broadcast()
        kinds, missing_keys = components.agent_kinds, components.kinds_without_key
        upstreams = {kind: None if kind in missing_keys else components.upstream for kind in kinds}
        launcher = RunnerLauncher(placements, secrets, upstreams, lambda: False)
        api_key_variables = {kind: f"{kind.upper()}_KEY" for kind in kinds}
        conditions = StartConditions(drain, host, disk_monitor, api_key_variables, missing_keys)
        scheduler, limit = (
            Scheduler(components.capacity, components.maximal_host_sizes),
            UnfinishedTaskLimit(components.unfinished_tasks_max),
        )
        dispatcher = Dispatcher(tracked_tasks, scheduler, launcher, conditions, host, limit)
        recovery = RunnerRecovery(journals, placements, launcher, secrets, conditions, clock)
        index_writer = IndexWriter(store)
        self.tracker = TaskTracker(
            tracked_tasks,
            dispatcher,
            JournalTailer(tracked_tasks, journals, index_writer, clock, broadcast, dispatcher, recovery),
        )
        health_check = HealthCheck(store, clock, conditions, disk_monitor, drain, host)
        submission_store, queries = (
            SubmissionStore(data_dir, journals, store, clock),
            TaskQueries(tracked_tasks, store, placements),
        )
        events = EventStream(tracked_tasks, journals, store, broadcast, convert_recorded_line)
        self.load = LoadHistory(tracked_tasks, dispatcher, disk_monitor, clock, lambda: components.host_load)
        services = TaskServices(
            Submissions(submission_store, queries, self.tracker, dispatcher, conditions, index_writer),
            queries,
            TaskCancellation(tracked_tasks, queries, Canceller(journals, clock), clock),
            TaskDeletion(tracked_tasks, queries, preserved, self.pruner),
            events,
            TaskArtifacts(data_dir, queries),
            TaskSandboxes(tracked_tasks, queries, preserved, self.debug_sessions),
            Administration(tracked_tasks, dispatcher, clock, drain, self.pruner, Retention(), health_check),
            DerivedTaskPlanner(data_dir, queries, events),
            self.load,
            Hosts(tracked_tasks, placements),
        )
        self.services, self.tracked_tasks = services, tracked_tasks
        self.track = self.tracker.track
        self.find_submission = services.submissions.find_submission
        self.submit = services.submissions.submit
        self.check_acceptance = services.submissions.check_acceptance
        self.plan_rerun, self.plan_continuation, self.continuation_refusal = (
            services.derived_tasks.plan_rerun,
            services.derived_tasks.plan_continuation,
            services.derived_tasks.continuation_refusal,
        )
        self.status = services.tasks.status
        self.query, self.chain = services.tasks.query, services.tasks.chain
        self.wait = services.tasks.wait
        self.cancel, self.delete = services.cancellation.cancel, services.deletion.delete
        self.recorded_events = services.events.recorded_events
        self.follow = services.events.follow
        self.follow_all = services.events.follow_all
        self.artifacts = services.artifacts.list_artifacts
        self.artifact = services.artifacts.find_artifact
        self.open_terminal = services.sandboxes.open_terminal
        self.has_preserved_sandbox = services.sandboxes.has_preserved_sandbox
        self.release = services.sandboxes.release
        self.prune = services.administration.prune
        self.drain, self.undo_drain = services.administration.drain, services.administration.undo_drain
        self.drain_status = services.administration.drain_status
        self.health = services.administration.health


class ServerComponents:
    """A server's components with one data directory. Each `server()` starts a new server; the runners continue.

    Implements `Host`, and the `ProfileCatalog` of its images.
    """

    def __init__(self, data_dir, store, *, capacity=AMPLE_RESOURCES, upstream=UPSTREAM):
        self.upstream, self.agent_kinds, self.kinds_without_key = upstream, ["claude"], set()
        self.data_dir, self.store, self.capacity = data_dir, store, capacity
        self.maximal_host_sizes = None
        self.unfinished_tasks_max = UNFINISHED_TASKS_MAX
        self.journals = FileJournals(data_dir)
        self.clock = AdjustableClock()
        files = LocalAttemptFiles(data_dir, (), self.remove_files)
        self.placement = FakePlacement(self, data_dir, self.journals, self.clock, files)
        self.identity, self.host_problem = HostIdentity("here", "b"), None
        self.placement_names = [""]
        self.available_memory_bytes = 100 * GIB
        self.host_load = HostLoad(0, 0, 3 * GIB, 4 * GIB)
        self.space, self.reserve = DiskSpace(100 * GIB, 1000 * GIB), ReserveFile(data_dir / "reserve", 4096)
        self.reserve.allocate()
        self.secrets, self.requested_secrets = {}, []
        self.profile_images, self.image_error = {}, ""
        self.remove = remove_trees
        self.runtime_failure = self.next_probe_result = None

    @property
    def images(self):
        return self

    def find_image(self, profile, tier):
        if self.image_error:
            raise ImageUnusableError(self.image_error)
        return self.profile_images.get(profile)

    def blocked_reason(self):
        return self.host_problem

    def memory_available_bytes(self):
        return self.available_memory_bytes

    async def probe(self):
        return self.next_probe_result

    async def remove_files(self, paths):
        await self.remove(paths)

    async def resolve(self, secrets):
        self.requested_secrets += [secret.name for secret in secrets]
        missing = [secret.name for secret in secrets if secret.name not in self.secrets]
        if missing:
            raise SecretUnavailableError(f"Secret {missing[0]} is not available.")
        return {secret.name: self.secrets[secret.name] for secret in secrets}

    @asynccontextmanager
    async def server(self):
        server = RunningServer(self)
        server.track(*recover(self.journals, self.store, server.placements, self.clock))
        try:
            yield server
        finally:
            await server.tracker.close()
            await asyncio.to_thread(self.store.close)

    def track_new_task(self, service):
        """Track a task without checking whether it is acceptable."""
        tracked, _ = SubmissionStore(self.data_dir, self.journals, self.store, self.clock).add(manifest(), None)
        service.track(tracked)

    def set_clock_back(self):
        self.clock.set_back_by = timedelta(hours=1)

    async def start_running_task(self, service):
        """Submit task-1 and wait until its state is `running`."""
        await service.submit(manifest())
        await self.wait_for_launch("task-1")
        self.placement.record("task-1", *TO_RUNNING)
        await self.wait_for_state(service, "task-1", TaskState.RUNNING)

    async def wait_for_state(self, service, task_id, state):
        async with asyncio.timeout(10):
            while (await service.status(task_id)).state is not state:
                await asyncio.sleep(0.005)

    async def kill_runners(self, task_id, count):
        """Kill `count` runners of the task, one after the other."""
        for number in range(1, count + 1):
            await self.wait_for_launch(task_id, number)
            self.placement.kill(task_id)

    async def wait_for_launch(self, task_id, count=1):
        async with asyncio.timeout(10):
            while sum(order.task_id == task_id for order in self.placement.orders) < count:
                await asyncio.sleep(0.005)
