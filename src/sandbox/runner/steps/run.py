"""Run step: runs the agent, serves its gateway and enforces limits."""

import asyncio
import contextlib
import math
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial

from sandbox.interfaces.agent import AgentOutcome, AgentReady, OutputParser
from sandbox.interfaces.disks import DiskUsage
from sandbox.interfaces.gateway import BudgetExhausted, Gateway, GatewayRules, KeyRejected
from sandbox.interfaces.runtime import ExitStatus, Sandbox, Stats
from sandbox.model.egress import egress_rules
from sandbox.model.events import (
    AgentExited,
    AgentStarted,
    AttemptFailed,
    EgressDenied,
    ErrorReported,
    Gap,
    Metrics,
    Usage,
)
from sandbox.model.failure import AttemptError, Failure, FailureCode
from sandbox.model.limits import (
    KILL_SECONDS,
    METRICS_INTERVAL_SECONDS,
    OUTPUT_DRAIN_SECONDS,
    OUTPUT_DRAIN_SECONDS_MAX,
    SANDBOX_START_SECONDS,
    TERM_GRACE_SECONDS,
)
from sandbox.model.manifest.schema import Manifest
from sandbox.model.state_machine import will_be_followed_up
from sandbox.model.task import Task
from sandbox.runner.agent_output import AgentOutput, OutputQuota, earlier_output_bytes, redacted_chunks
from sandbox.runner.attempt_recorder import StopSignal
from sandbox.runner.dependencies import AttemptContext
from sandbox.runner.progress import URGENT_INTERVAL_SECONDS, ProgressTracker, remaining_budget, remaining_seconds
from sandbox.runner.resource_exhaustion import ExhaustionDetector
from sandbox.runner.steps.provision import ProvisionedSandbox
from sandbox.runner.terminals import (
    InteractiveAgent,
    SharedTerminal,
    TerminalServer,
    start_interactive_agent,
    without_secrets,
)


class MetricsSampler:
    """Converts the sandbox's counters to metrics. CPU is a percentage of one processor since the last sample."""

    def __init__(self, memory_total_bytes: int) -> None:
        self._memory_total_bytes = memory_total_bytes
        self._previous: tuple[float, float] | None = None

    def sample(self, stats: Stats, disk: DiskUsage | None, monotonic: float) -> Metrics:
        """Return the metrics at one moment."""
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


BackgroundJob = Callable[[], Coroutine[None, None, None]]
_DRAIN_CHECKS = 5
"""Draining stops after this many consecutive checks without new output."""


async def run(
    attempt: AttemptContext, provisioned: ProvisionedSandbox, stop_signal: StopSignal, terminals: TerminalServer
) -> None:
    """Run the agent until its outcome is recorded; on return, nothing is left running inside."""
    await _AgentRun(attempt, provisioned, stop_signal, terminals).run()


class _AgentRun:
    def __init__(
        self,
        attempt: AttemptContext,
        provisioned: ProvisionedSandbox,
        stop_signal: StopSignal,
        terminals: TerminalServer,
    ) -> None:
        dependencies = attempt.dependencies
        self._attempt = attempt
        self._clock = dependencies.clock
        self._record = attempt.recorder.record
        self._sandbox: Sandbox = provisioned.sandbox
        self._launch_spec = provisioned.launch_spec
        self._stop_signal = stop_signal
        self._terminals = terminals
        self._interactive_agent: InteractiveAgent | None = None
        self._lifecycle = attempt.task.manifest.lifecycle
        self._output_parser: OutputParser = dependencies.agent.create_parser(provisioned.launch_spec.session_id)
        self._progress = ProgressTracker(self._record, self._clock.now, attempt.task.final_progress)
        self._last_active_at = self._clock.monotonic()
        manifest = attempt.task.manifest
        self._exhaustion = ExhaustionDetector(manifest.vm, dependencies.disks, attempt.layout, self._record)
        dependencies.throttle.start()
        self._output_queue = dependencies.throttle.queue()
        self._output = AgentOutput(
            self._record,
            self._on_output,
            self._on_line,
            redaction=attempt.redaction,
            quota=OutputQuota(dependencies.clock, earlier_output_bytes(attempt.task)),
            queue=self._output_queue,
            stdout_stream="transcript" if manifest.claude.headless and _is_rendered(manifest) else "stdout",
        )
        self._killed = asyncio.Event()
        self._event_recording_failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gateway = self._create_gateway(provisioned.task_key)

    async def run(self) -> None:
        ended = ExitStatus(None)
        async with _background_jobs() as helpers:
            try:
                ended = await self._supervise(helpers)
            finally:
                self._terminals.close_agent_terminal(ended)
        self._progress.set_denied_count(self._gateway.denied_count)
        self._progress.close()
        await self._record_exit(ended)

    def _create_gateway(self, task_key: str) -> Gateway:
        attempt = self._attempt
        if attempt.upstream is None:
            raise AttemptError(
                FailureCode.PROVISION_FAILED, "The server has no model key; set ANTHROPIC_API_KEY and restart it."
            )
        try:
            return attempt.dependencies.gateways.create(
                attempt.upstream,
                task_key,
                self._on_gateway_event,
                _gateway_rules(attempt.task),
                redact=attempt.redaction.redact_text if attempt.redaction is not None else str,
            )
        except ValueError as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, str(error)) from None

    async def _supervise(self, tasks: list["asyncio.Task[None]"]) -> ExitStatus:
        """Run from the agent's start until its processes are gone and its output is read."""
        try:
            output_readers = [self._start_guarded(reader) for reader in await self._start_agent()]
            tasks.extend(output_readers)
            self._record(AgentStarted(self._launch_spec.session_id, self._clock.monotonic()))
            for helper in (
                self._open_gateway,
                self._record_progress,
                self._record_metrics,
                self._watch_timeouts,
                self._watch_disk,
                self._watch_kernel_usage,
                self._watch_event_recording,
                self._stop_on_signal,
            ):
                tasks.append(self._start_guarded(helper))
            ended = await self._wait_for_exit()
        finally:
            self._terminals.disable()
            await self._kill()
        await self._drain_output(output_readers)
        return ended

    async def _start_agent(self) -> list[BackgroundJob]:
        """Start the agent; return the jobs that read its output.

        Runtimes limit their start time themselves; this timeout covers runtimes that do not.
        """
        output = self._output
        try:
            async with asyncio.timeout(SANDBOX_START_SECONDS):
                if not self._attempt.task.manifest.claude.headless:
                    self._interactive_agent = await start_interactive_agent(self._sandbox, self._launch_spec.command)
                    chunks = redacted_chunks(
                        self._interactive_agent.terminal.output, self._attempt.redaction, self._output_queue
                    )
                    shared = self._terminals.agent_terminal = SharedTerminal(self._interactive_agent.terminal)
                    return [partial(output.read_terminal, chunks, shared.broadcast)]
                stdout, stderr = await self._sandbox.start(self._launch_spec.command)
                return [partial(output.read_stdout, stdout), partial(output.read_stderr, stderr)]
        except TimeoutError:
            message = "The agent did not start in its sandbox in time; submit the task again."
            raise AttemptError(FailureCode.PROVISION_FAILED, message) from None

    def _start_guarded(self, job: BackgroundJob) -> "asyncio.Task[None]":
        """Start a job whose failure kills the sandbox: no agent continues without its limits."""

        async def start() -> None:
            try:
                await job()
            except Exception:
                await self._kill()
                raise

        return asyncio.create_task(start())

    async def _wait_for_exit(self) -> ExitStatus:
        """Wait for the command's exit.

        Raises AttemptError (sandbox_lost) if it does not exit within KILL_SECONDS after KILL.
        """
        ended = asyncio.create_task((self._interactive_agent or self._sandbox).wait())
        killed = asyncio.create_task(self._killed.wait())
        try:
            await asyncio.wait({ended, killed}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({ended}, timeout=KILL_SECONDS)
            if ended.done():
                return ended.result()
        finally:
            for waiting in (ended, killed):
                waiting.cancel()
            await asyncio.gather(ended, killed, return_exceptions=True)
        raise AttemptError(
            FailureCode.SANDBOX_LOST, "Processes of the sandbox could not be killed; check the machine's log."
        )

    async def _record_exit(self, exit_: ExitStatus) -> None:
        self._exhaustion.update(await self._sandbox.stats())
        await self._exhaustion.check_disk()
        agent = self._attempt.dependencies.agent
        if self._interactive_agent is not None:
            outcome = AgentOutcome(None, agent.check_interactive_exit(exit_))
        else:
            outcome = self._output_parser.outcome(exit_, self._output.stderr_tail)
        exited = AgentExited(exit_.code, outcome.result, self._exhaustion.explain_failure(outcome))
        if self._interactive_agent is None and not will_be_followed_up(self._attempt.task, exited):
            await self._output.record_stdout(agent.render_output(self._attempt.task.manifest, outcome.result))
        self._output.close()
        self._record(exited)

    def _on_output(self, byte_count: int) -> None:
        self._last_active_at = self._clock.monotonic()
        self._progress.add_output(byte_count)

    def _on_line(self, line: bytes) -> None:
        for event in self._output_parser.parse_line(line):
            if isinstance(event, AgentReady):
                self._check_ready(event)
            else:
                self._progress.handle_agent_event(event, self._clock.monotonic())

    def _check_ready(self, ready: AgentReady) -> None:
        """Release model requests if the agent has the requested tools and MCP servers; else fail the attempt."""
        redaction = self._attempt.redaction
        redact = redaction.redact_text if redaction is not None else str
        failure = self._attempt.dependencies.agent.check_ready(self._attempt.task.manifest, ready, redact)
        if failure is not None:
            self._record(AttemptFailed(failure))
        else:
            self._gateway.release_model_requests()

    def _on_gateway_event(self, event: Usage | EgressDenied | ErrorReported | BudgetExhausted | KeyRejected) -> None:
        """Record an event of the gateway, which cannot handle errors: `_watch_event_recording` raises them."""
        try:
            if isinstance(event, BudgetExhausted):
                self._record_failure(FailureCode.BUDGET_EXCEEDED, event.message)
            elif isinstance(event, KeyRejected):
                self._record_failure(FailureCode.AGENT_FAILED, event.message)
            else:
                self._record(event)
        except Exception as error:
            if not self._event_recording_failure.done():
                self._event_recording_failure.set_exception(error)
        if isinstance(event, Usage):
            self._progress.add_usage(event)

    async def _watch_event_recording(self) -> None:
        await self._event_recording_failure

    async def _open_gateway(self) -> None:
        """Open the gateway only after AgentStarted is durable, so every model request belongs to a recorded agent."""
        await self._attempt.recorder.wait_until_written()
        command = self._launch_spec.command
        variables = without_secrets(command.environment, self._attempt.secrets)
        self._terminals.enable(self._sandbox, variables, command.directory)
        await self._serve_gateway()

    async def _serve_gateway(self) -> None:
        try:
            await self._gateway.serve(self._sandbox.listeners)
        except Exception as error:
            self._record_failure(
                FailureCode.SANDBOX_LOST, f"The sandbox's gateway failed ({type(error).__name__}); submit again."
            )

    async def _record_progress(self) -> None:
        while True:
            await asyncio.sleep(URGENT_INTERVAL_SECONDS)
            self._progress.set_denied_count(self._gateway.denied_count)
            self._progress.record_if_due(self._clock.monotonic())

    async def _record_metrics(self) -> None:
        sampler = MetricsSampler(self._attempt.task.manifest.vm.memory_bytes)
        while True:
            stats = await self._sandbox.stats()
            self._exhaustion.update(stats)
            self._record(sampler.sample(stats, self._exhaustion.disk_usage, self._clock.monotonic()))
            await asyncio.sleep(METRICS_INTERVAL_SECONDS)

    async def _watch_timeouts(self) -> None:
        """Enforce timeouts by the monotonic clock. A hang is silence without model requests and viewers."""
        deadline = self._clock.monotonic() + remaining_seconds(self._attempt.task, self._clock)
        while True:
            now = self._clock.monotonic()
            if self._gateway.requests_in_flight or self._terminals.has_agent_clients:
                self._last_active_at = now
            silence_end = self._last_active_at + self._lifecycle.hang_timeout_seconds
            if now >= deadline:
                self._record_failure(
                    FailureCode.TIMEOUT,
                    f"The agent was still working after {self._lifecycle.timeout}; raise lifecycle.timeout.",
                )
                return
            if now >= silence_end:
                silence = self._lifecycle.hang_timeout
                self._record_failure(
                    FailureCode.HANG,
                    f"The agent produced no output for {silence}; raise lifecycle.hang_timeout or retry.",
                )
                return
            await asyncio.sleep(min(deadline - now, silence_end - now, 1.0))

    async def _watch_disk(self) -> None:
        """End the agent, without a grace period, once a disk without an enforced size is full or cannot be measured."""
        failure = await self._exhaustion.watch_disk(self._clock)
        self._record_failure(failure.code, failure.message)
        await self._kill()

    async def _watch_kernel_usage(self) -> None:
        """Kill a sandbox that exceeds a limit on kernel objects and buffers."""
        failure = await self._exhaustion.watch_kernel_usage(self._sandbox)
        self._record_failure(failure.code, failure.message)
        await self._kill()

    async def _stop_on_signal(self) -> None:
        await self._stop_signal.requested.wait()
        if not self._stop_signal.is_forced:
            await (
                self._interactive_agent.hang_up() if self._interactive_agent else self._sandbox.signal(signal.SIGTERM)
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_signal.forced.wait(), TERM_GRACE_SECONDS)
        await self._kill()

    async def _kill(self) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sandbox.kill(), KILL_SECONDS)
        finally:
            self._killed.set()

    async def _drain_output(self, output_readers: list["asyncio.Task[None]"]) -> None:
        missing = await self._wait_for_output(output_readers)
        done, late = await asyncio.wait(output_readers, timeout=0)
        for reader in late:
            reader.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        if late:
            self._record(Gap(0, 0, f"The end of the output is missing: {missing} after the agent's end."))
        for reader in done:
            reader.result()

    async def _wait_for_output(self, output_readers: list["asyncio.Task[None]"]) -> str:
        """Drain the output pipes; return the reason if draining stopped early.

        A stall of the host counts as one check, so output that is ready after it is not lost.

        Output that waits for the CPU budget is not silence.
        """
        check_seconds = OUTPUT_DRAIN_SECONDS / _DRAIN_CHECKS
        silent_checks = 0
        for _ in range(math.ceil(OUTPUT_DRAIN_SECONDS_MAX / check_seconds)):
            moved_bytes = self._output.processed_bytes
            _, late = await asyncio.wait(output_readers, timeout=check_seconds)
            is_silent = self._output.processed_bytes == moved_bytes and not self._output_queue.is_waiting
            silent_checks = silent_checks + 1 if is_silent else 0
            if not late or silent_checks == _DRAIN_CHECKS:
                return f"nothing was received for {OUTPUT_DRAIN_SECONDS:g} s"
        return f"it did not end within {OUTPUT_DRAIN_SECONDS_MAX:g} s"

    def _record_failure(self, code: FailureCode, message: str) -> None:
        self._record(AttemptFailed(Failure(code, message)))


def _gateway_rules(task: Task) -> GatewayRules:
    """Hold model requests only if there is something to check before the first one."""
    manifest, claude = task.manifest, task.manifest.claude
    return GatewayRules(
        egress=egress_rules(manifest.vm),
        budget=remaining_budget(task),
        hold_model_requests=claude.headless and (claude.allowed_tools is not None or claude.mcp_config is not None),
    )


def _is_rendered(manifest: Manifest) -> bool:
    return manifest.claude.output_format != "stream-json"


@contextlib.asynccontextmanager
async def _background_jobs() -> AsyncIterator[list["asyncio.Task[None]"]]:
    """Cancel and await the tasks in the list when the block ends; raise the first error among them."""
    tasks: list[asyncio.Task[None]] = []
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
