"""The guarantees for tasks when processes are killed. Each function checks one guarantee and yields its violations.

The functions do not collect evidence, so tests can pass corrupt evidence to them. `evaluate` runs all checks.
"""

import hashlib
import itertools
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sandbox.model.task_state import ALLOWED_TRANSITIONS, TaskState

STATES = ("pending", "staging", "provisioning", "ready", "running", "completing")
FINAL_STATES = {"completed", "failed", "failed_preserved", "cancelled"}
COMPLETED = ("completed", None)
LOST_RUNNER = ("failed", "runner_lost")
LOST_HOST = ("failed", "host_lost")
LOST_SANDBOX = ("failed", "sandbox_lost")
AGENT_FAILED = ("failed", "agent_failed")
KILLED_EXIT_CODE = 128 + signal.SIGKILL

ALLOWED_OUTCOMES = {
    # The runner continues without the server.
    "server": {state: {COMPLETED} for state in STATES},
    # If the agent had not started, the task is attempted again; otherwise it fails. A recorded outcome is final.
    "runner": {**{state: {COMPLETED} for state in STATES}, "running": {LOST_RUNNER}},
    "sandbox": {
        "provisioning": {COMPLETED},
        "ready": {COMPLETED},
        "running": {LOST_SANDBOX, AGENT_FAILED},
    },
    "gateway": {"ready": {COMPLETED, LOST_SANDBOX}, "running": {LOST_SANDBOX}},
}
# A runner that was killed after its sandbox may have recorded the loss of the sandbox.
ALLOWED_OUTCOMES["all"] = {**ALLOWED_OUTCOMES["runner"], "running": {LOST_RUNNER, LOST_SANDBOX}}
"""`{kill target: {state at the kill: {(state, code)}}}`: the only final states that are allowed."""

_EARLY_STATES = ("staging", "provisioning", "ready")


def _lost_worker_outcomes(*lost):
    """Return the allowed outcomes if the disk is lost, because nothing can be collected from it."""
    early = {state: {COMPLETED} for state in _EARLY_STATES}
    return {**early, "running": set(lost), "completing": {COMPLETED, *lost}}


_UNHARMED = {state: {COMPLETED} for state in STATES}
CLUSTER_OUTCOMES = {
    **{target: ALLOWED_OUTCOMES[target] for target in ("server", "runner", "sandbox", "gateway")},
    **{f"paused {target}": _UNHARMED for target in ("server", "controller", "worker", "runner", "host")},
    "paused sandbox": {state: {COMPLETED} for state in ("provisioning", "ready", "running")},
    "worker": _lost_worker_outcomes(LOST_RUNNER),
    # A controller that is killed within 5 s after it started a job may forget the job; then Slurm ends the worker.
    "controller": {"pending": {COMPLETED}, **_lost_worker_outcomes(COMPLETED, LOST_RUNNER)},
    # Slurm confirms the end of the jobs if the host was started again before Slurm noticed its loss.
    "host": _lost_worker_outcomes(LOST_RUNNER, LOST_HOST),
    "stopped worker": _lost_worker_outcomes(LOST_HOST),
    "stopped host": _lost_worker_outcomes(LOST_HOST),
    "interrupted link": _UNHARMED,
    "cut link": _lost_worker_outcomes(LOST_HOST),
}
"""The allowed outcomes on a cluster, in the same format.

`paused` and `interrupted`: for less than the lease; `stopped` and `cut`: for longer.
"""

ALLOWED_OUTCOMES |= {name: outcomes for name, outcomes in CLUSTER_OUTCOMES.items() if name not in ALLOWED_OUTCOMES}
LOST_WORKER_TARGETS = {"worker", "controller", "host", "stopped worker", "stopped host", "cut link"}
"""The targets after which the disk of the attempt may be lost."""

WRITTEN_LINES_FILE = "written.txt"
"""The file in the workspace to which the agent writes each line before printing it."""


@dataclass
class DownloadedArtifact:
    """An artifact: its metadata from the server, and the downloaded bytes."""

    name: str
    size_bytes: int
    checksum: str
    content: bytes


@dataclass
class TaskEvidence:
    """Everything known about one task.

    target: what was killed, None if nothing was. state_at_kill: the task's state according to the journal, read before
    the kill.
    records: the journal, as JSON. stdout_before: stdout that was read before the kill. patched_lines:
    WRITTEN_LINES_FILE in a clone of the base commit after `git apply`, empty if missing; None if git rejected the
    patch. agent_sessions: the session of the agent that sent each request to the model, in order of arrival.
    file_count: how many files the agent creates, each with its number as content. late_requests: how many requests of
    an agent arrived after its attempt had been given up.
    """

    task_id: str
    target: str | None
    state_at_kill: str
    status: dict
    records: list[dict]
    stdout_before: bytes = b""
    artifacts: list[DownloadedArtifact] = field(default_factory=list)
    patched_lines: bytes | None = None
    agent_sessions: list[str] = field(default_factory=list)
    retries: int = 0
    file_count: int = 0
    late_requests: int = 0

    @property
    def outcome(self):
        """The state and the error code, as reported to clients."""
        return self.status.get("state"), (self.status.get("error") or {}).get("code")

    @property
    def stdout(self):
        """Stdout in the journal."""
        return _stdout_of(self.records)

    @property
    def last_attempt_stdout(self):
        """Stdout of the last attempt. The logs of earlier agents were deleted with their workspaces."""
        starts = [n for n, record in enumerate(self.records) if record["event"]["type"] == "attempt_started"]
        return _stdout_of(self.records[starts[-1] :]) if starts else b""

    @property
    def written_lines(self):
        """The agent's log of its output, if it was collected."""
        return next((artifact.content for artifact in self.artifacts if artifact.name == WRITTEN_LINES_FILE), None)

    @property
    def agent_starts(self):
        """How many agents sent requests to the model."""
        return len(set(self.agent_sessions))

    @property
    def has_lost_disk(self):
        """Whether the task ended because its worker or its host was lost."""
        return self.target in LOST_WORKER_TARGETS and self.outcome in {LOST_RUNNER, LOST_HOST}

    @property
    def recorded_sandbox_loss(self):
        """Whether the runner recorded the loss of the sandbox."""
        exits = [record["event"] for record in self.records if record["event"]["type"] == "agent_exited"]
        return any((event.get("failure") or {}).get("code") == "sandbox_lost" for event in exits)

    @property
    def agent_was_killed(self):
        """Whether the runner recorded that the agent was killed."""
        exits = [record["event"] for record in self.records if record["event"]["type"] == "agent_exited"]
        codes = [(event.get("exit_code"), (event.get("failure") or {}).get("code")) for event in exits]
        return (KILLED_EXIT_CODE, "agent_failed") in codes

    def has_event(self, kind):
        """Return whether the journal has an event of this type."""
        return any(record["event"]["type"] == kind for record in self.records)


@dataclass
class Evidence:
    """Evidence of one round. acknowledged: task ids that got a 202; leftovers: what remains on the machine, by kind."""

    acknowledged: set[str]
    listed: list[str]
    tasks: list[TaskEvidence]
    leftovers: dict


class Violation(NamedTuple):
    """A violated guarantee. task: None if the violation concerns the whole round."""

    task: TaskEvidence | None
    message: str

    def __str__(self):
        task = self.task
        return (
            self.message if task is None else f"{task.task_id} ({task.target} in {task.state_at_kill}): {self.message}"
        )


def evaluate(evidence: Evidence) -> list[Violation]:
    """Run all checks."""
    global_checks = (check_acknowledged_tasks_exist, check_no_leftovers)
    task_checks = (
        check_journal_is_consistent,
        check_final_state,
        check_output_lines,
        check_artifacts,
        check_agent_runs_once,
        check_agents_do_not_overlap,
    )
    violations = [Violation(None, message) for check in global_checks for message in check(evidence)]
    for task in evidence.tasks:
        violations += [Violation(task, message) for check in task_checks for message in check(task)]
    return violations


def check_acknowledged_tasks_exist(evidence: Evidence) -> Iterator[str]:
    """Check that every task that got a 202 is listed exactly once."""
    for task_id in sorted(evidence.acknowledged - set(evidence.listed)):
        yield f"{task_id} was acknowledged and is missing"
    for task_id, times in Counter(evidence.listed).items():
        if times > 1:
            yield f"{task_id} is listed {times} times"


def check_no_leftovers(evidence: Evidence) -> Iterator[str]:
    """Check that no process, mount, control group, loop device, socket or file of a task remains."""
    for kind, found in evidence.leftovers.items():
        yield f"left behind, {kind}: {found}"


def check_journal_is_consistent(task: TaskEvidence) -> Iterator[str]:
    """Check that sequence numbers have no gap, epochs do not decrease, and state transitions are allowed."""
    seqs = [record["seq"] for record in task.records]
    if seqs != list(range(1, len(seqs) + 1)):
        yield f"sequence numbers are {seqs}"
    epochs = [record["epoch"] for record in task.records]
    if epochs != sorted(epochs):
        yield "a writer wrote after a later writer had started"
    states = [record["transition"]["new_state"] for record in task.records if "transition" in record]
    for before, after in itertools.pairwise(states):
        if TaskState(after) not in ALLOWED_TRANSITIONS[TaskState(before)]:
            yield f"the task went from {before} to {after}"


def check_final_state(task: TaskEvidence) -> Iterator[str]:
    """Check that only the last record has a final state.

    The state must be allowed for the kill target, and clients must receive it.
    """
    states = [record["transition"]["new_state"] for record in task.records if "transition" in record]
    ends = [state for state in states if state in FINAL_STATES]
    if len(ends) != 1 or task.records[-1].get("transition", {}).get("new_state") != ends[0]:
        yield f"the task's states are {states}"
    if states and task.status.get("state") != states[-1]:
        yield f"clients get {task.status.get('state')}, the journal has {states[-1]}"
    # If retries are left, the loss of an agent is not final.
    must_complete = task.target is None or task.retries
    allowed = {COMPLETED} if must_complete else _allowed_outcomes(task)
    if task.outcome not in allowed:
        yield f"the task ended as {task.outcome}: {task.status.get('error')}"


def _allowed_outcomes(task: TaskEvidence) -> set:
    """Return the allowed outcomes.

    If the agent's death was recorded before the runner was killed, only a failed agent is allowed.
    """
    recorded_agent_kill = task.target == "all" and task.state_at_kill == "completing" and task.agent_was_killed
    return (
        {AGENT_FAILED}
        if recorded_agent_kill
        else ALLOWED_OUTCOMES[task.target].get(_corrected_state_at_kill(task), set())
    )


def _corrected_state_at_kill(task: TaskEvidence) -> str:
    """Return the state at the kill, corrected by what the runner recorded after the end of its sandbox."""
    recorded_start = task.target == "sandbox" and task.state_at_kill == "ready" and task.has_event("agent_started")
    recorded_sandbox_loss = task.target == "all" and task.state_at_kill == "completing" and task.recorded_sandbox_loss
    return "running" if recorded_sandbox_loss or (recorded_start and task.outcome != COMPLETED) else task.state_at_kill


def check_output_lines(task: TaskEvidence) -> Iterator[str]:
    """Check that the journal has all of the agent's output, or a prefix of whole lines if the runner was killed.

    A killed agent may have logged its last line without printing it. Output that was read before the kill must remain.
    """
    printed, written = task.last_attempt_stdout, task.written_lines or b""
    if not task.stdout.startswith(task.stdout_before):
        yield "output that was read before is missing"
    if task.has_lost_disk:
        yield from _check_numbers(printed)
    elif task.outcome == LOST_RUNNER:
        if not written.startswith(printed) or (printed and not printed.endswith(b"\n")):
            yield f"{_describe_difference(printed, written)}; the journal is not a prefix of the log"
    elif task.outcome == COMPLETED or task.target not in {"sandbox", "gateway", "all"}:
        if printed != written:
            yield _describe_difference(printed, written)
    elif printed not in {written, _without_last_line(written)}:
        yield _describe_difference(printed, written)


def _check_numbers(printed):
    """Check that no numbered line is missing or repeated. There is no log of the agent to compare with."""
    lines = printed.split(b"\n")
    numbers = [int(found[1]) for line in lines if (found := re.search(rb'"line (\d+)"', line))]
    if lines[-1] or numbers != list(range(len(numbers))):
        yield f"the journal has the lines {numbers[:3]} to {numbers[-3:]}, and {len(numbers)} in all"


def check_artifacts(task: TaskEvidence) -> Iterator[str]:
    """Check that artifacts match their sizes and checksums, the patch applies, and required artifacts exist."""
    for artifact in task.artifacts:
        found = f"sha256:{hashlib.sha256(artifact.content).hexdigest()}"
        if (found, len(artifact.content)) != (artifact.checksum, artifact.size_bytes):
            yield f"{artifact.name} does not match its size or checksum"
    contents = {artifact.name: artifact.content for artifact in task.artifacts}
    if len(contents) != len(task.artifacts):
        yield f"artifacts are listed twice: {sorted(artifact.name for artifact in task.artifacts)}"
    if task.has_event("workspace_prepared") and not task.has_lost_disk:
        yield from _check_contents(task, contents)


def _check_contents(task, contents):
    for name in (f"{task.task_id}.patch", "transcript.ndjson", "metadata.json"):
        if name not in contents:
            yield f"{name} is missing"
    if task.patched_lines != (task.written_lines or b""):
        yield "the patch does not reproduce the workspace"
    if contents.get("transcript.ndjson", task.stdout) != task.stdout:
        yield "the transcript differs from the output"
    if task.outcome == COMPLETED:
        wrong = [n for n in range(task.file_count) if contents.get(f"made-{n}") != f"{n}\n".encode()]
        if wrong:
            yield f"files of the agent are missing or changed: {wrong}"


def check_agent_runs_once(task: TaskEvidence) -> Iterator[str]:
    """Check that at most one agent ran per allowed attempt, and that a completed task had an agent."""
    recorded_starts = sum(record["event"]["type"] == "agent_started" for record in task.records)
    for agent_starts, source in ((task.agent_starts, "by the model requests"), (recorded_starts, "by the journal")):
        if agent_starts > 1 + task.retries:
            yield f"the agent ran {agent_starts} times, {source}"
    if task.outcome == COMPLETED and not (task.agent_starts and recorded_starts):
        yield "the task completed without an agent"


def check_agents_do_not_overlap(task: TaskEvidence) -> Iterator[str]:
    """Check that no earlier agent sent a request to the model after the first request of a later agent."""
    runs = [session for session, _ in itertools.groupby(task.agent_sessions)]
    if len(runs) != len(set(runs)):
        yield f"the requests of {len(set(runs))} agents arrived in {len(runs)} runs"
    if task.late_requests:
        yield f"{task.late_requests} requests arrived after the attempt had been given up"


def check_received_events(expected_events: dict, received_events: dict) -> Iterator[str]:
    """Check that reconnecting clients received the whole journal: every event once, in order.

    expected_events: `{task id: events}`, from the journal; received_events: `{(client, task id): events}`.
    """
    for (source, task_id), received in received_events.items():
        expected = expected_events[task_id]
        if received != expected:
            index = next((n for n, (a, b) in enumerate(zip(received, expected, strict=False)) if a != b), None)
            position = (
                f"first at {index}: {received[index]} and {expected[index]}" if index is not None else "at the end"
            )
            counts = f"{len(received)} of {len(expected)} events"
            yield f"{source} of {task_id} received {counts}; they differ {position}"


def _stdout_of(records):
    events = (record["event"] for record in records if record["event"]["type"] == "output")
    return "".join(event["text"] for event in events if event["stream"] == "stdout").encode()


def _without_last_line(text):
    return text[: text.rstrip(b"\n").rfind(b"\n") + 1]


def _describe_difference(printed, written):
    lines = [text.count(b"\n") for text in (printed, written)]
    return f"{lines[0]} lines ({len(printed)} bytes) are journaled, {lines[1]} ({len(written)} bytes) were logged"
