"""For any order of events, the task state machine follows the transition graph and reaches a final state."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from doubles.manifests import claude, decode_task, encode_json
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact, DiffStatistics
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import RESUMES_MAX, RETRY_BACKOFF_SECONDS_MAX, UNSTARTED_ATTEMPTS_MAX
from sandbox.model.manifest.schema import Lifecycle, Manifest, Metadata, Repository
from sandbox.model.state_machine import (
    LOST_CODES,
    RETRYABLE_CODES,
    AdvanceResult,
    IllegalEventError,
    StopAttempt,
    advance,
    backoff_seconds,
    failure_event,
    final_state,
    next_follow_up,
    will_be_followed_up,
)
from sandbox.model.state_machine import replay as replay_record
from sandbox.model.task import Task
from sandbox.model.task_state import ALLOWED_TRANSITIONS, FINAL_STATES, TaskState

MANIFEST = Manifest(
    metadata=Metadata(name="x"),
    repository=Repository(url="https://git.example/r", branch="main"),
    agent=claude(prompt="x"),
)
START_TIME = datetime(2026, 1, 29, 10, 0, tzinfo=UTC)

SUBMITTED = e.TaskSubmitted("t", MANIFEST)
ATTEMPT = e.AttemptStarted("abcdefgh2345", "bubblewrap", "here")
PREPARED = e.WorkspacePrepared("0" * 40)
CREATED = e.SandboxCreated("sandbox-abcdefgh2345", "namespaces", "host")
STARTED = e.AgentStarted("6a204bd8-9a83-4d2a-b0c5-0123456789ab", agent="Claude Code")
SUCCESS = e.AgentExited(0, {"is_error": False}, final_message="It is done.")
FINISHED = e.TaskFinished()
TORN_DOWN = e.AttemptTornDown()
TO_RUNNING = (SUBMITTED, ATTEMPT, PREPARED, CREATED, STARTED)


def failed(code: FailureCode = FailureCode.CLONE_FAILED) -> e.AttemptFailed:
    return e.AttemptFailed(Failure(code, f"because of {code}"))


def replay(*events: e.Event) -> list[AdvanceResult]:
    results: list[AdvanceResult] = []
    for number, event in enumerate(events, 1):
        before = results[-1].task if results else None
        results.append(advance(before, event, seq=number, at=START_TIME + timedelta(seconds=number)))
    return results


def states(*events: e.Event) -> list[TaskState]:
    return [result.transition.new_state for result in replay(*events) if result.transition]


def final_task(*events: e.Event) -> Task:
    return replay(*events)[-1].task


def test_successful_task_passes_through_all_states():
    assert states(*TO_RUNNING, SUCCESS, FINISHED) == [
        "pending", "staging", "provisioning", "ready", "running", "completing", "completed",
    ]  # fmt: skip


def test_task_records_state_times_and_its_sandbox():
    task = final_task(*TO_RUNNING, SUCCESS, FINISHED)
    assert [entry.at - START_TIME for entry in task.history] == [timedelta(seconds=n) for n in range(1, 8)]
    assert (task.created_at, task.started_at, task.finished_at) == tuple(
        START_TIME + timedelta(seconds=n) for n in (1, 5, 7)
    )
    assert task.attempt is not None
    assert (task.attempt.sandbox_name, task.attempt.base_commit) == (CREATED.sandbox_name, PREPARED.base_commit)
    assert (task.attempt.tier, task.attempt.image, task.attempt.session_id) == (
        "namespaces",
        "host",
        STARTED.session_id,
    )
    assert (task.exit_code, task.result, task.final_message) == (0, {"is_error": False}, "It is done.")
    assert task.last_seq == 7


@pytest.mark.parametrize("event_count", range(1, 5))
def test_failure_before_the_agent_starts_fails_the_task(event_count):
    results = replay(*TO_RUNNING[:event_count], failed(), FINISHED)
    assert results[-1].task.state is TaskState.FAILED
    assert results[-1].task.state_message == "because of clone_failed"
    assert results[-2].effects == (() if event_count == 1 else (StopAttempt(),))


@pytest.mark.parametrize("event_count", range(1, 5))
def test_cancel_before_the_agent_starts_cancels_the_task(event_count):
    results = replay(*TO_RUNNING[:event_count], e.CancelRequested("not needed"), FINISHED)
    assert results[-1].task.state is TaskState.CANCELLED
    assert results[-1].task.state_message == "Cancelled: not needed"
    assert results[-2].effects == (() if event_count == 1 else (StopAttempt(),))


@pytest.mark.parametrize("ending", [e.CancelRequested(), failed(FailureCode.TIMEOUT)])
def test_running_task_passes_through_completing_to_a_final_state(ending):
    final = TaskState.CANCELLED if isinstance(ending, e.CancelRequested) else TaskState.FAILED
    exited = e.AgentExited(143, failure=Failure(FailureCode.AGENT_FAILED, "killed"))
    assert states(*TO_RUNNING, ending, exited, FINISHED)[-2:] == [TaskState.COMPLETING, final]


@pytest.mark.parametrize("event_count", range(1, 7))
def test_failure_event_ends_the_agent_only_while_the_agent_runs(event_count):
    task, failure = final_task(*(*TO_RUNNING, SUCCESS)[:event_count]), Failure(FailureCode.INTERNAL, "It broke.")
    event = failure_event(task, failure)
    assert event == (e.AgentExited(None, None, failure) if event_count == 5 else e.AttemptFailed(failure))
    after = advance(task, event, seq=task.last_seq + 1, at=START_TIME).task
    assert after.failure == failure


def test_journal_of_an_earlier_version_with_two_attempt_starts_during_the_clone_is_accepted():
    second_start = e.AttemptStarted("bcdefghi2345", "bubblewrap", "here")
    assert states(SUBMITTED, ATTEMPT, second_start, PREPARED) == ["pending", "staging", "provisioning"]
    task = final_task(SUBMITTED, ATTEMPT, second_start)
    assert (task.attempt_count, task.attempt.id) == (2, second_start.attempt_id)


@pytest.mark.parametrize("before", [(PREPARED,), (PREPARED, CREATED, STARTED), (failed(),), (e.CancelRequested(),)])
def test_attempt_requires_the_end_of_the_previous_attempt(before):
    with pytest.raises(IllegalEventError):
        replay(SUBMITTED, ATTEMPT, *before, ATTEMPT)


def test_cancel_before_the_agent_exit_overrides_success():
    assert final_task(*TO_RUNNING, e.CancelRequested(), SUCCESS, FINISHED).state is TaskState.CANCELLED


def test_cancel_after_the_agent_exit_is_ignored():
    results = replay(*TO_RUNNING, SUCCESS, e.CancelRequested("too late"), FINISHED)
    assert results[-2].effects == ()
    assert results[-1].task.cancel is None
    assert results[-1].task.state is TaskState.COMPLETED


def test_second_cancel_can_add_force_but_keeps_the_first_reason():
    results = replay(*TO_RUNNING, e.CancelRequested("a"), e.CancelRequested("b", force=True), e.CancelRequested("c"))
    assert [result.effects for result in results[-3:]] == [
        (StopAttempt(force=False),), (StopAttempt(force=True),), (StopAttempt(force=True),),
    ]  # fmt: skip
    assert results[-1].task.cancel == e.CancelRequested("a", force=True)


def test_task_has_the_time_of_the_first_cancel_request():
    results = replay(*TO_RUNNING, e.CancelRequested("a"), e.CancelRequested("b", force=True), SUCCESS, FINISHED)
    times = [result.task.cancel_requested_at for result in results]
    first = len(TO_RUNNING)
    assert times[first - 1] is None
    assert set(times[first:]) == {times[first]}
    assert times[first] is not None
    assert times[first] < results[-1].task.state_changed_at


def test_ignored_cancel_request_has_no_time():
    assert replay(*TO_RUNNING, SUCCESS, e.CancelRequested("too late"), FINISHED)[-1].task.cancel_requested_at is None


def test_first_failure_is_reported():
    exited = e.AgentExited(143, failure=Failure(FailureCode.AGENT_FAILED, "killed"))
    task = final_task(*TO_RUNNING, failed(FailureCode.TIMEOUT), failed(FailureCode.HANG), exited, FINISHED)
    assert task.failure is not None
    assert task.failure.code == "timeout"


@pytest.mark.parametrize("code", [0, 1, None])
def test_agent_exit_with_a_failure_fails_the_task_for_any_exit_code(code):
    exited = e.AgentExited(code, failure=Failure(FailureCode.AGENT_NO_RESULT, "no result"))
    assert final_task(*TO_RUNNING, exited, FINISHED).state is TaskState.FAILED


def test_failed_collection_fails_a_successful_task_and_has_no_effects():
    results = replay(*TO_RUNNING, SUCCESS, failed(FailureCode.COLLECT_FAILED), FINISHED)
    assert results[-1].task.state is TaskState.FAILED
    assert results[-2].effects == ()


def final_task_with_preserve(*events: e.Event) -> Task:
    manifest = MANIFEST.replace(lifecycle=Lifecycle(failure_action="preserve"))
    return final_task(e.TaskSubmitted("t", manifest), *events)


@pytest.mark.parametrize("event_count", range(1, 6))
def test_failed_task_is_preserved_if_a_sandbox_exists(event_count):
    has_sandbox = CREATED in TO_RUNNING[1:event_count]
    exited = (SUCCESS,) if STARTED in TO_RUNNING[1:event_count] else ()
    task = final_task_with_preserve(*TO_RUNNING[1:event_count], failed(), *exited, FINISHED)
    assert task.state is (TaskState.FAILED_PRESERVED if has_sandbox else TaskState.FAILED)
    assert task.state_message == "because of clone_failed"
    assert final_task(*TO_RUNNING[:event_count], failed(), *exited, FINISHED).state is TaskState.FAILED


def test_only_failed_tasks_are_preserved():
    assert final_task_with_preserve(*TO_RUNNING[1:], SUCCESS, FINISHED).state is TaskState.COMPLETED
    assert (
        final_task_with_preserve(*TO_RUNNING[1:], e.CancelRequested(), SUCCESS, FINISHED).state is TaskState.CANCELLED
    )


@pytest.mark.parametrize("event_count", range(1, 6))
def test_unfinished_task_has_no_final_state(event_count):
    with pytest.raises(IllegalEventError):
        final_state(final_task(*TO_RUNNING[:event_count]))
    assert final_state(final_task(*TO_RUNNING[:event_count], failed()))[0] is TaskState.FAILED


def test_recollected_artifact_replaces_the_earlier_artifact():
    first = Artifact("a.md", "a.md", 1, "text/markdown", "sha256:" + "0" * 64)
    second = Artifact("a.md", "a.md", 2, "text/markdown", "sha256:" + "1" * 64)
    other = Artifact("b.md", "b.md", 2, "text/markdown", "sha256:" + "2" * 64)
    task = final_task(*TO_RUNNING, SUCCESS, *(e.ArtifactCollected(artifact) for artifact in (first, other, second)))
    assert task.artifacts == (other, second)


@pytest.mark.parametrize(
    ("path", "has_diff"), [(".sandbox/t.patch", True), (".sandbox/other.patch", False), ("t.patch", False)]
)
def test_only_the_patch_of_the_task_sets_the_diff(path, has_diff):
    artifact = Artifact("t.patch", path, 1, "text/x-diff", "sha256:" + "0" * 64)
    diff = DiffStatistics(3, 2, 1)
    task = final_task(*TO_RUNNING, SUCCESS, e.ArtifactCollected(artifact, diff))
    assert task.diff == (diff if has_diff else None)


def test_collecting_artifacts_does_not_change_earlier_tasks():
    one, two, three = (Artifact(name, name, 1, "text/plain", "sha256:" + "0" * 64) for name in "abc")
    before = final_task(*TO_RUNNING, e.ArtifactCollected(one))
    branches = [
        advance(before, e.ArtifactCollected(artifact), seq=99, at=before.created_at).task
        for artifact in (two, three, one)
    ]
    assert [task.artifacts for task in branches] == [(one, two), (one, three), (one,)]
    assert before.artifacts == (one,)
    decoded = decode_task(encode_json(branches[0]))
    assert advance(decoded, e.ArtifactCollected(one), seq=100, at=before.created_at).task.artifacts == (two, one)


class ComparisonCountingStr(str):
    """A name that counts how often it is compared."""

    __slots__ = ()
    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        ComparisonCountingStr.compared += 1
        return str.__eq__(self, other)

    def __ne__(self, other):
        return not self == other


def test_adding_an_artifact_does_not_compare_all_artifacts():
    task, count = final_task(*TO_RUNNING), 500
    for size in (1, 2):
        for number in range(count):
            artifact = Artifact(
                ComparisonCountingStr(f"{number}.md"), "a.md", size, "text/markdown", "sha256:" + "0" * 64
            )
            task = advance(task, e.ArtifactCollected(artifact), seq=9, at=task.created_at).task
    assert [artifact.size_bytes for artifact in task.artifacts] == [2] * count
    assert ComparisonCountingStr.compared < 10 * count


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
def test_illegal_event_is_rejected(events):
    replay(*events[:-1])
    with pytest.raises(IllegalEventError) as caught:
        replay(*events)
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
    st.just(TORN_DOWN),
    st.builds(e.FollowUpSkipped, st.sampled_from(e.FollowUp), st.just("no")),
    st.builds(e.CancelRequested, st.sampled_from(["", "a", "b"]), st.booleans()),
    st.builds(e.AttemptFailed, FAILURES),
    st.builds(e.AgentExited, st.sampled_from([0, 1, 143, None]), st.none(), st.none() | FAILURES),
    st.builds(e.ArtifactCollected, ARTIFACTS),
    st.builds(e.Progress, turns=st.integers(0, 9)),
    st.sampled_from(
        [
            e.Output.from_bytes("stdout", b"x"),
            e.AgentMessage("Hello."),
            e.ToolCallStarted("Bash", "toolu_1"),
            e.ToolResult("toolu_1"),
            e.AgentResult("Done."),
            e.ToolCallEnded("Bash", "toolu_1", 5),
            e.Usage("m", 1, 2),
            e.Metrics(12.5, 1, 2),
            e.EgressDenied("git.example", 443, "not allowed"),
            e.Gap(0, 0, "full"),
            e.ErrorReported("x", "y"),
        ]
    ),
)
NEXT_EVENT: dict[TaskState, e.Event] = {
    TaskState.PENDING: ATTEMPT,
    TaskState.STAGING: PREPARED,
    TaskState.PROVISIONING: CREATED,
    TaskState.READY: STARTED,
}


class TaskStateMachine(RuleBasedStateMachine):
    """Random events in random order, checked against a simple model."""

    def __init__(self) -> None:
        super().__init__()
        self.task: Task | None = None
        self.submission = SUBMITTED
        self.seq = 0
        self.attempt_log: list[str] = []
        self.cancelled = False
        self.first_failure: Failure | None = None
        self.outcome: e.AgentExited | None = None

    @initialize(is_submitted=st.booleans(), retries=st.sampled_from([0, 0, 1, 3]), resume=st.booleans())
    def submit(self, is_submitted: bool, retries: int, resume: bool) -> None:
        lifecycle = Lifecycle(retries=retries, resume=resume)
        self.submission = e.TaskSubmitted("t", MANIFEST.replace(lifecycle=lifecycle))
        if is_submitted:
            self.apply(self.submission)

    @rule(event=EVENTS)
    def apply_any_event(self, event: e.Event) -> None:
        self.apply(event)

    @precondition(lambda self: self.task is not None and self.task.attempt_state in NEXT_EVENT)
    @rule()
    def complete_next_step(self) -> None:
        assert self.task is not None
        self.apply(NEXT_EVENT[self.task.attempt_state])

    @precondition(lambda self: self.task is not None and self.task.attempt_state in NEXT_EVENT)
    @rule(code=st.sampled_from(sorted(LOST_CODES)))
    def lose_attempt(self, code: FailureCode) -> None:
        self.apply(failed(code))

    @precondition(lambda self: self.task is not None and self.task.attempt_state is TaskState.RUNNING)
    @rule(code=st.sampled_from(sorted(RETRYABLE_CODES)))
    def fail_agent(self, code: FailureCode) -> None:
        self.apply(e.AgentExited(1, failure=Failure(code, "it failed")))

    @precondition(lambda self: self.task is not None and next_follow_up(self.task) is not None)
    @rule()
    def start_next_attempt(self) -> None:
        self.apply(TORN_DOWN)
        self.apply(ATTEMPT)

    def apply(self, event: e.Event) -> None:
        before = self.task
        encoded = encode_json(before)
        try:
            result = advance(before, event, seq=self.seq + 1, at=START_TIME + timedelta(seconds=self.seq + 1))
        except IllegalEventError:
            assert encode_json(before) == encoded
            return
        assert encode_json(before) == encoded
        self.seq += 1
        self.check_result(before, result)
        self.update_model(event)
        self.task = result.task
        self.check_end()

    def check_result(self, before: Task | None, result: AdvanceResult) -> None:
        assert result.task.last_seq == self.seq
        state_before = before.state if before else None
        assert state_before is None or not state_before.is_final
        if result.transition is None:
            assert result.task.state is state_before
            return
        assert result.transition.previous_state is state_before
        assert result.transition.new_state is result.task.state
        assert result.transition.message == result.task.state_message
        assert (
            result.task.state is TaskState.PENDING
            if before is None
            else result.task.state in ALLOWED_TRANSITIONS[before.state]
        )
        if before is not None and result.task.state is TaskState.COMPLETING:
            assert next_follow_up(result.task) is None

    def update_model(self, event: e.Event) -> None:
        if isinstance(event, e.CancelRequested) and (self.outcome is None or self.has_follow_up):
            self.cancelled = True
        if isinstance(event, e.AgentStarted):
            self.attempt_log.append("agent")
        if isinstance(event, e.AttemptTornDown):
            assert self.task is not None
            self.attempt_log.append(str(next_follow_up(self.task)))
            self.first_failure = self.outcome = None
        if isinstance(event, e.AttemptFailed | e.AgentExited):
            self.first_failure = self.first_failure or event.failure
        if isinstance(event, e.AgentExited):
            self.outcome = event

    @property
    def has_follow_up(self) -> bool:
        return self.task is not None and next_follow_up(self.task) is not None

    def check_end(self) -> None:
        if self.task is None or not self.task.state.is_final:
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
    def task_matches_model(self) -> None:
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
    def agent_starts_respect_the_lifecycle(self) -> None:
        lifecycle = self.submission.manifest.lifecycle
        assert self.attempt_log.count("retry") <= lifecycle.retries
        assert self.attempt_log.count("resume") <= (RESUMES_MAX if lifecycle.resume else 0)
        agents = self.attempt_log.count("agent")
        assert agents <= 1 + self.attempt_log.count("retry") + self.attempt_log.count("resume")
        consecutive_unstarted_attempts = 0
        for entry in self.attempt_log:
            consecutive_unstarted_attempts = consecutive_unstarted_attempts + 1 if entry == "again" else 0
            assert consecutive_unstarted_attempts < UNSTARTED_ATTEMPTS_MAX

    @invariant()
    def task_can_always_finish(self) -> None:
        if self.task is None or self.task.state.is_final:
            return
        for ending in (e.CancelRequested(), failed(FailureCode.RUNNER_LOST)):
            task = advance(self.task, ending, seq=self.task.last_seq + 1, at=START_TIME).task
            remaining: list[Any] = []
            if task.attempt_state is TaskState.RUNNING:
                remaining.append(e.AgentExited(None, failure=Failure(FailureCode.RUNNER_LOST, "gone")))
            remaining += [e.FollowUpSkipped(one, "enough") for one in e.FollowUp]
            for event in (*remaining, FINISHED):
                task = advance(task, event, seq=task.last_seq + 1, at=START_TIME).task
            assert task.state.is_final


TestTaskStateMachine = TaskStateMachine.TestCase
TestTaskStateMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_event_without_an_effect_changes_nothing_but_its_position():
    before = final_task(*TO_RUNNING)
    for event in (e.AgentMessage("Hello."), e.ToolCallStarted("Bash", "toolu_1"), e.Gap(0, 0, "full")):
        result = advance(before, event, seq=99, at=before.created_at)
        assert (result.transition, msgspec.structs.replace(result.task, last_seq=before.last_seq)) == (None, before)


def test_only_final_states_have_no_transitions():
    assert {state for state in TaskState if not ALLOWED_TRANSITIONS[state]} == FINAL_STATES
    assert set(ALLOWED_TRANSITIONS) == set(TaskState)


def test_every_event_type_is_covered():
    covered = {type(event) for event in (SUBMITTED, ATTEMPT, PREPARED, CREATED, STARTED, FINISHED)}
    covered |= {
        e.AttemptTornDown,
        e.FollowUpSkipped,
        e.CancelRequested,
        e.AttemptFailed,
        e.AgentExited,
        e.ArtifactCollected,
        e.Progress,
    }
    covered |= {e.AgentMessage, e.ToolCallStarted, e.ToolResult, e.AgentResult}
    covered |= {e.Output, e.ToolCallEnded, e.Usage, e.Metrics, e.EgressDenied, e.Gap, e.ErrorReported}
    assert covered == set(e.Event.__args__)


def replay_with(lifecycle: Lifecycle, *events: e.Event) -> list[AdvanceResult]:
    return replay(e.TaskSubmitted("t", MANIFEST.replace(lifecycle=lifecycle)), *events)


def new_states(results: list[AdvanceResult]) -> list[TaskState]:
    return [result.transition.new_state for result in results if result.transition]


TO_READY = (ATTEMPT, PREPARED, CREATED)
AGENT_FAILED = e.AgentExited(1, failure=Failure(FailureCode.AGENT_FAILED, "it failed"))
AGENT_LOST = e.AgentExited(None, failure=Failure(FailureCode.RUNNER_LOST, "gone"))
SECOND_ATTEMPT = e.AttemptStarted("bcdefghi2345", "bubblewrap", "here", number=2)


@pytest.mark.parametrize("event_count", range(1, 4))
@pytest.mark.parametrize("code", sorted(LOST_CODES))
def test_attempt_lost_before_the_agent_starts_is_restarted(event_count, code):
    remaining = (PREPARED, CREATED, STARTED, SUCCESS, FINISHED)
    results = replay_with(Lifecycle(), *TO_READY[:event_count], failed(code), TORN_DOWN, SECOND_ATTEMPT, *remaining)
    assert new_states(results) == new_states(replay(*TO_RUNNING, SUCCESS, FINISHED))
    task = results[-1].task
    assert (task.failure, task.attempt_count, task.attempt.number) == (None, 2, 2)
    [lost] = task.past_attempts
    assert (lost.failure.code, lost.follow_up, lost.ended_at is not None) == (code, "again", True)


def test_consecutive_restarts_are_limited():
    lost = failed(FailureCode.RUNNER_LOST)
    results = replay_with(Lifecycle(), ATTEMPT, *(lost, TORN_DOWN, SECOND_ATTEMPT) * (UNSTARTED_ATTEMPTS_MAX - 1), lost)
    assert next_follow_up(results[-1].task) is None
    with pytest.raises(IllegalEventError):
        advance(results[-1].task, TORN_DOWN, seq=99, at=START_TIME)


@pytest.mark.parametrize(
    "code",
    [FailureCode.CLONE_FAILED, FailureCode.PROVISION_FAILED, FailureCode.SECRET_UNAVAILABLE, FailureCode.STAGE_TIMEOUT],
)
def test_permanent_failure_before_the_agent_starts_has_no_follow_up(code):
    assert next_follow_up(replay_with(Lifecycle(retries=3), ATTEMPT, failed(code))[-1].task) is None


def test_transient_clone_failure_is_followed_by_another_attempt_with_backoff():
    transient_failure = e.AttemptFailed(Failure(FailureCode.CLONE_FAILED, "the connection broke", is_transient=True))
    results = replay_with(
        Lifecycle(), ATTEMPT, transient_failure, TORN_DOWN, SECOND_ATTEMPT, transient_failure, TORN_DOWN
    )
    assert [backoff_seconds(results[index].task) for index in (3, 6)] == [2.0, 4.0]
    assert results[3].task.state_message == "Attempt 1 ended with clone_failed; another attempt follows in 2 s"


def test_failures_not_caused_by_task_limits_are_retryable():
    assert sorted(RETRYABLE_CODES) == [
        *("agent_failed", "agent_no_result", "disk_full", "hang", "host_lost", "internal_error", "mcp_failed"),
        *("out_of_memory", "process_limit", "runner_lost", "sandbox_lost"),
    ]


@pytest.mark.parametrize("code", sorted(RETRYABLE_CODES))
def test_failed_agent_is_retried_only_if_the_manifest_allows_it(code):
    exited = e.AgentExited(1, failure=Failure(code, "no"))
    assert next_follow_up(replay_with(Lifecycle(), *TO_READY, STARTED, exited)[-1].task) is None
    assert next_follow_up(replay_with(Lifecycle(retries=1), *TO_READY, STARTED, exited)[-1].task) == "retry"


@pytest.mark.parametrize("code", [FailureCode.BUDGET_EXCEEDED, FailureCode.TIMEOUT, FailureCode.TOOL_UNKNOWN])
def test_exceeded_task_limit_is_not_retried(code):
    results = replay_with(Lifecycle(retries=3), *TO_READY, STARTED, failed(code), AGENT_FAILED)
    assert results[-1].transition.new_state is TaskState.COMPLETING


def test_retried_task_remains_running_until_its_last_attempt_ends():
    attempt_events = (*TO_READY, STARTED, AGENT_FAILED)
    results = replay_with(
        Lifecycle(retries=2),
        *attempt_events,
        TORN_DOWN,
        *attempt_events,
        TORN_DOWN,
        *TO_READY,
        STARTED,
        SUCCESS,
        FINISHED,
    )
    assert new_states(results) == new_states(replay(*TO_RUNNING, SUCCESS, FINISHED))
    task = results[-1].task
    assert [attempt.failure.code for attempt in task.past_attempts] == ["agent_failed", "agent_failed"]
    assert (task.attempt_count, task.exit_code, task.failure) == (3, 0, None)
    assert task.started_at == START_TIME + timedelta(seconds=5)
    messages = [result.task.state_message for result in results]
    assert "Attempt 1 ended with agent_failed; another attempt follows in 2 s" in messages
    assert "Attempt 2: Claude Code is working" in messages


def test_interactive_task_message_names_the_attach_command():
    submitted = e.TaskSubmitted("t", MANIFEST.replace(agent=claude(headless=False)))
    task = replay(submitted, *TO_RUNNING[1:])[-1].task
    assert task.state_message == "Claude Code is running in its terminal: sandbox task attach t"


def test_last_failure_is_reported_when_no_retry_is_left():
    results = replay_with(
        Lifecycle(retries=1), *TO_READY, STARTED, AGENT_LOST, TORN_DOWN, *TO_READY, STARTED, AGENT_FAILED
    )
    assert results[-1].transition.new_state is TaskState.COMPLETING
    assert results[-1].task.failure.code == "agent_failed"


def test_backoff_doubles_up_to_a_limit():
    events: list[e.Event] = []
    pauses = []
    for _ in range(12):
        events += [*TO_READY, STARTED, AGENT_FAILED, TORN_DOWN]
        pauses.append(backoff_seconds(replay_with(Lifecycle(retries=20), *events)[-1].task))
    assert pauses[:4] == [2.0, 4.0, 8.0, 16.0]
    assert pauses[-1] == RETRY_BACKOFF_SECONDS_MAX


def test_lost_agent_is_resumed_up_to_a_limit_and_then_retried():
    attempt_events = (*TO_READY, STARTED, AGENT_LOST)
    follow_ups = []
    events: list[e.Event] = []
    for _ in range(RESUMES_MAX + 2):
        events += attempt_events
        follow_ups.append(next_follow_up(replay_with(Lifecycle(retries=1, resume=True), *events)[-1].task))
        events.append(TORN_DOWN)
    assert follow_ups == [*["resume"] * RESUMES_MAX, "retry", None]


@pytest.mark.parametrize("event", [e.CancelRequested("enough"), failed(FailureCode.SECRET_UNAVAILABLE)])
def test_ended_task_has_no_backoff(event):
    results = replay_with(Lifecycle(retries=1), *TO_READY, STARTED, AGENT_FAILED, TORN_DOWN, event)
    assert [backoff_seconds(result.task) for result in results[-2:]] == [2.0, 0.0]
    assert "another attempt follows in 2 s" in results[-2].task.state_message


def test_running_attempt_has_no_backoff():
    assert [backoff_seconds(result.task) for result in replay(*TO_RUNNING)] == [0.0] * len(TO_RUNNING)


def test_failed_attempt_has_no_follow_up_while_its_agent_is_running():
    results = replay_with(Lifecycle(retries=1), *TO_READY, STARTED, failed(FailureCode.HANG), AGENT_FAILED)
    assert [next_follow_up(result.task) for result in results[-2:]] == [None, "retry"]


def test_failed_agent_is_not_resumed():
    assert next_follow_up(replay_with(Lifecycle(resume=True), *TO_READY, STARTED, AGENT_FAILED)[-1].task) is None


def test_resumed_attempt_lost_before_the_agent_starts_keeps_the_disk():
    resumed = e.AttemptStarted("bcdefghi2345", "bubblewrap", "here", number=2, resumes=True)
    results = replay_with(
        Lifecycle(resume=True), *TO_READY, STARTED, AGENT_LOST, TORN_DOWN, resumed, failed(FailureCode.RUNNER_LOST)
    )
    assert next_follow_up(results[-1].task) == "again"
    assert results[-1].task.attempt.hands_over_disk(e.FollowUp.AGAIN)
    assert results[-1].task.base_commit == PREPARED.base_commit


@pytest.mark.parametrize("after", range(3))
def test_cancel_between_or_during_attempts_ends_the_task(after):
    events = (*TO_READY, STARTED, AGENT_FAILED, TORN_DOWN, SECOND_ATTEMPT)[: 5 + after]
    results = replay_with(Lifecycle(retries=1), *events, e.CancelRequested("enough"), FINISHED)
    assert [result.transition.new_state for result in results[-2:]] == [TaskState.COMPLETING, TaskState.CANCELLED]


def test_skipped_follow_up_is_not_used():
    exited = replay_with(Lifecycle(retries=1, resume=True), *TO_READY, STARTED, AGENT_LOST)[-1].task
    no_resume = advance(exited, e.FollowUpSkipped(e.FollowUp.RESUME, "no session"), seq=7, at=START_TIME)
    assert (next_follow_up(no_resume.task), no_resume.transition) == ("retry", None)
    no_follow_up = advance(no_resume.task, e.FollowUpSkipped(e.FollowUp.RETRY, "no"), seq=8, at=START_TIME)
    assert no_follow_up.transition.new_state is TaskState.COMPLETING


def test_follow_up_is_predicted_for_an_unrecorded_exit():
    running = replay_with(Lifecycle(retries=1), *TO_READY, STARTED)[-1].task
    assert will_be_followed_up(running, AGENT_FAILED)
    assert not will_be_followed_up(running, SUCCESS)


def test_usage_is_summed_over_attempts():
    usage = e.Usage("m", 1, 2, cache_read_tokens=3, cache_write_tokens=4, cost_usd=0.25)
    task = replay_with(Lifecycle(retries=1), *TO_READY, STARTED, usage, AGENT_FAILED, TORN_DOWN, ATTEMPT, usage)[
        -1
    ].task
    assert (task.spent.input_tokens, task.spent.output_tokens, task.spent.usd) == (16, 4, 0.5)


def test_lost_agent_has_final_usage_and_no_current_tool():
    """A runner may die after it reports a request but before it adds the request to its progress."""
    progress = e.Progress(turns=2, current_tool="Bash", input_tokens=60, output_tokens=10, cost_usd=0.1)
    used = e.Usage("m", 100, 20, 0, 0, 0.25)
    counted = final_task(*TO_RUNNING, used, progress, AGENT_LOST).progress
    assert (counted.turns, counted.current_tool) == (2, None)
    assert (counted.input_tokens, counted.output_tokens, counted.cost_usd) == (100, 20, 0.25)


def test_recorded_message_of_a_state_change_is_used():
    """In journals from earlier versions, the recorded messages contain the agent's name, but the events do not."""
    task = final_task(*TO_RUNNING[:-1])
    transition = e.Transition(TaskState.READY, TaskState.RUNNING, "Claude Code is working")
    started = e.Record(task.last_seq + 1, 1, START_TIME, e.AgentStarted("session"), transition)
    running = replay_record(task, started)
    assert (running.state, running.state_message) == (TaskState.RUNNING, "Claude Code is working")
    assert running == msgspec.structs.replace(
        advance(task, started.event, seq=started.seq, at=START_TIME).task, state_message="Claude Code is working"
    )
    without = replay_record(task, msgspec.structs.replace(started, transition=None))
    assert without.state_message == "The agent is working"
