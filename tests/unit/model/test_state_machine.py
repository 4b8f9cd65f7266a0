"""A task's life: whatever happens in whatever order, it keeps to the graph and comes to an end."""

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sandbox.model import events as e
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import Artifact
from sandbox.model.limits import ATTEMPTS_MAX, RESUMES_MAX, RETRY_BACKOFF_SECONDS_MAX
from sandbox.model.manifest.schema import Claude, Lifecycle, Manifest, Metadata, Repository
from sandbox.model.retry import LOST_CODES, RETRIABLE_CODES, backoff_seconds, next_retry
from sandbox.model.state_machine import (
    AdvanceResult,
    FinishTask,
    IllegalEventError,
    StopAttempt,
    advance,
    final_state,
    will_retry,
)
from sandbox.model.task import Task
from sandbox.model.task_state import ALLOWED_TRANSITIONS, TERMINAL_STATES, TaskState

MANIFEST = Manifest(
    version="1",
    kind="Task",
    metadata=Metadata(name="x"),
    repository=Repository(url="https://git.example/r", branch="main"),
    claude=Claude(prompt="x"),
)
BEGAN = datetime(2026, 1, 29, 10, 0, tzinfo=UTC)

SUBMITTED = e.TaskSubmitted("t", MANIFEST)
ATTEMPT = e.AttemptStarted("abcdefgh2345", "bubblewrap", "here")
PREPARED = e.WorkspacePrepared("0" * 40)
CREATED = e.SandboxCreated("sandbox-abcdefgh2345", "namespaces", "host")
STARTED = e.AgentStarted("6a204bd8-9a83-4d2a-b0c5-0123456789ab")
SUCCESS = e.AgentExited(0, {"is_error": False})
FINISHED = e.TaskFinished()
ENDED = e.AttemptEnded()
TO_RUNNING = (SUBMITTED, ATTEMPT, PREPARED, CREATED, STARTED)


def failed(code: FailureCode = FailureCode.CLONE_FAILED) -> e.AttemptFailed:
    return e.AttemptFailed(Failure(code, f"because of {code}"))


def life(*events: e.Event) -> list[AdvanceResult]:
    steps: list[AdvanceResult] = []
    for number, event in enumerate(events, 1):
        before = steps[-1].task if steps else None
        steps.append(advance(before, event, seq=number, at=BEGAN + timedelta(seconds=number)))
    return steps


def states(*events: e.Event) -> list[TaskState]:
    return [step.transition.new_state for step in life(*events) if step.transition]


def end(*events: e.Event) -> Task:
    return life(*events)[-1].task


def test_the_good_life():
    assert states(*TO_RUNNING, SUCCESS, FINISHED) == [
        "pending", "staging", "provisioning", "ready", "running", "completing", "completed",
    ]  # fmt: skip


def test_a_task_remembers_when_it_entered_each_state_and_what_it_ran_in():
    task = end(*TO_RUNNING, SUCCESS, FINISHED)
    assert [entry.at - BEGAN for entry in task.history] == [timedelta(seconds=n) for n in range(1, 8)]
    assert (task.created_at, task.started_at, task.finished_at) == tuple(
        BEGAN + timedelta(seconds=n) for n in (1, 5, 7)
    )
    assert task.attempt is not None
    assert (task.attempt.vm_name, task.attempt.base_commit) == (CREATED.vm_name, PREPARED.base_commit)
    assert (task.attempt.tier, task.attempt.image, task.attempt.session_id) == (
        "namespaces",
        "host",
        STARTED.session_id,
    )
    assert (task.exit_code, task.result, task.last_seq) == (0, {"is_error": False}, 7)


@pytest.mark.parametrize("begun", range(1, 5))
def test_what_fails_before_the_agent_works_fails_the_task_at_once(begun):
    steps = life(*TO_RUNNING[:begun], failed(), FINISHED)
    assert steps[-1].task.state is TaskState.FAILED
    assert steps[-1].task.state_message == "because of clone_failed"
    assert steps[-2].effects == ((FinishTask(),) if begun == 1 else (StopAttempt(),))


@pytest.mark.parametrize("begun", range(1, 5))
def test_what_is_cancelled_before_the_agent_works_is_cancelled_at_once(begun):
    steps = life(*TO_RUNNING[:begun], e.CancelRequested("not needed"), FINISHED)
    assert steps[-1].task.state is TaskState.CANCELLED
    assert steps[-1].task.state_message == "Cancelled: not needed"
    assert steps[-2].effects == ((FinishTask(),) if begun == 1 else (StopAttempt(),))


@pytest.mark.parametrize("wish", [e.CancelRequested(), failed(FailureCode.TIMEOUT)])
def test_a_running_task_passes_completing_whatever_ends_it(wish):
    last = TaskState.CANCELLED if isinstance(wish, e.CancelRequested) else TaskState.FAILED
    exited = e.AgentExited(143, failure=Failure(FailureCode.AGENT_FAILED, "killed"))
    assert states(*TO_RUNNING, wish, exited, FINISHED)[-2:] == [TaskState.COMPLETING, last]


def test_a_journal_of_an_earlier_version_that_began_anew_while_it_cloned_is_still_read():
    again = e.AttemptStarted("bcdefghi2345", "bubblewrap", "here")
    assert states(SUBMITTED, ATTEMPT, again, PREPARED) == ["pending", "staging", "provisioning"]
    task = end(SUBMITTED, ATTEMPT, again)
    assert (task.attempts, task.attempt.id) == (2, again.attempt_id)


@pytest.mark.parametrize("before", [(PREPARED,), (PREPARED, CREATED, STARTED), (failed(),), (e.CancelRequested(),)])
def test_no_attempt_follows_one_that_was_not_cleared_away(before):
    with pytest.raises(IllegalEventError):
        life(SUBMITTED, ATTEMPT, *before, ATTEMPT)


def test_a_cancellation_before_the_outcome_wins_over_a_success():
    assert end(*TO_RUNNING, e.CancelRequested(), SUCCESS, FINISHED).state is TaskState.CANCELLED


def test_a_cancellation_after_the_outcome_changes_nothing():
    steps = life(*TO_RUNNING, SUCCESS, e.CancelRequested("too late"), FINISHED)
    assert steps[-2].effects == ()
    assert steps[-1].task.cancel is None
    assert steps[-1].task.state is TaskState.COMPLETED


def test_a_second_wish_may_hurry_but_not_slow_down_and_keeps_the_first_reason():
    steps = life(*TO_RUNNING, e.CancelRequested("a"), e.CancelRequested("b", force=True), e.CancelRequested("c"))
    assert [step.effects for step in steps[-3:]] == [
        (StopAttempt(force=False),), (StopAttempt(force=True),), (StopAttempt(force=True),),
    ]  # fmt: skip
    assert steps[-1].task.cancel == e.CancelRequested("a", force=True)


def test_the_first_failure_is_the_one_that_is_told():
    exited = e.AgentExited(143, failure=Failure(FailureCode.AGENT_FAILED, "killed"))
    task = end(*TO_RUNNING, failed(FailureCode.TIMEOUT), failed(FailureCode.HANG), exited, FINISHED)
    assert task.failure is not None
    assert task.failure.code == "timeout"


@pytest.mark.parametrize("code", [0, 1, None])
def test_no_exit_code_makes_a_success_of_an_outcome_with_a_failure(code):
    exited = e.AgentExited(code, failure=Failure(FailureCode.AGENT_NO_RESULT, "no result"))
    assert end(*TO_RUNNING, exited, FINISHED).state is TaskState.FAILED


def test_artifacts_that_cannot_be_collected_fail_a_success_and_end_nothing_more():
    steps = life(*TO_RUNNING, SUCCESS, failed(FailureCode.COLLECT_FAILED), FINISHED)
    assert steps[-1].task.state is TaskState.FAILED
    assert steps[-2].effects == ()


def preserving(*events: e.Event) -> Task:
    manifest = dataclasses.replace(MANIFEST, lifecycle=Lifecycle(failure_action="preserve"))
    return end(e.TaskSubmitted("t", manifest), *events)


@pytest.mark.parametrize("begun", range(1, 6))
def test_a_failure_is_preserved_on_wish_as_soon_as_there_is_a_sandbox(begun):
    has_sandbox = CREATED in TO_RUNNING[1:begun]
    exited = (SUCCESS,) if STARTED in TO_RUNNING[1:begun] else ()
    task = preserving(*TO_RUNNING[1:begun], failed(), *exited, FINISHED)
    assert task.state is (TaskState.FAILED_PRESERVED if has_sandbox else TaskState.FAILED)
    assert task.state_message == "because of clone_failed"
    assert end(*TO_RUNNING[:begun], failed(), *exited, FINISHED).state is TaskState.FAILED


def test_only_a_failure_is_preserved():
    assert preserving(*TO_RUNNING[1:], SUCCESS, FINISHED).state is TaskState.COMPLETED
    assert preserving(*TO_RUNNING[1:], e.CancelRequested(), SUCCESS, FINISHED).state is TaskState.CANCELLED


@pytest.mark.parametrize("begun", range(1, 6))
def test_what_nothing_has_ended_has_no_final_state_yet(begun):
    with pytest.raises(IllegalEventError):
        final_state(end(*TO_RUNNING[:begun]))
    assert final_state(end(*TO_RUNNING[:begun], failed()))[0] is TaskState.FAILED


def test_an_artifact_collected_again_replaces_the_first_one():
    first = Artifact("a.md", "a.md", 1, "text/markdown", "sha256:" + "0" * 64)
    again = Artifact("a.md", "a.md", 2, "text/markdown", "sha256:" + "1" * 64)
    other = Artifact("b.md", "b.md", 2, "text/markdown", "sha256:" + "2" * 64)
    task = end(*TO_RUNNING, SUCCESS, *(e.ArtifactCollected(one) for one in (first, other, again)))
    assert task.artifacts == (other, again)


def test_artifacts_of_before_stay_as_they_are_whatever_is_collected_after_them():
    one, two, three = (Artifact(name, name, 1, "text/plain", "sha256:" + "0" * 64) for name in "abc")
    before = end(*TO_RUNNING, e.ArtifactCollected(one))
    ways = [advance(before, e.ArtifactCollected(each), seq=99, at=before.created_at).task for each in (two, three, one)]
    assert [task.artifacts for task in ways] == [(one, two), (one, three), (one,)]
    assert before.artifacts == (one,)
    read = msgspec.json.decode(msgspec.json.encode(ways[0]), type=type(before))
    assert advance(read, e.ArtifactCollected(one), seq=100, at=before.created_at).task.artifacts == (two, one)


class CountedName(str):
    """A name that counts how often it is compared with another one."""

    __slots__ = ()
    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        CountedName.compared += 1
        return str.__eq__(self, other)

    def __ne__(self, other):
        return not self == other


def test_a_further_artifact_is_not_compared_with_all_that_were_collected():
    task, count = end(*TO_RUNNING), 500
    for size in (1, 2):
        for number in range(count):
            artifact = Artifact(CountedName(f"{number}.md"), "a.md", size, "text/markdown", "sha256:" + "0" * 64)
            task = advance(task, e.ArtifactCollected(artifact), seq=9, at=task.created_at).task
    assert [artifact.size_bytes for artifact in task.artifacts] == [2] * count
    assert CountedName.compared < 10 * count


@pytest.mark.parametrize(
    "events",
    [
        (ATTEMPT,),
        (SUBMITTED, SUBMITTED),
        (SUBMITTED, PREPARED),
        (SUBMITTED, FINISHED),
        (SUBMITTED, STARTED),
        (SUBMITTED, ATTEMPT, FINISHED),
        (SUBMITTED, ATTEMPT, SUCCESS),
        (*TO_RUNNING, FINISHED),
        (*TO_RUNNING, failed(), FINISHED),
        (*TO_RUNNING, e.CancelRequested(), FINISHED),
        (*TO_RUNNING, SUCCESS, SUCCESS),
        (*TO_RUNNING, SUCCESS, FINISHED, FINISHED),
        (*TO_RUNNING, SUCCESS, FINISHED, e.CancelRequested()),
        (*TO_RUNNING, SUCCESS, FINISHED, e.Output.from_bytes("stdout", b"x")),
    ],
)
def test_what_cannot_happen_is_refused(events):
    life(*events[:-1])
    with pytest.raises(IllegalEventError) as caught:
        life(*events)
    assert caught.value.code == "illegal_event"


FAILURES = st.builds(Failure, st.sampled_from(FailureCode), st.text(max_size=5))
ARTIFACTS = st.builds(
    Artifact, st.sampled_from(["a", "b"]), st.just("a"), st.integers(0, 9), st.just("text/plain"), st.just("sha256:0")
)
EVENTS: st.SearchStrategy[e.Event] = st.one_of(
    st.just(SUBMITTED),
    st.just(ATTEMPT),
    st.just(PREPARED),
    st.just(CREATED),
    st.just(STARTED),
    st.just(FINISHED),
    st.just(ENDED),
    st.builds(e.RetrySkipped, st.sampled_from(e.RetryKind), st.just("would not go")),
    st.builds(e.CancelRequested, st.sampled_from(["", "a", "b"]), st.booleans()),
    st.builds(e.AttemptFailed, FAILURES),
    st.builds(e.AgentExited, st.sampled_from([0, 1, 143, None]), st.none(), st.none() | FAILURES),
    st.builds(e.ArtifactCollected, ARTIFACTS),
    st.builds(e.Progress, turns=st.integers(0, 9)),
    st.sampled_from(
        [
            e.Output.from_bytes("stdout", b"x"),
            e.ToolCall("Bash", "toolu_1", 5),
            e.Usage("m", 1, 2),
            e.Metrics(12.5, 1, 2),
            e.EgressDenied("git.example", 443, "not allowed"),
            e.Gap(0, 0, "full"),
            e.ErrorReported("x", "y"),
        ]
    ),
)
NEXT_STEP: dict[TaskState, e.Event] = {
    TaskState.PENDING: ATTEMPT,
    TaskState.STAGING: PREPARED,
    TaskState.PROVISIONING: CREATED,
    TaskState.READY: STARTED,
}


class AnyLife(RuleBasedStateMachine):
    """Any events in any order, with a plain account of what must come of them."""

    def __init__(self) -> None:
        super().__init__()
        self.task: Task | None = None
        self.submission = SUBMITTED
        self.seq = 0
        self.begun: list[str] = []
        self.cancelled = False
        self.first_failure: Failure | None = None
        self.outcome: e.AgentExited | None = None

    @initialize(is_submitted=st.booleans(), retries=st.sampled_from([0, 0, 1, 3]), resume=st.booleans())
    def begin(self, is_submitted: bool, retries: int, resume: bool) -> None:
        lifecycle = Lifecycle(retries=retries, resume=resume)
        self.submission = e.TaskSubmitted("t", dataclasses.replace(MANIFEST, lifecycle=lifecycle))
        if is_submitted:
            self.happen(self.submission)

    @rule(event=EVENTS)
    def anything_happens(self, event: e.Event) -> None:
        self.happen(event)

    @precondition(lambda self: self.task is not None and self.task.attempt_state in NEXT_STEP)
    @rule()
    def the_next_step_succeeds(self) -> None:
        assert self.task is not None
        self.happen(NEXT_STEP[self.task.attempt_state])

    @precondition(lambda self: self.task is not None and self.task.attempt_state in NEXT_STEP)
    @rule(code=st.sampled_from(sorted(LOST_CODES)))
    def the_machine_loses_it(self, code: FailureCode) -> None:
        self.happen(failed(code))

    @precondition(lambda self: self.task is not None and self.task.attempt_state is TaskState.RUNNING)
    @rule(code=st.sampled_from(sorted(RETRIABLE_CODES)))
    def the_agent_fails(self, code: FailureCode) -> None:
        self.happen(e.AgentExited(1, failure=Failure(code, "it failed")))

    @precondition(lambda self: self.task is not None and next_retry(self.task) is not None)
    @rule()
    def the_next_attempt_begins(self) -> None:
        self.happen(ENDED)
        self.happen(ATTEMPT)

    def happen(self, event: e.Event) -> None:
        before = self.task
        kept = msgspec.json.encode(before)
        try:
            step = advance(before, event, seq=self.seq + 1, at=BEGAN + timedelta(seconds=self.seq + 1))
        except IllegalEventError:
            assert msgspec.json.encode(before) == kept
            return
        assert msgspec.json.encode(before) == kept
        self.seq += 1
        self.check_step(before, step)
        self.keep_account(event)
        self.task = step.task
        self.check_end()

    def check_step(self, before: Task | None, step: AdvanceResult) -> None:
        assert step.task.last_seq == self.seq
        state_before = before.state if before else None
        assert state_before is None or not state_before.is_terminal
        if step.transition is None:
            assert step.task.state is state_before
            return
        assert step.transition.previous_state is state_before
        assert step.transition.new_state is step.task.state
        assert step.transition.message == step.task.state_message
        assert (
            step.task.state is TaskState.PENDING
            if before is None
            else step.task.state in ALLOWED_TRANSITIONS[before.state]
        )
        if before is not None and step.task.state is TaskState.COMPLETING:
            assert next_retry(step.task) is None

    def keep_account(self, event: e.Event) -> None:
        if isinstance(event, e.CancelRequested) and (self.outcome is None or self.is_followed):
            self.cancelled = True
        if isinstance(event, e.AgentStarted):
            self.begun.append("agent")
        if isinstance(event, e.AttemptEnded):
            assert self.task is not None
            self.begun.append(str(next_retry(self.task)))
            self.first_failure = self.outcome = None
        if isinstance(event, e.AttemptFailed | e.AgentExited):
            self.first_failure = self.first_failure or event.failure
        if isinstance(event, e.AgentExited):
            self.outcome = event

    @property
    def is_followed(self) -> bool:
        return self.task is not None and next_retry(self.task) is not None

    def check_end(self) -> None:
        if self.task is None or not self.task.state.is_terminal:
            return
        if self.cancelled:
            assert self.task.state is TaskState.CANCELLED
        elif self.first_failure is not None:
            assert self.task.state is TaskState.FAILED
            assert self.task.state_message == self.first_failure.message
        else:
            assert self.task.state is TaskState.COMPLETED
            assert self.outcome is not None

    @invariant()
    def the_account_agrees(self) -> None:
        if self.task is None:
            return
        assert self.task.failure == self.first_failure
        assert (self.task.cancel is not None) == self.cancelled
        assert self.task.agent_has_exited == (self.outcome is not None)
        assert self.task.history[-1].state is self.task.state
        assert [
            later.state in ALLOWED_TRANSITIONS[entry.state]
            for entry, later in zip(self.task.history, self.task.history[1:], strict=False)
        ].count(False) == 0

    @invariant()
    def an_agent_begins_once_and_again_only_where_the_manifest_says_so(self) -> None:
        lifecycle = self.submission.manifest.lifecycle
        assert self.begun.count("retry") <= lifecycle.retries
        assert self.begun.count("resume") <= (RESUMES_MAX if lifecycle.resume else 0)
        agents = self.begun.count("agent")
        assert agents <= 1 + self.begun.count("retry") + self.begun.count("resume")
        row = 0
        for word in self.begun:
            row = row + 1 if word == "again" else 0
            assert row < ATTEMPTS_MAX

    @invariant()
    def there_is_a_way_out(self) -> None:
        if self.task is None or self.task.state.is_terminal:
            return
        for wish in (e.CancelRequested(), failed(FailureCode.RUNNER_LOST)):
            task = advance(self.task, wish, seq=self.task.last_seq + 1, at=BEGAN).task
            ending: list[Any] = []
            if task.attempt_state is TaskState.RUNNING:
                ending.append(e.AgentExited(None, failure=Failure(FailureCode.RUNNER_LOST, "gone")))
            ending += [e.RetrySkipped(one, "enough") for one in e.RetryKind]
            for event in (*ending, FINISHED):
                task = advance(task, event, seq=task.last_seq + 1, at=BEGAN).task
            assert task.state.is_terminal


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_the_graph_ends_in_terminal_states_only():
    assert {state for state in TaskState if not ALLOWED_TRANSITIONS[state]} == TERMINAL_STATES
    assert set(ALLOWED_TRANSITIONS) == set(TaskState)


def test_every_kind_of_event_was_tried():
    tried = {type(event) for event in (SUBMITTED, ATTEMPT, PREPARED, CREATED, STARTED, FINISHED)}
    tried |= {
        e.AttemptEnded,
        e.RetrySkipped,
        e.CancelRequested,
        e.AttemptFailed,
        e.AgentExited,
        e.ArtifactCollected,
        e.Progress,
    }
    tried |= {e.Output, e.ToolCall, e.Usage, e.Metrics, e.EgressDenied, e.Gap, e.ErrorReported}
    assert tried == set(e.Event.__args__)


def carrying(lifecycle: Lifecycle, *events: e.Event) -> list[AdvanceResult]:
    return life(e.TaskSubmitted("t", dataclasses.replace(MANIFEST, lifecycle=lifecycle)), *events)


def changes(steps: list[AdvanceResult]) -> list[TaskState]:
    return [step.transition.new_state for step in steps if step.transition]


TO_READY = (ATTEMPT, PREPARED, CREATED)
AGENT_FAILED = e.AgentExited(1, failure=Failure(FailureCode.AGENT_FAILED, "it failed"))
AGENT_LOST = e.AgentExited(None, failure=Failure(FailureCode.RUNNER_LOST, "gone"))
AGAIN = e.AttemptStarted("bcdefghi2345", "bubblewrap", "here", number=2)


@pytest.mark.parametrize("come_to", range(1, 4))
@pytest.mark.parametrize("code", sorted(LOST_CODES))
def test_what_the_machine_loses_before_the_agent_begins_is_made_again(come_to, code):
    rest = (PREPARED, CREATED, STARTED, SUCCESS, FINISHED)
    steps = carrying(Lifecycle(), *TO_READY[:come_to], failed(code), ENDED, AGAIN, *rest)
    assert changes(steps) == changes(life(*TO_RUNNING, SUCCESS, FINISHED))
    task = steps[-1].task
    assert (task.failure, task.attempts, task.attempt.number) == (None, 2, 2)
    [lost] = task.past_attempts
    assert (lost.failure.code, lost.follow_up, lost.ended_at is not None) == (code, "again", True)


def test_losses_before_the_agent_begins_are_bounded_in_a_row():
    lost = failed(FailureCode.RUNNER_LOST)
    steps = carrying(Lifecycle(), ATTEMPT, *(lost, ENDED, AGAIN) * (ATTEMPTS_MAX - 1), lost)
    assert next_retry(steps[-1].task) is None
    with pytest.raises(IllegalEventError):
        advance(steps[-1].task, ENDED, seq=99, at=BEGAN)


@pytest.mark.parametrize(
    "code",
    [FailureCode.CLONE_FAILED, FailureCode.PROVISION_FAILED, FailureCode.SECRET_UNAVAILABLE, FailureCode.STAGE_TIMEOUT],
)
def test_what_would_fail_again_is_not_made_again(code):
    assert next_retry(carrying(Lifecycle(retries=3), ATTEMPT, failed(code))[-1].task) is None


def test_a_clone_that_broke_on_the_way_is_made_again_after_a_pause():
    broke = e.AttemptFailed(Failure(FailureCode.CLONE_FAILED, "the connection broke", is_transient=True))
    steps = carrying(Lifecycle(), ATTEMPT, broke, ENDED, AGAIN, broke, ENDED)
    assert [backoff_seconds(steps[index].task) for index in (3, 6)] == [2.0, 4.0]
    assert steps[3].task.state_message == "Attempt 1 ended with clone_failed; another one follows in 2 s"


@pytest.mark.parametrize("code", sorted(RETRIABLE_CODES))
def test_an_agent_that_has_begun_is_run_again_only_where_the_manifest_says_so(code):
    exited = e.AgentExited(1, failure=Failure(code, "no"))
    assert next_retry(carrying(Lifecycle(), *TO_READY, STARTED, exited)[-1].task) is None
    assert next_retry(carrying(Lifecycle(retries=1), *TO_READY, STARTED, exited)[-1].task) == "retry"


@pytest.mark.parametrize("code", [FailureCode.BUDGET_EXCEEDED, FailureCode.TIMEOUT, FailureCode.TOOL_UNKNOWN])
def test_a_bound_of_the_task_is_no_reason_to_try_again(code):
    steps = carrying(Lifecycle(retries=3), *TO_READY, STARTED, failed(code), AGENT_FAILED)
    assert steps[-1].transition.new_state is TaskState.COMPLETING


def test_a_task_that_is_retried_stays_running_until_its_last_attempt_has_ended():
    once = (*TO_READY, STARTED, AGENT_FAILED)
    steps = carrying(Lifecycle(retries=2), *once, ENDED, *once, ENDED, *TO_READY, STARTED, SUCCESS, FINISHED)
    assert changes(steps) == changes(life(*TO_RUNNING, SUCCESS, FINISHED))
    task = steps[-1].task
    assert [attempt.failure.code for attempt in task.past_attempts] == ["agent_failed", "agent_failed"]
    assert (task.attempts, task.exit_code, task.failure) == (3, 0, None)
    assert task.started_at == BEGAN + timedelta(seconds=5)
    messages = [step.task.state_message for step in steps]
    assert "Attempt 1 ended with agent_failed; another one follows in 2 s" in messages
    assert "Attempt 2: Claude Code is working" in messages


def test_an_agent_on_a_terminal_is_told_with_the_way_to_it():
    claude = dataclasses.replace(MANIFEST.claude, headless=False)
    submitted = e.TaskSubmitted("t", dataclasses.replace(MANIFEST, claude=claude))
    task = life(submitted, *TO_RUNNING[1:])[-1].task
    assert task.state_message == "Claude Code is at its terminal: sandbox task attach t"


def test_when_no_retry_is_left_the_last_failure_is_the_tasks():
    steps = carrying(Lifecycle(retries=1), *TO_READY, STARTED, AGENT_LOST, ENDED, *TO_READY, STARTED, AGENT_FAILED)
    assert steps[-1].transition.new_state is TaskState.COMPLETING
    assert steps[-1].task.failure.code == "agent_failed"


def test_pauses_between_retries_double_up_to_a_bound():
    events: list[e.Event] = []
    pauses = []
    for _ in range(12):
        events += [*TO_READY, STARTED, AGENT_FAILED, ENDED]
        pauses.append(backoff_seconds(carrying(Lifecycle(retries=20), *events)[-1].task))
    assert pauses[:4] == [2.0, 4.0, 8.0, 16.0]
    assert pauses[-1] == RETRY_BACKOFF_SECONDS_MAX


def test_a_lost_agent_is_resumed_first_and_retried_when_it_was_resumed_often_enough():
    once = (*TO_READY, STARTED, AGENT_LOST)
    follow_ups = []
    events: list[e.Event] = []
    for _ in range(RESUMES_MAX + 2):
        events += once
        follow_ups.append(next_retry(carrying(Lifecycle(retries=1, resume=True), *events)[-1].task))
        events.append(ENDED)
    assert follow_ups == [*["resume"] * RESUMES_MAX, "retry", None]


@pytest.mark.parametrize("end", [e.CancelRequested("enough"), failed(FailureCode.SECRET_UNAVAILABLE)])
def test_nobody_waits_for_an_attempt_that_will_not_follow(end):
    steps = carrying(Lifecycle(retries=1), *TO_READY, STARTED, AGENT_FAILED, ENDED, end)
    assert [backoff_seconds(step.task) for step in steps[-2:]] == [2.0, 0.0]
    assert "another one follows in 2 s" in steps[-2].task.state_message


def test_an_agent_that_failed_by_itself_is_not_resumed():
    assert next_retry(carrying(Lifecycle(resume=True), *TO_READY, STARTED, AGENT_FAILED)[-1].task) is None


def test_a_resumed_attempt_that_is_lost_before_its_agent_goes_on_keeps_the_disk():
    resumed = e.AttemptStarted("bcdefghi2345", "bubblewrap", "here", number=2, resumes=True)
    steps = carrying(
        Lifecycle(resume=True), *TO_READY, STARTED, AGENT_LOST, ENDED, resumed, failed(FailureCode.RUNNER_LOST)
    )
    assert next_retry(steps[-1].task) == "again"
    assert steps[-1].task.attempt.transfers_disk(e.RetryKind.RESTART)
    assert steps[-1].task.base_commit == PREPARED.base_commit


@pytest.mark.parametrize("after", range(3))
def test_a_wish_to_cancel_ends_a_task_between_and_in_attempts(after):
    events = (*TO_READY, STARTED, AGENT_FAILED, ENDED, AGAIN)[: 5 + after]
    steps = carrying(Lifecycle(retries=1), *events, e.CancelRequested("enough"), FINISHED)
    assert [step.transition.new_state for step in steps[-2:]] == [TaskState.COMPLETING, TaskState.CANCELLED]


def test_what_is_forgone_does_not_follow():
    exited = carrying(Lifecycle(retries=1, resume=True), *TO_READY, STARTED, AGENT_LOST)[-1].task
    no_resume = advance(exited, e.RetrySkipped(e.RetryKind.RESUME, "no session"), seq=7, at=BEGAN)
    assert (next_retry(no_resume.task), no_resume.transition) == ("retry", None)
    nothing = advance(no_resume.task, e.RetrySkipped(e.RetryKind.RETRY, "would not go"), seq=8, at=BEGAN)
    assert nothing.transition.new_state is TaskState.COMPLETING


def test_whether_an_end_is_followed_is_known_before_it_is_written_down():
    running = carrying(Lifecycle(retries=1), *TO_READY, STARTED)[-1].task
    assert will_retry(running, AGENT_FAILED)
    assert not will_retry(running, SUCCESS)


def test_what_the_model_used_adds_up_over_attempts():
    usage = e.Usage("m", 1, 2, cache_read_tokens=3, cache_write_tokens=4, cost_usd=0.25)
    task = carrying(Lifecycle(retries=1), *TO_READY, STARTED, usage, AGENT_FAILED, ENDED, ATTEMPT, usage)[-1].task
    assert (task.spent.input_tokens, task.spent.output_tokens, task.spent.usd) == (16, 4, 0.5)


def test_of_an_agent_that_is_gone_every_request_is_counted_and_no_tool_is_current():
    """A runner that died had told of its last requests, and not come to counting them."""
    progress = e.Progress(turns=2, current_tool="Bash", input_tokens=60, output_tokens=10, cost_usd=0.1)
    used = e.Usage("m", 100, 20, 0, 0, 0.25)
    counted = end(*TO_RUNNING, used, progress, AGENT_LOST).progress
    assert (counted.turns, counted.current_tool) == (2, None)
    assert (counted.input_tokens, counted.output_tokens, counted.cost_usd) == (100, 20, 0.25)
