"""State that a task keeps across attempts: time, costs, history, and the end of each attempt."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from doubles.manifests import claude, encode_json
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.model.events import FollowUp
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Lifecycle, Manifest, Metadata, Repository
from sandbox.model.state_machine import (
    LOST_ARTIFACTS_CODES,
    RETRYABLE_CODES,
    AdvanceResult,
    IllegalEventError,
    StopAttempt,
    advance,
    final_state,
    next_follow_up,
    will_be_followed_up,
)
from sandbox.model.task import AgentStartTime, StateHistoryEntry, Task, TotalUsage
from sandbox.model.task_state import TaskState

START_TIME = datetime(2026, 1, 29, 10, 0, tzinfo=UTC)
MANIFEST = Manifest(
    metadata=Metadata(name="x"),
    repository=Repository(url="https://git.example/r", branch="main"),
    agent=claude(prompt="x"),
)
PREPARED = e.WorkspacePrepared("0123456789abcdef")
CREATED = e.SandboxCreated("sandbox-abcdefgh2345", "namespaces", "host")
LOST = Failure(FailureCode.RUNNER_LOST, "gone")
BROKEN = Failure(FailureCode.AGENT_FAILED, "it failed")
SUCCESS = e.AgentExited(0, {"is_error": False})
TORN_DOWN, FINISHED = e.AttemptTornDown(), e.TaskFinished()


def attempt(number: int = 1, **fields: object) -> e.AttemptStarted:
    return e.AttemptStarted(f"abcdefgh234{number}", "bubblewrap", f"host-{number}", f"boot-{number}", **fields)


def agent(seconds: float = 50.0) -> e.AgentStarted:
    return e.AgentStarted("6a204bd8-9a83-4d2a-b0c5-0123456789ab", seconds, "Claude Code")


def failed(failure: Failure = LOST) -> e.AttemptFailed:
    return e.AttemptFailed(failure)


def exited(failure: Failure | None = BROKEN, code: int | None = 1) -> e.AgentExited:
    return e.AgentExited(code, failure=failure)


def running(number: int = 1, seconds: float = 50.0) -> tuple[e.Event, ...]:
    return attempt(number), PREPARED, CREATED, agent(seconds)


def replay(*events: e.Event, **lifecycle: object) -> list[AdvanceResult]:
    manifest = MANIFEST.replace(lifecycle=Lifecycle(**lifecycle))
    results: list[AdvanceResult] = []
    for number, event in enumerate((e.TaskSubmitted("t", manifest, e.Idempotency("k", "d")), *events), 1):
        before = results[-1].task if results else None
        results.append(advance(before, event, seq=number, at=START_TIME + timedelta(seconds=number)))
    return results


def final_task(*events: e.Event, **lifecycle: object) -> Task:
    return replay(*events, **lifecycle)[-1].task


def at(second: int) -> datetime:
    return START_TIME + timedelta(seconds=second)


# Time


def test_task_starts_when_its_first_agent_starts():
    """`lifecycle.timeout` is measured from the start of the first agent."""
    first = AgentStartTime(50.0, "boot-1")
    task = final_task(*running(), retries=2)
    assert task.agent_start_time == first
    for number in (2, 3):
        task = final_task(*running(), exited(), TORN_DOWN, *running(number, seconds=900.0), retries=2)
        assert task.agent_start_time == first
        assert task.attempt.boot_id == f"boot-{number}"


def test_task_start_time_is_unset_before_the_first_agent():
    assert final_task(*running()[:3]).agent_start_time is None
    task = final_task(*running()[:3], failed(), TORN_DOWN, *running(2, seconds=70.0))
    assert task.agent_start_time == AgentStartTime(70.0, "boot-2")


def test_each_attempt_has_start_and_end_times():
    task = final_task(*running(), exited(), TORN_DOWN, *running(2), retries=1)
    [first] = task.past_attempts
    assert (first.started_at, first.ended_at) == (at(2), at(7))
    assert (task.attempt.started_at, task.attempt.ended_at) == (at(8), None)


# State and messages


def test_submitted_task_is_pending_and_has_its_idempotency_key():
    [result] = replay()
    task = result.task
    assert (task.id, task.state, task.state_message, task.last_seq) == ("t", "pending", "Waiting to be started", 1)
    assert (task.history, task.idempotency) == ((StateHistoryEntry(TaskState.PENDING, at(1)),), e.Idempotency("k", "d"))
    assert (task.attempt_count, task.past_attempts, task.spent) == (0, (), TotalUsage())
    assert result.transition == e.Transition(None, TaskState.PENDING, "Waiting to be started")
    assert result.effects == ()


def test_each_state_has_a_message():
    messages = [result.task.state_message for result in replay(*running(), SUCCESS, FINISHED)]
    assert messages == [
        "Waiting to be started",
        "Cloning https://git.example/r (main)",
        "Creating the sandbox for commit 0123456789ab",
        "The sandbox is ready",
        "Claude Code is working",
        "Collecting artifacts",
        "Claude Code finished its work",
    ]
    assert [result.transition.message for result in replay(*running(), SUCCESS, FINISHED)] == messages


def test_attempt_records_its_fields():
    task = final_task(*running(), exited(code=7), TORN_DOWN, *running(2), retries=1)
    [first] = task.past_attempts
    for number, record in ((1, first), (2, task.attempt)):
        assert (record.id, record.runtime, record.host) == (f"abcdefgh234{number}", "bubblewrap", f"host-{number}")
        assert (record.number, record.boot_id, record.resumes) == (number, f"boot-{number}", False)
        assert (record.sandbox_name, record.tier, record.image) == (CREATED.sandbox_name, "namespaces", "host")
        assert (record.base_commit, record.session_id) == (PREPARED.base_commit, agent().session_id)
    assert (first.failure, first.exit_code, first.follow_up) == (BROKEN, 7, e.FollowUp.RETRY)
    assert (task.attempt.failure, task.attempt.exit_code, task.attempt.follow_up) == (None, None, None)
    assert task.attempt_count == 2


def test_messages_of_later_attempts_have_the_attempt_number():
    second = [attempt(2), PREPARED, CREATED, agent(), exited(None), FINISHED]
    results = replay(*running(), exited(), TORN_DOWN, *second, retries=1)
    assert [result.task.state_message for result in results[6:]] == [
        "Attempt 1 ended with agent_failed; another attempt follows in 2 s",
        "Attempt 2: Cloning https://git.example/r (main)",
        "Attempt 2: Creating the sandbox for commit 0123456789ab",
        "Attempt 2: The sandbox is ready",
        "Attempt 2: Claude Code is working",
        "Attempt 2: Collecting artifacts",
        "Claude Code finished its work",
    ]
    assert [result.transition is None for result in results[5:]] == [True, True, *[True] * 4, False, False]
    assert [entry.state for entry in results[-1].task.history] == [
        *("pending", "staging", "provisioning", "ready", "running", "completing", "completed"),
    ]


def test_resuming_attempt_takes_over_the_disk():
    task = final_task(*running(), exited(LOST), TORN_DOWN, attempt(2, resumes=True), resume=True)
    assert task.attempt.resumes
    assert task.state_message == "Attempt 2: Taking over the disk"
    lost = final_task(attempt(), failed(), TORN_DOWN)
    assert lost.state_message == "Attempt 1 ended with runner_lost; another attempt follows"


def test_next_attempt_clears_the_previous_outcome():
    task = final_task(*running(), exited(BROKEN, 7), TORN_DOWN, retries=1)
    assert (task.failure, task.exit_code, task.result, task.agent_has_exited) == (None, None, None, False)
    failed_exit = e.AgentExited(3, {"is_error": True}, BROKEN, "I failed.")
    lost = final_task(*running(), failed_exit, TORN_DOWN, attempt(2), retries=1)
    assert lost.final_message is None
    assert (lost.failure, lost.exit_code, lost.result, lost.agent_has_exited) == (None, None, None, False)


def test_skipped_follow_ups_are_reset_for_the_next_attempt():
    skipped = e.FollowUpSkipped(e.FollowUp.RESUME, "no session")
    events = (*running(), exited(LOST), skipped)
    assert final_task(*events, retries=2, resume=True).skipped_follow_ups == (e.FollowUp.RESUME,)
    assert next_follow_up(final_task(*events, retries=2, resume=True)) is e.FollowUp.RETRY
    second = final_task(*events, TORN_DOWN, *running(2), exited(LOST), retries=2, resume=True)
    assert (second.skipped_follow_ups, next_follow_up(second)) == ((), e.FollowUp.RESUME)
    twice = final_task(*events, e.FollowUpSkipped(e.FollowUp.RETRY, "no"), retries=2, resume=True)
    assert twice.skipped_follow_ups == (e.FollowUp.RESUME, e.FollowUp.RETRY)


# Costs


def test_costs_are_summed_to_a_billionth_of_a_dollar():
    task = final_task(*running(), *[e.Usage("m", 1, 2, 4, 8, 0.1)] * 3)
    assert task.spent == TotalUsage(39, 6, 0.3)
    small = final_task(*running(), *[e.Usage("m", 0, 0, cost_usd=0.000_000_001_4)] * 2)
    assert small.spent.usd == 0.000_000_002
    assert final_task(*running(), e.Usage("m", 5, 5), e.Usage("m", 1, 1, cost_usd=0.5)).spent == TotalUsage(6, 6, 0.5)


# Ends


@pytest.mark.parametrize("code", sorted(LOST_ARTIFACTS_CODES))
def test_lost_results_of_an_agent_that_has_exited_are_followed_by_a_retry(code):
    """The state stays `completing`. A cancel request stops the later attempt, whose failures follow the usual rules."""
    lost = (*running(), SUCCESS, failed(Failure(code, "lost")))
    assert next_follow_up(final_task(*lost, retries=1)) is FollowUp.RETRY
    assert next_follow_up(final_task(*lost, retries=1, resume=True)) is FollowUp.RETRY
    assert next_follow_up(final_task(*lost, resume=True)) is None
    second = (*lost, TORN_DOWN, *running(2))
    task = final_task(*second, retries=1)
    assert (task.state, task.attempt_state) == (TaskState.COMPLETING, TaskState.RUNNING)
    assert next_follow_up(task) is None
    with pytest.raises(IllegalEventError):
        final_task(*second, e.TaskFinished(), retries=1)
    assert final_task(*second, SUCCESS, e.TaskFinished(), retries=1).state is TaskState.COMPLETED
    assert final_task(*second, e.CancelRequested(), exited(), e.TaskFinished(), retries=2).state is TaskState.CANCELLED
    assert next_follow_up(final_task(*second, exited(), retries=2)) is FollowUp.RETRY
    assert next_follow_up(final_task(*second, exited(), retries=1)) is None
    assert final_task(*second, exited(), e.TaskFinished(), retries=1).state is TaskState.FAILED


@pytest.mark.parametrize("code", sorted(RETRYABLE_CODES - LOST_ARTIFACTS_CODES))
def test_other_failures_after_the_exit_end_the_task(code):
    task = final_task(*running(), SUCCESS, failed(Failure(code, "no")), retries=1, resume=True)
    assert (next_follow_up(task), task.state) == (None, TaskState.COMPLETING)
    with pytest.raises(IllegalEventError):
        final_task(*running(), SUCCESS, failed(Failure(code, "no")), TORN_DOWN, retries=1, resume=True)


def test_task_is_completing_after_the_last_agent_exit():
    results = replay(*running(), SUCCESS)
    assert results[-1].transition == e.Transition(TaskState.RUNNING, TaskState.COMPLETING, "Collecting artifacts")
    assert final_task(*running(), e.CancelRequested()).state is TaskState.RUNNING
    assert final_task(*running(), failed(BROKEN)).state is TaskState.RUNNING
    retried = final_task(*running(), exited(), retries=1)
    assert retried.state is TaskState.RUNNING


def test_task_is_completing_if_a_later_attempt_ends_before_its_agent_starts():
    second = (*running(), exited(), TORN_DOWN, attempt(2))
    assert final_task(*second, e.CancelRequested(), retries=1).state is TaskState.COMPLETING
    assert final_task(*second, failed(Failure(FailureCode.CLONE_FAILED, "no")), retries=1).state is TaskState.COMPLETING
    assert final_task(*second, failed(), retries=1).state is TaskState.RUNNING, "another attempt follows"


@pytest.mark.parametrize("retries", [0, 1])
def test_failure_and_exit_code_and_progress_are_kept_after_the_agent_exit(retries):
    progress = e.Progress(turns=2, current_tool="Bash")
    task = final_task(*running(), e.Usage("m", 9, 1, cost_usd=0.5), progress, exited(BROKEN, 7), retries=retries)
    assert (task.agent_has_exited, task.exit_code, task.failure) == (True, 7, BROKEN)
    assert (task.progress.turns, task.progress.current_tool, task.progress.cost_usd) == (2, None, 0.5)
    assert final_task(*running(), e.Progress(turns=3, current_tool="Bash")).progress.current_tool == "Bash"


def test_failure_after_the_agent_exit_has_no_effects():
    assert replay(*running(), SUCCESS, failed())[-1].effects == ()
    assert replay(*running(), failed())[-1].effects == (StopAttempt(),)
    assert replay(failed())[-1].effects == ()
    assert [replay(*running()[:event_count], failed())[-1].effects for event_count in (1, 2, 3)] == [
        (StopAttempt(),)
    ] * 3
    assert [result.effects for result in replay(*running(), SUCCESS, FINISHED)] == [()] * 7


@pytest.mark.parametrize("force", [True, False])
def test_cancel_stops_the_attempt_with_the_requested_force(force):
    results = replay(*running(), e.CancelRequested("a", force=force))
    assert results[-1].effects == (StopAttempt(force=force),)
    assert results[-1].task.cancel == e.CancelRequested("a", force)
    assert replay(e.CancelRequested("a", force=force))[-1].effects == ()
    assert final_state(results[-1].task) == (TaskState.CANCELLED, "Cancelled: a")
    assert final_state(final_task(*running(), e.CancelRequested())) == (TaskState.CANCELLED, "Cancelled")


def test_cancel_after_the_exit_applies_if_a_retry_would_follow():
    results = replay(*running(), exited(), e.CancelRequested("a"), retries=1)
    assert results[-1].task.cancel == e.CancelRequested("a")
    assert results[-1].effects == (StopAttempt(),)
    cancelled_task = replay(*running(), exited(), e.CancelRequested("a"))
    assert (cancelled_task[-1].task.cancel, cancelled_task[-1].effects) == (None, ())


def test_final_state_has_a_reason():
    assert final_state(final_task(*running(), SUCCESS)) == (TaskState.COMPLETED, "Claude Code finished its work")
    assert final_state(final_task(*running(), exited(BROKEN))) == (TaskState.FAILED, "it failed")
    preserved = final_task(*running(), exited(BROKEN), failure_action="preserve")
    assert final_state(preserved) == (TaskState.FAILED_PRESERVED, "it failed")
    for events in ((), running()[:1], running()):
        with pytest.raises(IllegalEventError):
            final_state(final_task(*events))


def test_predicting_a_follow_up_does_not_change_the_task():
    task = final_task(*running(), retries=1)
    encoded = encode_json(task)
    assert (will_be_followed_up(task, exited()), will_be_followed_up(task, exited(None))) == (True, False)
    assert encode_json(task) == encoded
    with pytest.raises(IllegalEventError):
        will_be_followed_up(final_task(*running()[:2]), exited())


# Illegal events


@pytest.mark.parametrize(
    "events",
    [
        (e.CancelRequested(), attempt()),
        (failed(), attempt()),
        (*running(), attempt(2)),
        (*running(), exited(), attempt(2)),
        (*running(), exited(), TORN_DOWN, e.CancelRequested(), attempt(2)),
        (TORN_DOWN,),
        (attempt(), TORN_DOWN),
        (*running(), TORN_DOWN),
        (*running(), SUCCESS, TORN_DOWN),
        (*running(), exited(), TORN_DOWN, TORN_DOWN),
        (*running(), exited(), TORN_DOWN, PREPARED),
        (*running(), exited(), TORN_DOWN, CREATED),
        (*running(), exited(), TORN_DOWN, agent()),
        (*running(), exited(), TORN_DOWN, exited()),
        (attempt(), CREATED),
        (attempt(), PREPARED, agent()),
        (attempt(), PREPARED, CREATED, exited()),
        (attempt(), PREPARED, PREPARED),
    ],
)
def test_skipped_or_repeated_attempt_step_is_rejected(events):
    before = final_task(*events[:-1], retries=1)
    with pytest.raises(IllegalEventError):
        advance(before, events[-1], seq=99, at=START_TIME)


@pytest.mark.parametrize(
    "event",
    [
        e.Output.from_bytes("stdout", b"x"),
        e.AgentMessage("Hello."),
        e.ToolCallStarted("Bash", "toolu_1"),
        e.ToolResult("toolu_1"),
        e.AgentResult("Done."),
        e.ToolCallEnded("Bash", "toolu_1", 5),
        e.Metrics(12.5),
        e.EgressDenied("h", 443, "no"),
        e.Gap(1, 2, "full"),
        e.ErrorReported("x", "y"),
    ],
)
def test_informational_event_changes_only_last_seq(event):
    before = final_task(*running())
    result = advance(before, event, seq=42, at=START_TIME)
    assert (result.transition, result.effects) == (None, ())
    assert result.task == msgspec.structs.replace(before, last_seq=42)


def test_artifacts_are_added():
    one, two = (Artifact(name, name, 1, "text/plain", "sha256:" + "0" * 64) for name in "ab")
    assert final_task(*running(), e.ArtifactCollected(one), e.ArtifactCollected(two)).artifacts == (one, two)
