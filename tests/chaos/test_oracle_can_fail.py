"""Every check of the oracle rejects corrupt evidence and accepts valid evidence."""

import copy
import hashlib

import pytest

from chaos import oracle
from chaos.oracle import DownloadedArtifact, Evidence, TaskEvidence

LINES = [f"line {n}\n" for n in range(5)]
STATES = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
EVENTS = [
    "task_submitted",
    "attempt_started",
    "workspace_prepared",
    "sandbox_created",
    "agent_started",
    "agent_exited",
    "task_finished",
]


def artifact(name, content):
    return DownloadedArtifact(name, len(content), f"sha256:{hashlib.sha256(content).hexdigest()}", content)


def records(lines):
    found = []
    for kind, state in zip(EVENTS, STATES, strict=True):
        if kind == "agent_exited":
            found += [{"event": {"type": "output", "stream": "stdout", "text": line}} for line in lines]
        found.append({"event": {"type": kind}, "transition": {"new_state": state}})
    return [{"seq": number, "epoch": 1, **entry} for number, entry in enumerate(found, 1)]


def task_evidence(
    lines=LINES, written=LINES, target="server", state_at_kill="running", final_state="completed", code=None
):
    text, printed = "".join(written).encode(), "".join(lines).encode()
    journal_records = records(lines)
    journal_records[-1]["transition"]["new_state"] = final_state
    return TaskEvidence(
        "task-1",
        target,
        state_at_kill,
        {"state": final_state, "error": {"code": code} if code else None},
        journal_records,
        stdout_before="".join(lines[:2]).encode(),
        artifacts=[
            artifact("written.txt", text),
            artifact("task-1.patch", b"+"),
            artifact("transcript.ndjson", printed),
            artifact("metadata.json", b"{}"),
            artifact("made-0", b"0\n"),
        ],
        patched_lines=text,
        agent_sessions=["a", "a"],
        file_count=1,
    )


def lost_runner(lines):
    return task_evidence(lines, target="runner", final_state="failed", code="runner_lost")


def lost_sandbox(lines):
    return task_evidence(lines, target="sandbox", final_state="failed", code="sandbox_lost")


def killed_agent(lines, exit_code=137, target="all", state_at_kill="completing", code="agent_failed"):
    """Return evidence of killing all processes, the agent first. The runner had recorded the agent's death before."""
    task = task_evidence(lines, target=target, state_at_kill=state_at_kill, final_state="failed", code=code)
    exited = next(entry["event"] for entry in task.records if entry["event"]["type"] == "agent_exited")
    exited |= {"exit_code": exit_code, "failure": {"code": "agent_failed"}}
    return task


VALID_TASKS = [
    killed_agent(LINES),
    killed_agent(LINES[:4]),
    task_evidence(),
    lost_runner(LINES[:3]),
    lost_runner([]),
    lost_sandbox(LINES),
    lost_sandbox(LINES[:4]),
]


@pytest.mark.parametrize("task", VALID_TASKS)
def test_valid_task_has_no_violations(task):
    task.stdout_before = b""
    assert oracle.evaluate(Evidence({"task-1"}, ["task-1"], [task], {})) == []


def test_missing_acknowledged_task_is_reported():
    assert list(oracle.check_acknowledged_tasks_exist(Evidence({"a", "b"}, ["a"], [], {})))


def test_task_listed_twice_is_reported():
    assert list(oracle.check_acknowledged_tasks_exist(Evidence({"a"}, ["a", "a"], [], {})))


def test_leftovers_are_reported():
    assert list(oracle.check_no_leftovers(Evidence(set(), [], [], {"mounts": {"/x"}})))


def drop_record(task):
    del task.records[3]


def reuse_old_epoch(task):
    task.records[2]["epoch"] = 2


def skip_states(task):
    task.records[2]["transition"]["new_state"] = "running"


@pytest.mark.parametrize("corrupt", [drop_record, reuse_old_epoch, skip_states])
def test_inconsistent_journal_is_reported(corrupt):
    task = copy.deepcopy(task_evidence())
    corrupt(task)
    assert list(oracle.check_journal_is_consistent(task))


def remove_end(task):
    del task.records[-1]
    task.status["state"] = "completing"


def change_reported_state(task):
    task.status["state"] = "failed"


def claim_runner_kill(task):
    task.target = "runner"


def end_twice(task):
    task.records.insert(-1, {"event": {"type": "task_finished"}, "transition": {"new_state": "completed"}})


def append_after_end(task):
    task.records.append({"event": {"type": "progress"}})


@pytest.mark.parametrize(
    "changes",
    [
        {"exit_code": 1},
        {"exit_code": None},
        {"target": "runner"},
        {"state_at_kill": "running"},
        {"code": "runner_lost"},
    ],
)
def test_wrong_outcome_of_a_killed_agent_is_reported(changes):
    assert list(oracle.check_final_state(killed_agent(LINES, **changes)))


@pytest.mark.parametrize("corrupt", [remove_end, change_reported_state, claim_runner_kill, end_twice, append_after_end])
def test_wrong_final_state_is_reported(corrupt):
    task = copy.deepcopy(task_evidence())
    corrupt(task)
    assert list(oracle.check_final_state(task))


@pytest.mark.parametrize(
    "task",
    [
        task_evidence(LINES[:4]),
        task_evidence([*LINES[:2], *LINES[1:]]),
        task_evidence([*LINES[:1], *LINES[2:]]),
        lost_runner(LINES[1:]),
        lost_runner([*LINES[:2], LINES[1]]),
        lost_runner([*LINES[:2], "line"]),
        lost_sandbox(LINES[:3]),
        lost_sandbox([*LINES, LINES[-1]]),
    ],
    ids=[
        "last line missing",
        "duplicated line",
        "middle line missing",
        "first line missing",
        "duplicate before the runner was killed",
        "partial line",
        "two lines missing after the sandbox was killed",
        "duplicate before the sandbox was killed",
    ],
)
def test_lost_or_duplicated_line_is_reported(task):
    task.stdout_before = b""
    assert list(oracle.check_output_lines(task))


def test_line_that_disappears_after_being_read_is_reported():
    task = lost_runner(LINES[:1])
    task.stdout_before = "".join(LINES[:2]).encode()
    assert list(oracle.check_output_lines(task))


def retried(lines):
    """Return evidence of a runner that was killed after two lines, and of another agent that printed `lines`."""
    task = task_evidence(lines, target="runner")
    two = [{"event": {"type": "output", "stream": "stdout", "text": line}} for line in LINES[:2]]
    task.records[2:2] = [*two, {"event": {"type": "attempt_started"}}]
    task.artifacts[2] = artifact("transcript.ndjson", task.stdout)
    task.agent_sessions, task.retries = ["a", "b"], 1
    return task


def test_output_of_each_attempt_is_checked_separately():
    assert not list(oracle.check_output_lines(retried(LINES)))
    assert list(oracle.check_output_lines(retried(LINES[:4])))
    task = retried(LINES)
    del task.records[2]
    assert list(oracle.check_output_lines(task))


def test_failed_task_with_retries_left_is_reported():
    task = lost_runner(LINES[:3])
    task.retries = 1
    assert list(oracle.check_final_state(task))


def change_byte(task):
    task.artifacts[1].content = b"-"


def change_size(task):
    task.artifacts[1].size_bytes += 1


def list_twice(task):
    task.artifacts.append(task.artifacts[-1])


def remove_artifact(name):
    def corrupt(task):
        task.artifacts = [entry for entry in task.artifacts if entry.name != name]

    return corrupt


def break_patch(task):
    task.patched_lines = None


def change_transcript(task):
    task.artifacts[2] = artifact("transcript.ndjson", b"something else\n")


ARTIFACT_CORRUPTIONS = {
    "changed byte": change_byte,
    "changed size": change_size,
    "listed twice": list_twice,
    "missing patch": remove_artifact("task-1.patch"),
    "missing transcript": remove_artifact("transcript.ndjson"),
    "missing metadata": remove_artifact("metadata.json"),
    "missing file": remove_artifact("made-0"),
    "patch does not apply": break_patch,
    "changed transcript": change_transcript,
}


@pytest.mark.parametrize("corrupt", ARTIFACT_CORRUPTIONS.values(), ids=ARTIFACT_CORRUPTIONS)
def test_corrupt_artifact_is_reported(corrupt):
    task = copy.deepcopy(task_evidence())
    corrupt(task)
    assert list(oracle.check_artifacts(task))


def run_twice(task):
    task.agent_sessions = ["a", "b"]


def run_twice_by_the_journal(task):
    task.records.insert(6, task.records[4])


def never_run(task):
    task.agent_sessions = []


@pytest.mark.parametrize("corrupt", [run_twice, run_twice_by_the_journal, never_run])
def test_agent_that_ran_twice_or_never_is_reported(corrupt):
    task = copy.deepcopy(task_evidence())
    corrupt(task)
    assert list(oracle.check_agent_runs_once(task))


def test_second_agent_run_is_allowed_with_retries():
    task = task_evidence()
    task.agent_sessions, task.retries = ["a", "b"], 1
    assert not list(oracle.check_agent_runs_once(task))


WIRE_EVENTS = [{"seq": 1}, {"seq": 2}, {"seq": 3, "type": "end"}]


@pytest.mark.parametrize(
    "received",
    [
        WIRE_EVENTS[:2],
        WIRE_EVENTS[1:],
        [*WIRE_EVENTS[:2], *WIRE_EVENTS[1:]],
        [WIRE_EVENTS[1], WIRE_EVENTS[0], WIRE_EVENTS[2]],
        [],
    ],
    ids=["no end", "no start", "duplicate", "wrong order", "empty"],
)
def test_received_events_differing_from_the_journal_are_reported(received):
    assert list(oracle.check_received_events({"a": WIRE_EVENTS}, {("sse", "a"): received}))


def test_completely_received_events_pass():
    assert not list(oracle.check_received_events({"a": WIRE_EVENTS}, {("sse", "a"): list(WIRE_EVENTS)}))


def lost_host(lines, target="host", code="host_lost", **fields):
    """Return evidence of a disk that was lost with its host, so no artifact could be stored."""
    task = task_evidence(lines, target=target, final_state="failed", code=code, **fields)
    task.artifacts, task.patched_lines, task.stdout_before = [], None, b""
    return task


def numbered(*numbers):
    return [f'{{"text": "line {number}"}}\n' for number in numbers]


def test_evidence_of_a_lost_disk_is_valid_without_artifacts():
    for task in (lost_host(numbered(0, 1, 2)), lost_host([]), lost_host(numbered(0), "worker", "runner_lost")):
        assert oracle.evaluate(Evidence({"task-1"}, ["task-1"], [task], {})) == []


@pytest.mark.parametrize("lines", [numbered(1, 2), numbered(0, 2), numbered(0, 0), [*numbered(0), "{"]])
def test_missing_or_repeated_line_of_a_lost_host_is_reported(lines):
    assert list(oracle.check_output_lines(lost_host(lines)))


@pytest.mark.parametrize(
    "task",
    [
        lost_host([], target="interrupted link"),
        lost_host([], target="paused host"),
        lost_host([], target="server"),
        lost_host([], target="worker"),
        lost_host([], target="controller"),
        lost_host([], state_at_kill="ready"),
        lost_host([], target="cut link", code="runner_lost"),
    ],
    ids=lambda task: f"{task.target} {task.state_at_kill}",
)
def test_unexpected_loss_of_a_host_is_reported(task):
    assert list(oracle.check_final_state(task))


def test_missing_artifacts_are_reported_unless_the_disk_is_lost():
    assert list(oracle.check_artifacts(lost_host([], target="runner", code="runner_lost")))


def test_overlapping_agents_are_reported():
    task = task_evidence()
    task.retries, task.agent_sessions = 1, ["a", "a", "b"]
    assert not list(oracle.check_agents_do_not_overlap(task))
    task.agent_sessions = ["a", "b", "a"]
    assert list(oracle.check_agents_do_not_overlap(task))


def test_late_requests_of_a_given_up_attempt_are_reported():
    task = task_evidence()
    assert not list(oracle.check_agents_do_not_overlap(task))
    task.late_requests = 1
    assert list(oracle.check_agents_do_not_overlap(task))
