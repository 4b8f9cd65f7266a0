"""Run step: runs the agent, creates and serves its gateway, and enforces limits."""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from types import TracebackType
from typing import Never

import msgspec

from sandbox.interfaces.agent import Agent, AgentDriver, AgentEvent, AgentOutcome, AgentReady, OutputParser
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.disks import Disk, DiskUsage
from sandbox.interfaces.gateway import BudgetExhausted, Gateway, GatewayFactory, GatewayRules, KeyRejected, ReportEvent
from sandbox.interfaces.runtime import ExitStatus, Listeners, Stats
from sandbox.model.egress import egress_rules
from sandbox.model.events import (
    AgentExited,
    AgentResult,
    AgentStarted,
    AttemptFailed,
    EgressDenied,
    ErrorReported,
    Event,
    Metrics,
    Usage,
)
from sandbox.model.failure import AttemptError, Failure, FailureCode, FailureReason
from sandbox.model.fixed_limits import (
    AGENT_START_TIMEOUT_SECONDS,
    METRICS_INTERVAL_SECONDS_MAX,
    METRICS_INTERVAL_SECONDS_MIN,
)
from sandbox.model.manifest.schema import Lifecycle
from sandbox.model.state_machine import will_be_followed_up
from sandbox.model.task import Task, cut_final_message
from sandbox.primitives.runner_cpu_throttle import CpuQueue, CpuThrottle
from sandbox.runner.agent_output import (
    AgentOutput,
    OutputQuota,
    StdoutProcessing,
    earlier_output_bytes,
    redacted_chunks,
)
from sandbox.runner.agent_process import (
    AgentProcess,
    OutputReader,
    SandboxKiller,
    drain_output,
    start_headless_agent,
    start_terminal_agent,
)
from sandbox.runner.attempt_context import AttemptContext
from sandbox.runner.progress_and_conversation_recorder import (
    URGENT_INTERVAL_SECONDS,
    ProgressAndConversationRecorder,
)
from sandbox.runner.steps.provision import ProvisionedSandbox
from sandbox.runner.task_limits import ExhaustionDetector, budget_with_earlier_usage, remaining_seconds
from sandbox.runner.terminals import SandboxTerminals, SharedTerminal, TerminalServer, shell_environment


class GatewayEventRecorder:
    """Records the events that a gateway reports.

    The gateway cannot handle a recording error, so `raise_error` raises it in one of the runner's background loops.
    """

    def __init__(self, record: Callable[[Event], object], progress: ProgressAndConversationRecorder) -> None:
        self._record = record
        self._progress = progress
        self._errors: asyncio.Queue[Exception] = asyncio.Queue()

    def report(self, event: Usage | EgressDenied | ErrorReported | BudgetExhausted | KeyRejected) -> None:
        """Record an event. Implements `ReportEvent`."""
        try:
            self._record(_to_event(event))
        except Exception as error:
            self._errors.put_nowait(error)
        if isinstance(event, Usage):
            self._progress.add_usage(event)

    async def raise_error(self) -> Never:
        """Wait until an event cannot be recorded, and raise the error."""
        raise await self._errors.get()


def _to_event(event: Usage | EgressDenied | ErrorReported | BudgetExhausted | KeyRejected) -> Event:
    match event:
        case BudgetExhausted():
            return AttemptFailed(Failure(FailureCode.BUDGET_EXCEEDED, event.message))
        case KeyRejected():
            return AttemptFailed(Failure(FailureCode.AGENT_FAILED, event.message, reason=FailureReason.MODEL_REJECTED))
        case _:
            return event


def create_gateway(
    attempt: AttemptContext,
    provisioned: ProvisionedSandbox,
    gateways: GatewayFactory,
    api_key_variable: str,
    report: ReportEvent,
) -> Gateway:
    """Create the gateway, which listens once `serve_gateway` runs. Raises AttemptError (provision_failed).

    api_key_variable: the name of the server's environment variable that contains the model API key.
    """
    if attempt.upstream is None:
        raise AttemptError(
            FailureCode.PROVISION_FAILED,
            f"The server has no model key; set {api_key_variable} and restart the server.",
        )
    rules = _gateway_rules(attempt.task, hold_model_requests=provisioned.launch_spec.hold_model_requests)
    redact = attempt.redactor.redact_text if attempt.redactor is not None else str
    try:
        return gateways.create(attempt.upstream, provisioned.gateway_key, report, rules, redact=redact)
    except ValueError as error:
        raise AttemptError(FailureCode.PROVISION_FAILED, str(error)) from None


def _gateway_rules(task: Task, *, hold_model_requests: bool) -> GatewayRules:
    """Return the rules for the gateway of a task's agent.

    Model requests are held only if the agent must be checked before its first request.
    """
    return GatewayRules(
        egress=egress_rules(task.manifest.vm),
        budget=budget_with_earlier_usage(task),
        hold_model_requests=hold_model_requests,
    )


async def serve_gateway(gateway: Gateway, listeners: Listeners, record: Callable[[Event], object]) -> None:
    """Serve the gateway until cancelled. If the gateway fails, record the failure."""
    try:
        await gateway.serve(listeners)
    except Exception as error:
        message = f"The sandbox's gateway failed ({type(error).__name__}); submit the task again."
        record(AttemptFailed(Failure(FailureCode.SANDBOX_LOST, message)))


class MetricsSampler:
    """Converts the sandbox's counters to metrics. CPU is a percentage of one processor since the last sample."""

    def __init__(self, memory_total_bytes: int) -> None:
        self._memory_total_bytes = memory_total_bytes
        self._previous: tuple[float, float] | None = None

    def sample(self, stats: Stats, disk: DiskUsage | None, monotonic: float) -> Metrics:
        """Convert the counters of one moment to metrics."""
        return Metrics(
            cpu_percent=self._cpu_percent(stats.cpu_seconds, monotonic),
            memory_used_bytes=stats.memory_bytes,
            memory_total_bytes=self._memory_total_bytes,
            disk_used_bytes=disk.used_bytes if disk else None,
            disk_total_bytes=disk.total_bytes if disk else None,
            load_avg=round(os.getloadavg()[0], 2),
        )

    def _cpu_percent(self, cpu_seconds: float | None, monotonic: float) -> float | None:
        last, self._previous = self._previous, None if cpu_seconds is None else (cpu_seconds, monotonic)
        if cpu_seconds is None or last is None or monotonic <= last[1]:
            return None
        return round(max(cpu_seconds - last[0], 0.0) / (monotonic - last[1]) * 100, 1)


def metrics_interval_seconds(age_seconds: float) -> float:
    """Return the time until the next sample: shorter at first, so a short task gets enough samples for a chart."""
    return min(max(age_seconds / 4, METRICS_INTERVAL_SECONDS_MIN), METRICS_INTERVAL_SECONDS_MAX)


class TimeLimit:
    """Watches `lifecycle.timeout` and `lifecycle.hang_timeout`, using the monotonic clock.

    An agent counts as hung if it produces no output while `is_busy` returns False.
    """

    def __init__(self, lifecycle: Lifecycle, clock: Clock, is_busy: Callable[[], bool]) -> None:
        self._lifecycle = lifecycle
        self._clock = clock
        self._is_busy = is_busy
        self._last_active_at = clock.monotonic()

    def record_activity(self) -> None:
        """Restart the hang timeout."""
        self._last_active_at = self._clock.monotonic()

    async def watch(self, remaining_seconds: float) -> Failure:
        """Return the failure once a limit is exceeded. remaining_seconds: seconds left of `lifecycle.timeout`."""
        lifecycle, deadline = self._lifecycle, self._clock.monotonic() + remaining_seconds
        while True:
            now = self._clock.monotonic()
            if self._is_busy():
                self._last_active_at = now
            silence_end = self._last_active_at + lifecycle.hang_timeout_seconds
            if now >= deadline:
                message = f"The agent was still working after {lifecycle.timeout}; raise lifecycle.timeout."
                return Failure(FailureCode.TIMEOUT, message)
            if now >= silence_end:
                silence = lifecycle.hang_timeout
                message = f"The agent produced no output for {silence}; raise lifecycle.hang_timeout or retry."
                return Failure(FailureCode.HANG, message)
            await asyncio.sleep(min(deadline - now, silence_end - now, 1.0))


BackgroundWork = Callable[[], Coroutine[None, None, None]]


class RequiredBackgroundWork:
    """Background loops of a sandbox. A failed loop kills the sandbox: no agent continues without its limits.

    At the end of the context, all loops are cancelled. If the block raised no error, the first loop's error is raised.
    """

    def __init__(self, killer: SandboxKiller) -> None:
        self._killer = killer
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, loop: BackgroundWork) -> "asyncio.Task[None]":
        """Start a loop."""
        task = asyncio.create_task(self._run(loop))
        self._tasks.append(task)
        return task

    async def _run(self, loop: BackgroundWork) -> None:
        try:
            await loop()
        except Exception:
            await self._killer.kill()
            raise

    async def __aenter__(self) -> "RequiredBackgroundWork":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        if error is None:
            for result in results:
                if isinstance(result, Exception):
                    raise result


class RunStep(msgspec.Struct, frozen=True):
    """Runs the agent of an attempt. terminals: serves the attempt's terminals to clients."""

    attempt: AttemptContext
    agent: Agent
    driver: AgentDriver
    gateways: GatewayFactory
    terminals: TerminalServer
    disk: Disk
    clock: Clock
    throttle: CpuThrottle

    async def run(self, provisioned: ProvisionedSandbox) -> None:
        """Run the agent until its outcome is recorded; on return, no process is running in the sandbox.

        Raises AttemptError (provision_failed, sandbox_lost).
        """
        self.throttle.start()
        attempt, record = self.attempt, self.attempt.recorder.record
        progress = ProgressAndConversationRecorder(
            record, self.clock.now, attempt.task.final_progress, records_conversation=attempt.records_conversation
        )
        gateway_events = GatewayEventRecorder(record, progress)
        gateway = create_gateway(
            attempt, provisioned, self.gateways, self.agent.api_key_variable, gateway_events.report
        )
        agent_run = self._create_agent_run(provisioned, gateway, progress)
        ended = ExitStatus(None)
        killer = SandboxKiller(provisioned.sandbox)
        async with RequiredBackgroundWork(killer) as loops:
            loops.start(gateway_events.raise_error)
            try:
                ended = await agent_run.supervise(loops, killer)
            finally:
                self.terminals.close_agent_terminal(ended)
        await agent_run.record_exit(ended)

    def _create_agent_run(
        self, provisioned: ProvisionedSandbox, gateway: Gateway, progress: ProgressAndConversationRecorder
    ) -> "_AgentRun":
        attempt, manifest, terminals = self.attempt, self.attempt.task.manifest, self.terminals
        record, cpu_queue = attempt.recorder.record, self.throttle.queue()
        parser = self.driver.create_parser(provisioned.launch_spec.session_id)

        def is_busy() -> bool:
            """Return whether a silent agent is waiting for the model, or has clients on its terminal."""
            return bool(gateway.requests_in_flight) or terminals.has_agent_clients

        time_limit = TimeLimit(manifest.lifecycle, self.clock, is_busy)
        handler = _OutputHandler(attempt, gateway, progress, time_limit, self.clock)
        stdout = StdoutProcessing(
            manifest.agent.recorded_stream,
            parser.parse_line,
            handler.handle_event,
            marks_parsed=attempt.records_conversation,
        )
        quota = OutputQuota(self.clock, earlier_output_bytes(attempt.task))
        return _AgentRun(
            attempt,
            self.agent.display_name,
            self.driver,
            provisioned,
            gateway,
            terminals,
            self.clock,
            progress,
            time_limit,
            ExhaustionDetector(manifest.vm, self.disk, record),
            parser,
            AgentOutput(
                record, handler.count_output, stdout, redactor=attempt.redactor, quota=quota, cpu_queue=cpu_queue
            ),
            cpu_queue,
        )


class _OutputHandler(msgspec.Struct, frozen=True):
    """Handles the agent's output and its events."""

    attempt: AttemptContext
    gateway: Gateway
    progress: ProgressAndConversationRecorder
    time_limit: TimeLimit
    clock: Clock

    def count_output(self, byte_count: int) -> None:
        """Count the output both as activity and as progress."""
        self.time_limit.record_activity()
        self.progress.add_output(byte_count)

    def handle_event(self, event: AgentEvent) -> None:
        """Record the consequences of an event from the agent."""
        if isinstance(event, AgentReady):
            self._check_ready(event)
            return
        parent = self.attempt.task.parent
        if isinstance(event, AgentResult) and parent is not None and parent.session is not None:
            # The agent reports the cost of the whole session, which includes the cost of the earlier tasks.
            event = msgspec.structs.replace(event, cost_usd=None)
        self.progress.handle_agent_event(event, self.clock.monotonic())

    def _check_ready(self, ready: AgentReady) -> None:
        """Release model requests if the agent has the requested tools and MCP servers; otherwise, fail the attempt."""
        redactor = self.attempt.redactor
        redact = redactor.redact_text if redactor is not None else str
        failure = ready.find_failure(self.attempt.task.manifest, redact)
        if failure is not None:
            self.attempt.recorder.record(AttemptFailed(failure))
        else:
            self.gateway.release_model_requests()


class _AgentRun(msgspec.Struct, frozen=True):
    """One run of an agent, from its start to the record of its exit.

    agent_name: the agent's name in messages. cpu_queue: where output waits for the runner's CPU budget.
    """

    attempt: AttemptContext
    agent_name: str
    driver: AgentDriver
    provisioned: ProvisionedSandbox
    gateway: Gateway
    terminals: TerminalServer
    clock: Clock
    progress: ProgressAndConversationRecorder
    time_limit: TimeLimit
    exhaustion: ExhaustionDetector
    output_parser: OutputParser
    output: AgentOutput
    cpu_queue: CpuQueue

    async def supervise(self, loops: RequiredBackgroundWork, killer: SandboxKiller) -> ExitStatus:
        """Run from the agent's start until its processes are gone and its output is read."""
        try:
            agent, readers, agent_terminal = await self._start_agent()
            reading = [loops.start(reader) for reader in readers]
            self.attempt.recorder.record(
                AgentStarted(self.provisioned.launch_spec.session_id, self.clock.monotonic(), self.agent_name)
            )
            for loop in (
                partial(self._serve_gateway, agent_terminal),
                self._record_progress,
                self._record_metrics,
                self._enforce_time_limits,
                partial(self._kill_on, partial(self.exhaustion.watch_disk, self.clock), killer),
                partial(self._kill_on, partial(self.exhaustion.watch_kernel_usage, self.provisioned.sandbox), killer),
                partial(killer.stop_on, self.attempt.recorder.stop_request, agent),
            ):
                loops.start(loop)
            ended = await killer.wait_for_exit(agent)
        finally:
            self.terminals.disable()
            await killer.kill()
        recorder = self.attempt.recorder
        await drain_output(
            reading, self.output, self.cpu_queue, recorder.record, lambda: recorder.stop_request.is_forced
        )
        return ended

    async def record_exit(self, exit_status: ExitStatus) -> None:
        """Record the agent's outcome, after everything else that the agent caused."""
        self.progress.set_denied_count(self.gateway.denied_count)
        self.progress.close()
        self.exhaustion.check_stats(await self.provisioned.sandbox.stats())
        await self.exhaustion.check_disk()
        manifest = self.attempt.task.manifest
        if manifest.agent.is_interactive:
            outcome = AgentOutcome(None, self.driver.check_interactive_exit(exit_status))
        else:
            outcome = self.output_parser.outcome(exit_status, self.output.stderr_tail)
        failure = self.exhaustion.explain_failure(outcome, self.agent_name)
        exited = AgentExited(exit_status.code, outcome.result, failure, self._final_message())
        if not manifest.agent.is_interactive and not will_be_followed_up(self.attempt.task, exited):
            await self.output.record_rendered_stdout(self.driver.render_output(manifest, outcome.result))
        self.output.close()
        self.attempt.recorder.record(exited)

    def _final_message(self) -> str | None:
        """Return the agent's last message.

        It is redacted before it is cut, because a part of a secret is not redacted.
        """
        redactor, message = self.attempt.redactor, self.progress.last_message
        if redactor is not None:
            message = redactor.redact_text(message)
        return cut_final_message(message) or None

    async def _start_agent(self) -> tuple[AgentProcess, Sequence[OutputReader], SharedTerminal | None]:
        """Start the agent. Return its output readers, and its terminal if it has one.

        The timeout also covers runtimes that do not limit their own start time.
        """
        command = self.provisioned.launch_spec.command
        try:
            async with asyncio.timeout(AGENT_START_TIMEOUT_SECONDS):
                if not self.attempt.task.manifest.agent.is_interactive:
                    return *await start_headless_agent(self.provisioned.sandbox, command, self.output), None
                agent = await start_terminal_agent(self.provisioned.sandbox, command)
        except TimeoutError:
            message = "The agent did not start in the sandbox in time; submit the task again."
            raise AttemptError(FailureCode.PROVISION_FAILED, message) from None
        chunks = redacted_chunks(agent.terminal.output, self.attempt.redactor, self.cpu_queue)
        shared = SharedTerminal(agent.terminal)
        return agent, [partial(self.output.read_terminal, chunks, shared.broadcast)], shared

    async def _serve_gateway(self, agent_terminal: SharedTerminal | None) -> None:
        """Open the gateway only after AgentStarted is durable, so every model request belongs to a recorded agent.

        On a worker, the gateway also waits for the first lease, which the runner gets once the server has this record.
        """
        await self.attempt.recorder.wait_until_written()
        command = self.provisioned.launch_spec.command
        variables = shell_environment(
            command.environment, {*self.attempt.secrets, *self.provisioned.launch_spec.model_variables}
        )
        self.terminals.enable(SandboxTerminals(self.provisioned.sandbox, variables, command.directory, agent_terminal))
        await serve_gateway(self.gateway, self.provisioned.sandbox.listeners, self.attempt.recorder.record)

    async def _record_progress(self) -> None:
        while True:
            await asyncio.sleep(URGENT_INTERVAL_SECONDS)
            self.progress.changed.clear()
            self.progress.set_denied_count(self.gateway.denied_count)
            pause_seconds = self.progress.record_if_due(self.clock.monotonic()) - URGENT_INTERVAL_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_seconds):
                    await self.progress.changed.wait()

    async def _record_metrics(self) -> None:
        sampler = MetricsSampler(self.attempt.task.manifest.vm.memory_bytes)
        started_at = self.clock.monotonic()
        while True:
            stats = await self.provisioned.sandbox.stats()
            self.exhaustion.check_stats(stats)
            self.attempt.recorder.record(sampler.sample(stats, self.exhaustion.disk_usage, self.clock.monotonic()))
            await asyncio.sleep(metrics_interval_seconds(self.clock.monotonic() - started_at))

    async def _enforce_time_limits(self) -> None:
        """Record the failure; the effect of the record stops the agent with a grace period."""
        failure = await self.time_limit.watch(remaining_seconds(self.attempt.task, self.clock))
        self.attempt.recorder.record(AttemptFailed(failure))

    async def _kill_on(self, watch: Callable[[], Awaitable[Failure]], killer: SandboxKiller) -> None:
        """Kill the agent without a grace period once it exceeds a limit on the disk or on kernel objects."""
        self.attempt.recorder.record(AttemptFailed(await watch()))
        await killer.kill()
