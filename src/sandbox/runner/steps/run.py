"""Run: the agent works, the gateway watches, every bound is kept."""

import asyncio
import contextlib
import math
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial

from sandbox.interfaces.agent import AgentBegan, Conversation, Outcome
from sandbox.interfaces.disks import DiskUse
from sandbox.interfaces.gateway import BudgetReached, Gateway, GatewayRules, KeyRefused
from sandbox.interfaces.runtime import Exit, Sandbox, Stats
from sandbox.model.egress import egress_rules
from sandbox.model.errors import AttemptError, Failure, FailureCode
from sandbox.model.events import AgentExited, AgentStarted, AttemptFailed, EgressDenied, Gap, Metrics, Trouble, Usage
from sandbox.model.limits import (
    KILL_SECONDS,
    METRICS_INTERVAL_SECONDS,
    OUTPUT_DRAIN_SECONDS,
    OUTPUT_DRAIN_SECONDS_MAX,
    SANDBOX_START_SECONDS,
    TERM_GRACE_SECONDS,
)
from sandbox.model.manifest.schema import Manifest
from sandbox.model.state_machine import is_followed
from sandbox.model.task import Task
from sandbox.runner.agent_output import AgentOutput, OutputAllowance, output_cost_bytes, redacted_chunks
from sandbox.runner.dependencies import Attempt, EndWish
from sandbox.runner.progress import EAGER_INTERVAL_SECONDS, ProgressMeter, budget_of, remaining_seconds
from sandbox.runner.resource_exhaustion import Shortages
from sandbox.runner.steps.provision import Provisioned
from sandbox.runner.terminals import AgentSession, SharedTerminal, Terminals, begin_session, without_secrets


class MetricsSampler:
    """Turns the sandbox's counters into figures; CPU is the share of one processor since the last sample."""

    def __init__(self, memory_total_bytes: int) -> None:
        self._memory_total_bytes = memory_total_bytes
        self._last: tuple[float, float] | None = None

    def sample(self, stats: Stats, disk: DiskUse | None, monotonic: float) -> Metrics:
        """The figures at a moment."""
        return Metrics(
            cpu_percent=self._cpu_percent(stats.cpu_seconds, monotonic),
            memory_used_bytes=stats.memory_bytes,
            memory_total_bytes=self._memory_total_bytes,
            disk_used_bytes=disk.used_bytes if disk else None,
            disk_total_bytes=disk.total_bytes if disk else None,
            load_avg=round(os.getloadavg()[0], 2),
        )

    def _cpu_percent(self, cpu_seconds: float | None, monotonic: float) -> float | None:
        last, self._last = self._last, None if cpu_seconds is None else (cpu_seconds, monotonic)
        if cpu_seconds is None or last is None or monotonic <= last[1]:
            return None
        return round(max(cpu_seconds - last[0], 0.0) / (monotonic - last[1]) * 100, 1)


Helper = Callable[[], Coroutine[None, None, None]]
_DRAIN_LOOKS = 5
"""In which nothing came, until output is given up."""


async def run(attempt: Attempt, provisioned: Provisioned, wish: EndWish, terminals: Terminals) -> None:
    """From the agent's start to its recorded outcome; on return nothing runs inside any more."""
    await _Run(attempt, provisioned, wish, terminals).carry_out()


class _Run:
    def __init__(self, attempt: Attempt, provisioned: Provisioned, wish: EndWish, terminals: Terminals) -> None:
        equipment = attempt.equipment
        self._attempt = attempt
        self._clock = equipment.clock
        self._record = attempt.recorder.record
        self._sandbox: Sandbox = provisioned.sandbox
        self._start = provisioned.start
        self._wish = wish
        self._terminals = terminals
        self._session: AgentSession | None = None
        self._lifecycle = attempt.task.manifest.lifecycle
        self._conversation: Conversation = equipment.agent.conversation(provisioned.start.session_id)
        self._meter = ProgressMeter(self._record, self._clock.now, attempt.task.counted)
        self._active_at = self._clock.monotonic()
        manifest = attempt.task.manifest
        self._shortages = Shortages(manifest.vm, equipment.disks, attempt.files, self._record)
        equipment.throttle.start()
        self._output_queue = equipment.throttle.queue()
        self._output = AgentOutput(
            self._record,
            self._heard,
            self._listen,
            redaction=attempt.redaction,
            allowance=OutputAllowance(equipment.clock, output_cost_bytes(attempt.task)),
            queue=self._output_queue,
            stdout_as="transcript" if manifest.claude.headless and _is_rendered(manifest) else "stdout",
        )
        self._killed = asyncio.Event()
        self._unreported: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gateway = self._open_gateway(provisioned.task_key)

    async def carry_out(self) -> None:
        ended = Exit(None)
        async with _helpers() as helpers:
            try:
                ended = await self._work(helpers)
            finally:
                self._terminals.end_agent(ended)
        self._meter.denied(self._gateway.denials)
        self._meter.close()
        await self._conclude(ended)

    def _open_gateway(self, task_key: str) -> Gateway:
        attempt = self._attempt
        if attempt.upstream is None:
            raise AttemptError(
                FailureCode.PROVISION_FAILED, "The server has no model key; set ANTHROPIC_API_KEY and start it again."
            )
        try:
            return attempt.equipment.gateways.open(
                attempt.upstream,
                task_key,
                self._report,
                _gateway_rules(attempt.task),
                redact=attempt.redaction.redact_text if attempt.redaction is not None else str,
            )
        except ValueError as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, str(error)) from None

    async def _work(self, helpers: list["asyncio.Task[None]"]) -> Exit:
        """From the agent's start until nothing is left of it but what was read."""
        try:
            pumps = [self._guard(pump) for pump in await self._begin()]
            helpers.extend(pumps)
            self._record(AgentStarted(self._start.session_id, self._clock.monotonic()))
            for helper in (
                self._open_doors,
                self._tell_progress,
                self._tell_metrics,
                self._watch_clock,
                self._watch_disk,
                self._watch_kernel_use,
                self._watch_reports,
                self._end_on_wish,
            ):
                helpers.append(self._guard(helper))
            ended = await self._await_end()
        finally:
            self._terminals.close()
            await self._kill()
        await self._drain(pumps)
        return ended

    async def _begin(self) -> list[Helper]:
        """Start the agent; gives what takes its output.

        Runtimes bound their starts themselves; this bound is for those that do not keep their word.
        """
        output = self._output
        try:
            async with asyncio.timeout(SANDBOX_START_SECONDS):
                if not self._attempt.task.manifest.claude.headless:
                    self._session = await begin_session(self._sandbox, self._start.command)
                    chunks = redacted_chunks(self._session.terminal.output, self._attempt.redaction, self._output_queue)
                    shared = self._terminals.agent = SharedTerminal(self._session.terminal)
                    return [partial(output.take_terminal, chunks, shared.show)]
                stdout, stderr = await self._sandbox.start(self._start.command)
                return [partial(output.take_stdout, stdout), partial(output.take_stderr, stderr)]
        except TimeoutError:
            message = "The agent did not begin in its sandbox in time; submit the task again."
            raise AttemptError(FailureCode.PROVISION_FAILED, message) from None

    def _guard(self, helper: Helper) -> "asyncio.Task[None]":
        """A helper that breaks takes everything inside with it: no agent goes on without its bounds."""

        async def guarded() -> None:
            try:
                await helper()
            except Exception:
                await self._kill()
                raise

        return asyncio.create_task(guarded())

    async def _await_end(self) -> Exit:
        """How the command ended. Raises AttemptError (sandbox_lost) when it does not, KILL_SECONDS after KILL."""
        ended = asyncio.create_task((self._session or self._sandbox).wait())
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
            FailureCode.SANDBOX_LOST, "Processes of the sandbox would not die; look at the machine's log."
        )

    async def _conclude(self, ended: Exit) -> None:
        self._shortages.see(await self._sandbox.stats())
        await self._shortages.look_at_disk()
        agent = self._attempt.equipment.agent
        if self._session is not None:
            outcome = Outcome(None, agent.judge_session(ended))
        else:
            outcome = self._conversation.outcome(ended, self._output.stderr_tail)
        exited = AgentExited(ended.code, outcome.result, self._shortages.explain(outcome))
        if self._session is None and not is_followed(self._attempt.task, exited):
            await self._output.show(agent.render(self._attempt.task.manifest, outcome.result))
        self._output.close()
        self._record(exited)

    def _heard(self, byte_count: int) -> None:
        self._active_at = self._clock.monotonic()
        self._meter.output(byte_count)

    def _listen(self, line: bytes) -> None:
        for event in self._conversation.feed(line):
            if isinstance(event, AgentBegan):
                self._judge_start(event)
            else:
                self._meter.agent_event(event, self._clock.monotonic())

    def _judge_start(self, began: AgentBegan) -> None:
        """The first model request waits until the agent is known to have what was asked for, and nothing else."""
        redaction = self._attempt.redaction
        redact = redaction.redact_text if redaction is not None else str
        failure = self._attempt.equipment.agent.judge_start(self._attempt.task.manifest, began, redact)
        if failure is not None:
            self._record(AttemptFailed(failure))
        else:
            self._gateway.release_model()

    def _report(self, event: Usage | EgressDenied | Trouble | BudgetReached | KeyRefused) -> None:
        """Called by the gateway, which has nobody to tell when this fails."""
        try:
            if isinstance(event, BudgetReached):
                self._fail(FailureCode.BUDGET_EXCEEDED, event.message)
            elif isinstance(event, KeyRefused):
                self._fail(FailureCode.AGENT_FAILED, event.message)
            else:
                self._record(event)
        except Exception as error:
            if not self._unreported.done():
                self._unreported.set_exception(error)
        if isinstance(event, Usage):
            self._meter.usage(event)

    async def _watch_reports(self) -> None:
        await self._unreported

    async def _open_doors(self) -> None:
        """No earlier: an agent that is not written down on disk must not have asked the model for anything."""
        await self._attempt.recorder.settle()
        command = self._start.command
        variables = without_secrets(command.environment, self._attempt.secrets)
        self._terminals.begin(self._sandbox, variables, command.directory)
        await self._serve_gateway()

    async def _serve_gateway(self) -> None:
        try:
            await self._gateway.serve(self._sandbox.listeners)
        except Exception as error:
            self._fail(FailureCode.SANDBOX_LOST, f"The sandbox's gateway broke ({type(error).__name__}); submit again.")

    async def _tell_progress(self) -> None:
        while True:
            await asyncio.sleep(EAGER_INTERVAL_SECONDS)
            self._meter.denied(self._gateway.denials)
            self._meter.tell(self._clock.monotonic())

    async def _tell_metrics(self) -> None:
        sampler = MetricsSampler(self._attempt.task.manifest.vm.memory_bytes)
        while True:
            stats = await self._sandbox.stats()
            self._shortages.see(stats)
            self._record(sampler.sample(stats, self._shortages.disk, self._clock.monotonic()))
            await asyncio.sleep(METRICS_INTERVAL_SECONDS)

    async def _watch_clock(self) -> None:
        """Bounds are counted by the monotonic clock; a hang is silence with no model request in flight."""
        deadline = self._clock.monotonic() + remaining_seconds(self._attempt.task, self._clock)
        while True:
            now = self._clock.monotonic()
            if self._gateway.requests_in_flight or self._terminals.agent_is_attended:
                self._active_at = now
            silence_end = self._active_at + self._lifecycle.hang_timeout_seconds
            if now >= deadline:
                self._fail(
                    FailureCode.TIMEOUT,
                    f"The agent was still working after {self._lifecycle.timeout}; raise lifecycle.timeout.",
                )
                return
            if now >= silence_end:
                silence = self._lifecycle.hang_timeout
                self._fail(
                    FailureCode.HANG, f"The agent said nothing for {silence}; raise lifecycle.hang_timeout or retry."
                )
                return
            await asyncio.sleep(min(deadline - now, silence_end - now, 1.0))

    async def _watch_disk(self) -> None:
        """A disk without a bound of its own ends the agent once it is full or past looking at, without any grace."""
        failure = await self._shortages.watch_disk(self._clock)
        self._fail(failure.code, failure.message)
        await self._kill()

    async def _watch_kernel_use(self) -> None:
        """A sandbox past a bound on what the kernel holds for it is killed at once."""
        failure = await self._shortages.watch_kernel_use(self._sandbox)
        self._fail(failure.code, failure.message)
        await self._kill()

    async def _end_on_wish(self) -> None:
        await self._wish.made.wait()
        if not self._wish.is_forced:
            await (self._session.hang_up() if self._session else self._sandbox.signal(signal.SIGTERM))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wish.forced.wait(), TERM_GRACE_SECONDS)
        await self._kill()

    async def _kill(self) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sandbox.kill(), KILL_SECONDS)
        finally:
            self._killed.set()

    async def _drain(self, pumps: list["asyncio.Task[None]"]) -> None:
        missing = await self._read_on(pumps)
        done, late = await asyncio.wait(pumps, timeout=0)
        for pump in late:
            pump.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        if late:
            self._record(Gap(0, 0, f"The end of the output is missing: {missing} after the agent's end."))
        for pump in done:
            pump.result()

    async def _read_on(self, pumps: list["asyncio.Task[None]"]) -> str:
        """Until all is read; gives why not. A stall of the machine costs one look, not what is ready meanwhile.

        Output that waits for the CPU budget is not silent.
        """
        look_seconds = OUTPUT_DRAIN_SECONDS / _DRAIN_LOOKS
        silent_looks = 0
        for _ in range(math.ceil(OUTPUT_DRAIN_SECONDS_MAX / look_seconds)):
            moved_bytes = self._output.moved_bytes
            _, late = await asyncio.wait(pumps, timeout=look_seconds)
            is_silent = self._output.moved_bytes == moved_bytes and not self._output_queue.is_waiting
            silent_looks = silent_looks + 1 if is_silent else 0
            if not late or silent_looks == _DRAIN_LOOKS:
                return f"nothing of it came for {OUTPUT_DRAIN_SECONDS:g} s"
        return f"it was not over {OUTPUT_DRAIN_SECONDS_MAX:g} s"

    def _fail(self, code: FailureCode, message: str) -> None:
        self._record(AttemptFailed(Failure(code, message)))


def _gateway_rules(task: Task) -> GatewayRules:
    """The model is held back only where there is something to judge before its first request."""
    manifest, claude = task.manifest, task.manifest.claude
    return GatewayRules(
        egress=egress_rules(manifest.vm),
        budget=budget_of(task),
        holds_model=claude.headless and (claude.allowed_tools is not None or claude.mcp_config is not None),
    )


def _is_rendered(manifest: Manifest) -> bool:
    return manifest.claude.output_format != "stream-json"


@contextlib.asynccontextmanager
async def _helpers() -> AsyncIterator[list["asyncio.Task[None]"]]:
    """Tasks put into the list are ended and waited for when the block ends; the first error among them is raised."""
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
