"""Test doubles for a runner's dependencies. A script defines the agent's output and exit."""

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from doubles.manifests import manifest
from sandbox.agents.claude_code.agent import ClaudeCode
from sandbox.bootstrap.clock import SystemClock
from sandbox.bootstrap.runner import RunnerParts, build_finisher, build_runner, create_recorder
from sandbox.disks.commands import remove_trees
from sandbox.disks.directory_disk import DirectoryDisk
from sandbox.interfaces.agent import AgentLaunchSpec, AgentOutcome, AgentReady, ParsedToolCallEnd
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.runtime import Command, ExitStatus, SandboxHandle, Stats
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.interfaces.workspace import PatchResult
from sandbox.journal.journals import FileJournals
from sandbox.model.artifacts import Artifact
from sandbox.model.events import AgentMessage, AgentResult, AttemptStarted, Output, TaskSubmitted, ToolCallStarted
from sandbox.model.failure import AttemptError, Failure, FailureCode
from sandbox.model.resources import DiskSpace, Watermark
from sandbox.runner.attempt_context import AttemptContext, read_records
from sandbox.runner.attempt_recorder import HostDiskSpace
from sandbox.runner.control_socket import record_cancel
from sandbox.runner.terminals import TerminalServer
from sandbox.secrets.redaction.redactor import SecretRedactor

ATTEMPT_ID = "abcdefghijkl"
BASE_COMMIT = "c0ffee" + "0" * 34
BOOT_ID = "this-boot"


@dataclass
class AttemptScript:
    """The scripted behavior of an attempt's agent, sandbox and gateway.

    runs_until_signal: the agent runs until it gets a signal. ignores_term: SIGTERM does not end the agent.
    survives_kill: SIGKILL does not end the agent.
    events_when_serving: the events that the gateway reports when it starts to serve.
    The gateway sets `gateway_rules`, `report_to_runner` (the callback that receives its events) and `redact` (the
    function that redacts names) when it is created, and `is_gateway_serving` when it starts to serve.
    """

    stdout: bytes = b'{"type":"result"}\n'
    stderr: bytes = b""
    exit: ExitStatus = field(default_factory=lambda: ExitStatus(0))
    runs_until_signal: bool = False
    ignores_term: bool = False
    survives_kill: bool = False
    is_gateway_serving: bool = False
    report_to_runner: Callable | None = None
    events_when_serving: tuple = ()
    stage_error: AttemptError | None = None
    create_error: AttemptError | None = None
    patch_error: AttemptError | None = None
    destroy_error: AttemptError | None = None
    unfreed_bytes: int = 0
    stage_seconds: float = 0.0
    patch_seconds: float = 0.0
    patch_incomplete_reason: str | None = None
    patch_content: bytes = b""
    changed_files_seconds: float = 0.0
    gateway_rules: object = None
    redact: Callable[[str], str] = str
    start_check_failure: Failure | None = None
    has_session: bool = True
    session: bytes | None = None
    recorded_prepare_arguments: tuple = ()
    recorded_staged_patches: list[bytes] = field(default_factory=list)
    exceeded_limit: str = ""
    files_to_collect: dict[str, bytes] = field(default_factory=lambda: {"report.md": b"# report\n"})
    recorded_destroyed_disks: list = field(default_factory=list)
    recorded_calls: list[str] = field(default_factory=list)


class ScriptedSandbox:
    def __init__(self, handle, script):
        self.handle, self.listeners, self.slow_reason, self._script = handle, None, None, script
        self._done = asyncio.Event()
        self._exit = script.exit
        self._readers = []

    async def start(self, command):
        self._script.recorded_calls.append("start")
        self._readers = [asyncio.StreamReader(), asyncio.StreamReader()]
        for reader, data in zip(self._readers, (self._script.stdout, self._script.stderr), strict=True):
            reader.feed_data(data)
        if not self._script.runs_until_signal:
            self._done.set()
        return tuple(self._readers)

    async def open_terminal(self, command, size):
        return ScriptedTerminal(self, self._readers[0])

    async def signal(self, signal_number):
        self._script.recorded_calls.append(f"signal {signal.Signals(signal_number).name}")
        if not self._script.ignores_term:
            self._exit = ExitStatus(128 + signal_number)
            self._done.set()

    async def kill(self):
        self._script.recorded_calls.append("kill")
        if not self._done.is_set() and not self._script.survives_kill:
            self._exit = ExitStatus(137)
            self._done.set()
        for reader in self._readers:
            if not reader.at_eof():
                reader.feed_eof()

    async def wait(self):
        await self._done.wait()
        return self._exit

    async def stats(self):
        return Stats(cpu_seconds=1.0, memory_bytes=4096, processes=2)

    async def wait_for_exceeded_limit(self):
        while not self._script.exceeded_limit:
            await asyncio.sleep(0.005)
        return self._script.exceeded_limit


class ScriptedTerminal:
    """A terminal that shows the sandbox's stdout, and ends when the sandbox ends."""

    def __init__(self, sandbox, output):
        self._sandbox, self.output = sandbox, output

    async def resize(self, size):
        pass

    async def hang_up(self):
        await self._sandbox.signal(signal.SIGHUP)

    async def wait(self):
        return await self._sandbox.wait()


class ScriptedRuntime:
    name = "scripted"
    tier = "none"

    def __init__(self, script):
        self._script = script

    def prepare(self, attempt_id):
        return SandboxHandle("scripted", attempt_id, {"uid": "4711"})

    async def create(self, handle, spec):
        if self._script.create_error:
            raise self._script.create_error
        self._script.recorded_calls.append("create")
        return ScriptedSandbox(handle, self._script)

    async def destroy(self, handle, disk):
        self._script.recorded_calls.append("destroy")
        self._script.recorded_destroyed_disks.append(disk)
        if self._script.destroy_error:
            raise self._script.destroy_error

    def unfreed_bytes(self, attempt_id):
        return self._script.unfreed_bytes if "destroy" in self._script.recorded_calls else 0


class ScriptedGateway:
    requests_in_flight = 0
    denied_count = 0

    def __init__(self, script):
        self._script = script

    def create(self, upstream, gateway_key, report, rules, redact=str):
        self._script.report_to_runner = report
        self._script.gateway_rules = rules
        self._script.redact = redact
        return self

    def release_model_requests(self):
        self._script.recorded_calls.append("release model")

    async def serve(self, listeners):
        self._script.is_gateway_serving = True
        for event in self._script.events_when_serving:
            self._script.report_to_runner(event)
        await asyncio.Event().wait()


class ScriptedReady(AgentReady, frozen=True):
    failure: Failure | None

    def find_failure(self, manifest, redact):
        return self.failure


class ScriptedAgentDriver:
    """Lines `+Tool` and `-Tool` on stdout start and end a tool call; `!` means that the agent is ready.

    A line `<text` is a message. Its text is written backwards, so redaction does not find a secret in the line.
    """

    gateway_key_prefix = "key-"

    def __init__(self, script):
        self._script = script

    def has_session(self, home, session_id):
        return self._script.has_session

    def read_session(self, home, session_id, bytes_max):
        content = self._script.session
        return content if content is not None and len(content) <= bytes_max else None

    def prepare(self, manifest, *, session_id, gateway_key, secrets, resumes=False, session=None):
        self._script.recorded_calls += ["resume"] if resumes else []
        self._script.recorded_prepare_arguments = (manifest.agent.prompt, session_id, session)
        return AgentLaunchSpec(
            Command(["agent"], secrets, "/workspace"),
            session_id,
            programs={},
            git_author="Author",
            home_files={".claude/settings.json": b"{}"},
            hold_model_requests=manifest.agent.settings["allowed_tools"] is not None,
        )

    def check_interactive_exit(self, exit_status):
        return self.outcome(exit_status, b"").failure

    def render_output(self, manifest, result):
        return b"rendered\n" if manifest.agent.has_rendered_stdout else b""

    def create_parser(self, session_id):
        return self

    def parse_line(self, line):
        tool = line[1:].strip().decode(errors="replace")
        match line[:1]:
            case b"+":
                return [ToolCallStarted(tool, tool)]
            case b"-":
                return [ParsedToolCallEnd(tool, tool, is_error=False)]
            case b"<":
                return [AgentMessage(tool[::-1])]
            case b"$":
                return [AgentResult(cost_usd=float(tool))]
            case b"!":
                return [ScriptedReady(self._script.start_check_failure)]
        return None

    def outcome(self, exit_status, stderr_tail):
        if exit_status.code == 0:
            return AgentOutcome({"is_error": False}, None)
        return AgentOutcome(None, Failure(FailureCode.AGENT_FAILED, f"exit {exit_status.code}: {stderr_tail.decode()}"))


class ScriptedWorkspaces:
    def __init__(self, script):
        self._script = script

    async def stage(self, repository, attempt_dir, confine, disk_bytes, patches=()):
        self._script.recorded_staged_patches = [path.read_bytes() for path in patches]
        await asyncio.sleep(self._script.stage_seconds)
        if self._script.stage_error:
            raise self._script.stage_error
        (attempt_dir / "disk/workspace").mkdir(parents=True)
        (attempt_dir / "repository.git").mkdir()
        return BASE_COMMIT

    async def write_patch(self, attempt_dir, base_commit, target, confine, detect_secret):
        if self._script.patch_error:
            raise self._script.patch_error
        target.write_bytes(b"diff --git a/a b/a\n")
        await asyncio.sleep(self._script.patch_seconds)
        return PatchResult(self._script.patch_incomplete_reason, detect_secret([self._script.patch_content]))

    async def write_changed_files_archive(self, attempt_dir, base_commit, target, confine):
        target.write_bytes(b"tar")
        await asyncio.sleep(self._script.changed_files_seconds)

    async def collect(self, workspace, patterns, target, taken_names):
        for name, content in self._script.files_to_collect.items():
            (target / name).write_bytes(content)
            yield Artifact(name, name, len(content), "text/markdown", "sha256:0")


class ScriptedImages:
    def __init__(self, script):
        self._script = script

    def acquire(self, image):
        self._script.recorded_calls.append(f"hold {image.name}")


class FakeDiskReserve:
    is_allocated, release_count = False, 0

    def __init__(self):
        self.on_released = lambda: None

    def allocate(self):
        self.is_allocated = True

    def release(self):
        was_allocated, self.is_allocated = self.is_allocated, False
        self.release_count += was_allocated
        self.on_released()
        return was_allocated


class AttemptHarness:
    """One submitted task with its attempt, and the parts of its runner or finisher."""

    def __init__(self, data_dir, script, *, secrets=None, boot_id=BOOT_ID, parent=None, **sections):
        self.script = script
        self.journals = FileJournals(data_dir)
        self.writer = self.journals.create("task-1")
        self.space, self.reserve = DiskSpace(100, 100), FakeDiskReserve()
        clock = SystemClock()
        self.parts = RunnerParts(
            data_dir=data_dir,
            disk=DirectoryDisk(TaskLayout(data_dir, "task-1").attempt(ATTEMPT_ID)),
            remove_paths=remove_trees,
            image_locks=ScriptedImages(script),
            journals=self.journals,
            runtime=ScriptedRuntime(script),
            workspaces=ScriptedWorkspaces(script),
            disk_space=HostDiskSpace(lambda: self.space, Watermark(10, 1000), clock),
            reserve=self.reserve,
            clock=clock,
            boot_id=BOOT_ID,
            redactor=SecretRedactor(secrets) if secrets else None,
        )
        self.agent, self.gateways = ScriptedAgentDriver(script), ScriptedGateway(script)
        self.recorder = self.make_recorder(None)
        self.recorder.record(TaskSubmitted("task-1", manifest(**sections), parent=parent))
        self.recorder.record(AttemptStarted(ATTEMPT_ID, "scripted", "here", boot_id))
        self.attempt = AttemptContext(
            ATTEMPT_ID,
            data_dir,
            self.recorder,
            secrets or {},
            self.parts.redactor,
            ModelUpstream("http://model", api_key="k"),
            keeps_session=True,
        )
        self.attempt.layout.root.mkdir(parents=True)
        self.terminals = TerminalServer(self.parts.redactor, self.parts.throttle.queue())

    def make_recorder(self, task):
        """Return a recorder that another runner uses to continue this task."""
        return create_recorder(self.parts, self.writer, task)

    async def run(self, attempt=None):
        """Run the attempt to its end."""
        runner = build_runner(
            attempt or self.attempt, self.parts, ClaudeCode(), self.agent, self.gateways, self.terminals
        )
        await runner.run()

    async def finish(self, attempt=None):
        """End the attempt as a finisher does."""
        await build_finisher(attempt or self.attempt, self.parts, self.agent).finish()

    def cancel(self, request):
        return record_cancel(self.recorder, request)

    @property
    def task(self):
        return self.journals.replay("task-1").task

    @property
    def states(self):
        return [str(entry.state) for entry in self.task.history]

    @property
    def artifacts(self):
        return {artifact.name for artifact in self.task.artifacts}

    def outputs(self, stream=None):
        return [e.data for e in self.events(Output) if stream in (None, e.stream)]

    def events(self, kind):
        return [r.event for r in read_records(self.journals, "task-1") if isinstance(r.event, kind)]

    async def wait_for_state(self, state):
        while self.recorder.task.state is not state:
            await asyncio.sleep(0.005)
