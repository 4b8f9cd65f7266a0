"""What a task keeps from attempt to attempt: its time, its costs, its history, and why each attempt ended."""

import dataclasses
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from sandbox.model import events as e
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import Artifact
from sandbox.model.manifest.schema import Claude, Lifecycle, Manifest, Metadata, Repository
from sandbox.model.retry import next_retry
from sandbox.model.state_machine import (
    AdvanceResult,
    FinishTask,
    IllegalEventError,
    StopAttempt,
    advance,
    final_state,
    will_retry,
)
from sandbox.model.task import AgentStartTime, StateHistoryEntry, Task, TotalUsage
from sandbox.model.task_state import TaskState

BEGAN = datetime(2026, 1, 29, 10, 0, tzinfo=UTC)
MANIFEST = Manifest(
    version="1",
    kind="Task",
    metadata=Metadata(name="x"),
    repository=Repository(url="https://git.example/r", branch="main"),
    claude=Claude(prompt="x"),
)
PREPARED = e.WorkspacePrepared("0123456789abcdef")
CREATED = e.SandboxCreated("sandbox-abcdefgh2345", "namespaces", "host")
LOST = Failure(FailureCode.RUNNER_LOST, "gone")
BROKEN = Failure(FailureCode.AGENT_FAILED, "it failed")
SUCCESS = e.AgentExited(0, {"is_error": False})
ENDED, FINISHED = e.AttemptEnded(), e.TaskFinished()


def attempt(number: int = 1, **fields: object) -> e.AttemptStarted:
    return e.AttemptStarted(f"abcdefgh234{number}", "bubblewrap", f"host-{number}", f"boot-{number}", **fields)


def agent(seconds: float = 50.0) -> e.AgentStarted:
    return e.AgentStarted("6a204bd8-9a83-4d2a-b0c5-0123456789ab", seconds)


def failed(failure: Failure = LOST) -> e.AttemptFailed:
    return e.AttemptFailed(failure)


def exited(failure: Failure | None = BROKEN, code: int | None = 1) -> e.AgentExited:
    return e.AgentExited(code, failure=failure)


def running(number: int = 1, seconds: float = 50.0) -> tuple[e.Event, ...]:
    return attempt(number), PREPARED, CREATED, agent(seconds)


def life(*events: e.Event, **lifecycle: object) -> list[AdvanceResult]:
    manifest = dataclasses.replace(MANIFEST, lifecycle=Lifecycle(**lifecycle))
    steps: list[AdvanceResult] = []
    for number, event in enumerate((e.TaskSubmitted("t", manifest, e.Idempotency("k", "d")), *events), 1):
        before = steps[-1].task if steps else None
        steps.append(advance(before, event, seq=number, at=BEGAN + timedelta(seconds=number)))
    return steps


def end(*events: e.Event, **lifecycle: object) -> Task:
    return life(*events, **lifecycle)[-1].task


def at(second: int) -> datetime:
    return BEGAN + timedelta(seconds=second)


# Time


def test_the_time_of_a_task_goes_on_with_each_attempt_and_does_not_begin_again():
    """`lifecycle.timeout` counts from the first agent on, however many follow."""
    first = AgentStartTime(50.0, "boot-1")
    task = end(*running(), retries=2)
    assert task.beginning == first
    for number in (2, 3):
        task = end(*running(), exited(), ENDED, *running(number, seconds=900.0), retries=2)
        assert task.beginning == first
        assert task.attempt.boot_id == f"boot-{number}"


def test_no_time_has_begun_before_the_first_agent():
    assert end(*running()[:3]).beginning is None
    task = end(*running()[:3], failed(), ENDED, *running(2, seconds=70.0))
    assert task.beginning == AgentStartTime(70.0, "boot-2")


def test_each_attempt_has_its_own_begin_and_end():
    task = end(*running(), exited(), ENDED, *running(2), retries=1)
    [first] = task.past_attempts
    assert (first.started_at, first.ended_at) == (at(2), at(7))
    assert (task.attempt.started_at, task.attempt.ended_at) == (at(8), None)


# Where it stands


def test_a_submitted_task_waits_and_has_its_key():
    [step] = life()
    task = step.task
    assert (task.id, task.state, task.state_message, task.last_seq) == ("t", "pending", "Waiting to be started", 1)
    assert (task.history, task.idempotency) == ((StateHistoryEntry(TaskState.PENDING, at(1)),), e.Idempotency("k", "d"))
    assert (task.attempts, task.past_attempts, task.spent) == (0, (), TotalUsage())
    assert step.transition == e.Transition(None, TaskState.PENDING, "Waiting to be started")
    assert step.effects == ()


def test_each_step_says_what_happens_now():
    messages = [step.task.state_message for step in life(*running(), SUCCESS, FINISHED)]
    assert messages == [
        "Waiting to be started",
        "Cloning https://git.example/r (main)",
        "Making the sandbox for commit 0123456789ab",
        "The sandbox answers",
        "Claude Code is working",
        "Collecting artifacts",
        "Claude Code finished its work",
    ]
    assert [step.transition.message for step in life(*running(), SUCCESS, FINISHED)] == messages


def test_an_attempt_has_all_that_is_known_of_it():
    found = end(*running(), exited(code=7), ENDED, *running(2), retries=1)
    [first] = found.past_attempts
    for number, one in ((1, first), (2, found.attempt)):
        assert (one.id, one.runtime, one.host) == (f"abcdefgh234{number}", "bubblewrap", f"host-{number}")
        assert (one.number, one.boot_id, one.resumes) == (number, f"boot-{number}", False)
        assert (one.vm_name, one.tier, one.image) == (CREATED.vm_name, "namespaces", "host")
        assert (one.base_commit, one.session_id) == (PREPARED.base_commit, agent().session_id)
    assert (first.failure, first.exit_code, first.follow_up) == (BROKEN, 7, e.RetryKind.RETRY)
    assert (found.attempt.failure, found.attempt.exit_code, found.attempt.follow_up) == (None, None, None)
    assert found.attempts == 2


def test_later_attempts_are_told_by_their_number_until_the_end():
    again = [attempt(2), PREPARED, CREATED, agent(), exited(None), FINISHED]
    steps = life(*running(), exited(), ENDED, *again, retries=1)
    assert [step.task.state_message for step in steps[6:]] == [
        "Attempt 1 ended with agent_failed; another one follows in 2 s",
        "Attempt 2: Cloning https://git.example/r (main)",
        "Attempt 2: Making the sandbox for commit 0123456789ab",
        "Attempt 2: The sandbox answers",
        "Attempt 2: Claude Code is working",
        "Attempt 2: Collecting artifacts",
        "Claude Code finished its work",
    ]
    assert [step.transition is None for step in steps[5:]] == [True, True, *[True] * 4, False, False]
    assert [entry.state for entry in steps[-1].task.history] == [
        *("pending", "staging", "provisioning", "ready", "running", "completing", "completed"),
    ]


def test_an_attempt_that_resumes_takes_the_disk_over():
    task = end(*running(), exited(LOST), ENDED, attempt(2, resumes=True), resume=True)
    assert task.attempt.resumes
    assert task.state_message == "Attempt 2: Taking the disk over"
    lost = end(attempt(), failed(), ENDED)
    assert lost.state_message == "Attempt 1 ended with runner_lost; another one follows"


def test_the_next_attempt_begins_without_what_the_last_one_left():
    task = end(*running(), exited(BROKEN, 7), ENDED, retries=1)
    assert (task.failure, task.exit_code, task.result, task.agent_has_exited) == (None, None, None, False)
    lost = end(*running(), e.AgentExited(3, {"is_error": True}, failure=BROKEN), ENDED, attempt(2), retries=1)
    assert (lost.failure, lost.exit_code, lost.result, lost.agent_has_exited) == (None, None, None, False)


def test_what_was_forgone_for_one_attempt_may_follow_the_next():
    forgone = e.RetrySkipped(e.RetryKind.RESUME, "no session")
    events = (*running(), exited(LOST), forgone)
    assert end(*events, retries=2, resume=True).forgone == (e.RetryKind.RESUME,)
    assert next_retry(end(*events, retries=2, resume=True)) is e.RetryKind.RETRY
    again = end(*events, ENDED, *running(2), exited(LOST), retries=2, resume=True)
    assert (again.forgone, next_retry(again)) == ((), e.RetryKind.RESUME)
    twice = end(*events, e.RetrySkipped(e.RetryKind.RETRY, "no"), retries=2, resume=True)
    assert twice.forgone == (e.RetryKind.RESUME, e.RetryKind.RETRY)


# What it costs


def test_costs_add_up_to_a_billionth_of_a_dollar():
    task = end(*running(), *[e.Usage("m", 1, 2, 4, 8, 0.1)] * 3)
    assert task.spent == TotalUsage(39, 6, 0.3)
    small = end(*running(), *[e.Usage("m", 0, 0, cost_usd=0.000_000_001_4)] * 2)
    assert small.spent.usd == 0.000_000_002
    assert end(*running(), e.Usage("m", 5, 5), e.Usage("m", 1, 1, cost_usd=0.5)).spent == TotalUsage(6, 6, 0.5)


# Ends


def test_a_task_is_collected_once_its_agent_is_gone_for_good():
    steps = life(*running(), SUCCESS)
    assert steps[-1].transition == e.Transition(TaskState.RUNNING, TaskState.COMPLETING, "Collecting artifacts")
    assert end(*running(), e.CancelRequested()).state is TaskState.RUNNING
    assert end(*running(), failed(BROKEN)).state is TaskState.RUNNING
    followed = end(*running(), exited(), retries=1)
    assert followed.state is TaskState.RUNNING


def test_a_task_that_ran_is_collected_when_its_next_attempt_ends_before_its_agent_begins():
    again = (*running(), exited(), ENDED, attempt(2))
    assert end(*again, e.CancelRequested(), retries=1).state is TaskState.COMPLETING
    assert end(*again, failed(Failure(FailureCode.CLONE_FAILED, "no")), retries=1).state is TaskState.COMPLETING
    assert end(*again, failed(), retries=1).state is TaskState.RUNNING, "another one follows"


@pytest.mark.parametrize("retries", [0, 1])
def test_an_outcome_is_kept_with_its_failure_and_its_counters(retries):
    progress = e.Progress(turns=2, current_tool="Bash")
    task = end(*running(), e.Usage("m", 9, 1, cost_usd=0.5), progress, exited(BROKEN, 7), retries=retries)
    assert (task.agent_has_exited, task.exit_code, task.failure) == (True, 7, BROKEN)
    assert (task.progress.turns, task.progress.current_tool, task.progress.cost_usd) == (2, None, 0.5)
    assert end(*running(), e.Progress(turns=3, current_tool="Bash")).progress.current_tool == "Bash"


def test_a_failure_of_an_attempt_whose_agent_has_exited_ends_nothing():
    assert life(*running(), SUCCESS, failed())[-1].effects == ()
    assert life(*running(), failed())[-1].effects == (StopAttempt(),)
    assert life(failed())[-1].effects == (FinishTask(),)
    assert [life(*running()[:begun], failed())[-1].effects for begun in (1, 2, 3)] == [(StopAttempt(),)] * 3
    assert [step.effects for step in life(*running(), SUCCESS, FINISHED)] == [()] * 7


@pytest.mark.parametrize("force", [True, False])
def test_a_wish_to_cancel_says_how_the_attempt_ends(force):
    steps = life(*running(), e.CancelRequested("a", force=force))
    assert steps[-1].effects == (StopAttempt(force=force),)
    assert steps[-1].task.cancel == e.CancelRequested("a", force)
    assert life(e.CancelRequested("a", force=force))[-1].effects == (FinishTask(),)
    assert final_state(steps[-1].task) == (TaskState.CANCELLED, "Cancelled: a")
    assert final_state(end(*running(), e.CancelRequested())) == (TaskState.CANCELLED, "Cancelled")


def test_a_wish_counts_while_another_attempt_would_follow_the_exit():
    steps = life(*running(), exited(), e.CancelRequested("a"), retries=1)
    assert steps[-1].task.cancel == e.CancelRequested("a")
    assert steps[-1].effects == (StopAttempt(),)
    late = life(*running(), exited(), e.CancelRequested("a"))
    assert (late[-1].task.cancel, late[-1].effects) == (None, ())


def test_final_states_are_told_with_their_reason():
    assert final_state(end(*running(), SUCCESS)) == (TaskState.COMPLETED, "Claude Code finished its work")
    assert final_state(end(*running(), exited(BROKEN))) == (TaskState.FAILED, "it failed")
    kept = end(*running(), exited(BROKEN), failure_action="preserve")
    assert final_state(kept) == (TaskState.FAILED_PRESERVED, "it failed")
    for events in ((), running()[:1], running()):
        with pytest.raises(IllegalEventError):
            final_state(end(*events))


def test_whether_an_end_is_followed_is_asked_without_ending_anything():
    task = end(*running(), retries=1)
    kept = msgspec.json.encode(task)
    assert (will_retry(task, exited()), will_retry(task, exited(None))) == (True, False)
    assert msgspec.json.encode(task) == kept
    with pytest.raises(IllegalEventError):
        will_retry(end(*running()[:2]), exited())


# What cannot happen


@pytest.mark.parametrize(
    "events",
    [
        (e.CancelRequested(), attempt()),
        (failed(), attempt()),
        (*running(), attempt(2)),
        (*running(), exited(), attempt(2)),
        (*running(), exited(), ENDED, e.CancelRequested(), attempt(2)),
        (ENDED,),
        (attempt(), ENDED),
        (*running(), ENDED),
        (*running(), SUCCESS, ENDED),
        (*running(), exited(), ENDED, ENDED),
        (*running(), exited(), ENDED, PREPARED),
        (*running(), exited(), ENDED, CREATED),
        (*running(), exited(), ENDED, agent()),
        (*running(), exited(), ENDED, exited()),
        (attempt(), CREATED),
        (attempt(), PREPARED, agent()),
        (attempt(), PREPARED, CREATED, exited()),
        (attempt(), PREPARED, PREPARED),
    ],
)
def test_no_step_of_an_attempt_is_left_out_or_made_twice(events):
    before = end(*events[:-1], retries=1)
    with pytest.raises(IllegalEventError):
        advance(before, events[-1], seq=99, at=BEGAN)


@pytest.mark.parametrize(
    "event",
    [
        e.Output.from_bytes("stdout", b"x"),
        e.ToolCall("Bash", "toolu_1", 5),
        e.Metrics(12.5),
        e.EgressDenied("h", 443, "no"),
        e.Gap(1, 2, "full"),
        e.ErrorReported("x", "y"),
    ],
)
def test_what_is_only_noted_changes_nothing_but_the_number_of_the_last_record(event):
    before = end(*running())
    step = advance(before, event, seq=42, at=BEGAN)
    assert (step.transition, step.effects) == (None, ())
    assert step.task == msgspec.structs.replace(before, last_seq=42)


def test_artifacts_are_added():
    one, two = (Artifact(name, name, 1, "text/plain", "sha256:" + "0" * 64) for name in "ab")
    assert end(*running(), e.ArtifactCollected(one), e.ArtifactCollected(two)).artifacts == (one, two)
