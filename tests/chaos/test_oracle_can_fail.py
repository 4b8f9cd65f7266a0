"""Each promise is broken by a lie and by nothing else, so the oracle is able to say no."""

import copy
import hashlib

import pytest

from chaos import oracle
from chaos.oracle import Evidence, Kept, Story

LINES = [f"line {n}\n" for n in range(5)]
WALK = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
EVENTS = [
    "task_submitted",
    "attempt_started",
    "workspace_prepared",
    "sandbox_created",
    "agent_started",
    "agent_exited",
    "task_finished",
]


def kept(name, content):
    return Kept(name, len(content), f"sha256:{hashlib.sha256(content).hexdigest()}", content)


def records(lines):
    found = []
    for kind, state in zip(EVENTS, WALK, strict=True):
        if kind == "agent_exited":
            found += [{"event": {"type": "output", "stream": "stdout", "text": line}} for line in lines]
        found.append({"event": {"type": kind}, "transition": {"new_state": state}})
    return [{"seq": number, "epoch": 1, **one} for number, one in enumerate(found, 1)]


def story(lines=LINES, written=LINES, victim="server", state="running", end="completed", code=None):
    text, printed = "".join(written).encode(), "".join(lines).encode()
    told = records(lines)
    told[-1]["transition"]["new_state"] = end
    return Story(
        "task-1",
        victim,
        state,
        {"state": end, "error": {"code": code} if code else None},
        told,
        seen="".join(lines[:2]).encode(),
        artifacts=[
            kept("written.txt", text),
            kept("task-1.patch", b"+"),
            kept("transcript.ndjson", printed),
            kept("metadata.json", b"{}"),
            kept("made-0", b"0\n"),
        ],
        patched=text,
        starts=1,
        files=1,
    )


def lost_runner(lines):
    return story(lines, victim="runner", end="failed", code="runner_lost")


def lost_sandbox(lines):
    return story(lines, victim="sandbox", end="failed", code="sandbox_lost")


def killed_agent(lines, exit_code=137, victim="all", state="completing", code="agent_failed"):
    """All are killed one after the other, the agent first; its runner still wrote that down."""
    told = story(lines, victim=victim, state=state, end="failed", code=code)
    exited = next(one["event"] for one in told.records if one["event"]["type"] == "agent_exited")
    exited |= {"exit_code": exit_code, "failure": {"code": "agent_failed"}}
    return told


TRUE_STORIES = [
    killed_agent(LINES),
    killed_agent(LINES[:4]),
    story(),
    lost_runner(LINES[:3]),
    lost_runner([]),
    lost_sandbox(LINES),
    lost_sandbox(LINES[:4]),
]


@pytest.mark.parametrize("told", TRUE_STORIES)
def test_the_truth_passes(told):
    told.seen = b""
    assert oracle.judge(Evidence({"task-1"}, ["task-1"], [told], {})) == []


def test_an_acknowledged_task_that_is_gone():
    assert list(oracle.every_acknowledged_task_is_there(Evidence({"a", "b"}, ["a"], [], {})))


def test_a_task_that_is_there_twice():
    assert list(oracle.every_acknowledged_task_is_there(Evidence({"a"}, ["a", "a"], [], {})))


def test_something_that_is_left():
    assert list(oracle.nothing_is_left_behind(Evidence(set(), [], [], {"mounts": {"/x"}})))


def drop_record(told):
    del told.records[3]


def bring_a_writer_back(told):
    told.records[2]["epoch"] = 2


def jump(told):
    told.records[2]["transition"]["new_state"] = "running"


@pytest.mark.parametrize("lie", [drop_record, bring_a_writer_back, jump])
def test_a_journal_that_is_no_story(lie):
    told = copy.deepcopy(story())
    lie(told)
    assert list(oracle.the_journal_is_one_story(told))


def never_end(told):
    del told.records[-1]
    told.status["state"] = "completing"


def tell_clients_otherwise(told):
    told.status["state"] = "failed"


def end_untruly(told):
    told.victim = "runner"


def end_twice(told):
    told.records.insert(-1, {"event": {"type": "task_finished"}, "transition": {"new_state": "completed"}})


def go_on_after_the_end(told):
    told.records.append({"event": {"type": "progress"}})


@pytest.mark.parametrize(
    "changes",
    [{"exit_code": 1}, {"exit_code": None}, {"victim": "runner"}, {"state": "running"}, {"code": "runner_lost"}],
)
def test_an_agent_that_was_not_killed_or_whose_outcome_did_not_stand(changes):
    assert list(oracle.every_task_ends_truly(killed_agent(LINES, **changes)))


@pytest.mark.parametrize("lie", [never_end, tell_clients_otherwise, end_untruly, end_twice, go_on_after_the_end])
def test_a_task_that_does_not_end_truly(lie):
    told = copy.deepcopy(story())
    lie(told)
    assert list(oracle.every_task_ends_truly(told))


@pytest.mark.parametrize(
    "told",
    [
        story(LINES[:4]),
        story([*LINES[:2], *LINES[1:]]),
        story([*LINES[:1], *LINES[2:]]),
        lost_runner(LINES[1:]),
        lost_runner([*LINES[:2], LINES[1]]),
        lost_runner([*LINES[:2], "line"]),
        lost_sandbox(LINES[:3]),
        lost_sandbox([*LINES, LINES[-1]]),
    ],
    ids=[
        "the last one is lost",
        "one is there twice",
        "one is lost in the middle",
        "not from the beginning",
        "twice before the runner died",
        "half a line",
        "two are lost with the sandbox",
        "twice before the sandbox died",
    ],
)
def test_a_line_that_is_lost_or_doubled(told):
    told.seen = b""
    assert list(oracle.no_line_is_lost_or_doubled(told))


def test_a_line_that_was_read_and_taken_back():
    told = lost_runner(LINES[:1])
    told.seen = "".join(LINES[:2]).encode()
    assert list(oracle.no_line_is_lost_or_doubled(told))


def retried(lines):
    """The runner died after two lines, and another agent printed these."""
    told = story(lines, victim="runner")
    two = [{"event": {"type": "output", "stream": "stdout", "text": line}} for line in LINES[:2]]
    told.records[2:2] = [*two, {"event": {"type": "attempt_started"}}]
    told.artifacts[2] = kept("transcript.ndjson", told.stdout)
    told.starts, told.retries = 2, 1
    return told


def test_what_an_agent_printed_that_was_followed_by_another_stays_and_counts_for_itself():
    assert not list(oracle.no_line_is_lost_or_doubled(retried(LINES)))
    assert list(oracle.no_line_is_lost_or_doubled(retried(LINES[:4])))
    told = retried(LINES)
    del told.records[2]
    assert list(oracle.no_line_is_lost_or_doubled(told))


def test_the_loss_of_an_agent_that_another_one_may_follow_is_no_end():
    told = lost_runner(LINES[:3])
    told.retries = 1
    assert list(oracle.every_task_ends_truly(told))


def change_a_byte(told):
    told.artifacts[1].content = b"-"


def cut(told):
    told.artifacts[1].size_bytes += 1


def list_twice(told):
    told.artifacts.append(told.artifacts[-1])


def lose(name):
    def lie(told):
        told.artifacts = [one for one in told.artifacts if one.name != name]

    return lie


def break_the_patch(told):
    told.patched = None


def change_the_transcript(told):
    told.artifacts[2] = kept("transcript.ndjson", b"something else\n")


LIES_ABOUT_ARTIFACTS = {
    "a byte is another": change_a_byte,
    "the size is another": cut,
    "one is there twice": list_twice,
    "the patch is missing": lose("task-1.patch"),
    "the transcript is missing": lose("transcript.ndjson"),
    "the metadata are missing": lose("metadata.json"),
    "a file is missing": lose("made-0"),
    "the patch does not apply": break_the_patch,
    "the transcript is another": change_the_transcript,
}


@pytest.mark.parametrize("lie", LIES_ABOUT_ARTIFACTS.values(), ids=LIES_ABOUT_ARTIFACTS)
def test_an_artifact_that_is_not_whole(lie):
    told = copy.deepcopy(story())
    lie(told)
    assert list(oracle.artifacts_are_whole(told))


def run_twice(told):
    told.starts = 2


def run_twice_by_the_journal(told):
    told.records.insert(6, told.records[4])


def never_run(told):
    told.starts = 0


@pytest.mark.parametrize("lie", [run_twice, run_twice_by_the_journal, never_run])
def test_an_agent_that_runs_twice_or_never(lie):
    told = copy.deepcopy(story())
    lie(told)
    assert list(oracle.no_agent_runs_twice(told))


def test_an_agent_may_run_again_where_the_manifest_says_so():
    told = story()
    told.starts, told.retries = 2, 1
    assert not list(oracle.no_agent_runs_twice(told))


FRAMES = [{"seq": 1}, {"seq": 2}, {"seq": 3, "type": "end"}]


@pytest.mark.parametrize(
    "heard",
    [FRAMES[:2], FRAMES[1:], [*FRAMES[:2], *FRAMES[1:]], [FRAMES[1], FRAMES[0], FRAMES[2]], []],
    ids=["no end", "no beginning", "one twice", "another order", "nothing"],
)
def test_a_follower_who_heard_something_else(heard):
    assert list(oracle.every_follower_has_the_journal({"a": FRAMES}, {("sse", "a"): heard}))


def test_a_follower_who_heard_everything():
    assert not list(oracle.every_follower_has_the_journal({"a": FRAMES}, {("sse", "a"): list(FRAMES)}))
