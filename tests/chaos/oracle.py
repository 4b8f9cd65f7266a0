"""What is promised of tasks when things break: one function a promise, each of which gives what is broken of it.

It judges evidence and fetches none, so that a lie can be put before it. `judge` asks for all promises.
"""

import hashlib
import itertools
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sandbox.model.task_state import ALLOWED_TRANSITIONS, TaskState

STATES = ("pending", "staging", "provisioning", "ready", "running", "completing")
TERMINAL = {"completed", "failed", "failed_preserved", "cancelled"}
DONE = ("completed", None)
LOST_RUNNER = ("failed", "runner_lost")
LOST_SANDBOX = ("failed", "sandbox_lost")
BROKEN_OFF = ("failed", "agent_failed")
KILLED = 128 + signal.SIGKILL

TRUE_ENDS = {
    # Whoever was only looked after from outside goes on.
    "server": {state: {DONE} for state in STATES},
    # What had not begun is tried again; an agent that had begun is not. Its outcome, once recorded, stands.
    "runner": {**{state: {DONE} for state in STATES}, "running": {LOST_RUNNER}},
    "sandbox": {
        "provisioning": {DONE},
        "ready": {DONE},
        "running": {LOST_SANDBOX, BROKEN_OFF},
    },
    "gateway": {"ready": {DONE, LOST_SANDBOX}, "running": {LOST_SANDBOX}},
}
# A runner that dies after its sandbox may have seen that first.
TRUE_ENDS["all"] = {**TRUE_ENDS["runner"], "running": {LOST_RUNNER, LOST_SANDBOX}}
"""`{victim: {state at the blow: {(state, code)}}}`. Nothing else is promised to happen."""

MARK = "written.txt"
"""The file in the workspace to which the scribe writes each line before it prints it."""


@dataclass
class Kept:
    """An artifact: what the server says of it, and its bytes as downloaded."""

    name: str
    size_bytes: int
    checksum: str
    content: bytes


@dataclass
class Story:
    """All that is known of one task. victim: None for one that nothing was done to.

    records: of the journal, as JSON. seen: of stdout before the blow. patched: MARK in a clone of the base commit after
    `git apply`, empty where it is not there; None where git refused. starts: of an agent, as the model heard of them.
    files: how many the agent was told to make, each with its number in it.
    """

    task_id: str
    victim: str | None
    state: str
    status: dict
    records: list[dict]
    seen: bytes = b""
    artifacts: list[Kept] = field(default_factory=list)
    patched: bytes | None = None
    starts: int = 0
    retries: int = 0
    files: int = 0

    @property
    def end(self):
        """State and code, as a client is told."""
        return self.status.get("state"), (self.status.get("error") or {}).get("code")

    @property
    def stdout(self):
        """As journaled."""
        return _stdout_of(self.records)

    @property
    def printed(self):
        """By the agent of the last attempt: what one before it wrote down went with its workspace."""
        begins = [n for n, one in enumerate(self.records) if one["event"]["type"] == "attempt_started"]
        return _stdout_of(self.records[begins[-1] :]) if begins else b""

    @property
    def written(self):
        """What the agent wrote down beside what it printed, as far as it was kept."""
        return next((kept.content for kept in self.artifacts if kept.name == MARK), None)

    @property
    def lost_its_sandbox(self):
        """Whether its runner wrote down that the sandbox went away."""
        exits = [one["event"] for one in self.records if one["event"]["type"] == "agent_exited"]
        return any((one.get("failure") or {}).get("code") == "sandbox_lost" for one in exits)

    @property
    def lost_its_agent(self):
        """Whether its runner wrote down that the agent was ended by KILL."""
        exits = [one["event"] for one in self.records if one["event"]["type"] == "agent_exited"]
        codes = [(one.get("exit_code"), (one.get("failure") or {}).get("code")) for one in exits]
        return (KILLED, "agent_failed") in codes

    def has(self, kind):
        """Whether the journal has such an event."""
        return any(one["event"]["type"] == kind for one in self.records)


@dataclass
class Evidence:
    """Of one round. acknowledged: ids that got a 202; left: what is on the machine still, by kind."""

    acknowledged: set[str]
    listed: list[str]
    stories: list[Story]
    left: dict


class Broken(NamedTuple):
    """What is broken of a promise; story: None where it is about all."""

    story: Story | None
    said: str

    def __str__(self):
        one = self.story
        return self.said if one is None else f"{one.task_id} ({one.victim} in {one.state}): {self.said}"


def judge(evidence: Evidence) -> list[Broken]:
    """Ask for all promises."""
    about_all = (every_acknowledged_task_is_there, nothing_is_left_behind)
    about_one = (
        the_journal_is_one_story,
        every_task_ends_truly,
        no_line_is_lost_or_doubled,
        artifacts_are_whole,
        no_agent_runs_twice,
    )
    broken = [Broken(None, said) for promise in about_all for said in promise(evidence)]
    for story in evidence.stories:
        broken += [Broken(story, said) for promise in about_one for said in promise(story)]
    return broken


def every_acknowledged_task_is_there(evidence: Evidence) -> Iterator[str]:
    """A 202 is a promise for good; and one task is listed once."""
    for task_id in sorted(evidence.acknowledged - set(evidence.listed)):
        yield f"{task_id} was acknowledged and is gone"
    for task_id, times in Counter(evidence.listed).items():
        if times > 1:
            yield f"{task_id} is listed {times} times"


def nothing_is_left_behind(evidence: Evidence) -> Iterator[str]:
    """No process, mount, control group, loop device, socket or file."""
    for kind, found in evidence.left.items():
        yield f"left behind, {kind}: {found}"


def the_journal_is_one_story(story: Story) -> Iterator[str]:
    """Numbers without a hole, writers one after the other, states along the graph."""
    seqs = [one["seq"] for one in story.records]
    if seqs != list(range(1, len(seqs) + 1)):
        yield f"the journal's numbers are {seqs}"
    epochs = [one["epoch"] for one in story.records]
    if epochs != sorted(epochs):
        yield "a writer came back after another one had begun"
    states = [one["transition"]["new_state"] for one in story.records if "transition" in one]
    for before, after in itertools.pairwise(states):
        if TaskState(after) not in ALLOWED_TRANSITIONS[TaskState(before)]:
            yield f"it went from {before} to {after}"


def every_task_ends_truly(story: Story) -> Iterator[str]:
    """Once, in its last record, with an end that is true of what happened to it; and clients are told the same."""
    states = [one["transition"]["new_state"] for one in story.records if "transition" in one]
    ends = [state for state in states if state in TERMINAL]
    if len(ends) != 1 or story.records[-1].get("transition", {}).get("new_state") != ends[0]:
        yield f"its states are {states}"
    if states and story.status.get("state") != states[-1]:
        yield f"clients are told {story.status.get('state')}, the journal says {states[-1]}"
    # Where the manifest allows another agent, the loss of one is no end.
    goes_on = story.victim is None or story.retries
    true = {DONE} if goes_on else _true_ends(story)
    if story.end not in true:
        yield f"it ended as {story.end}: {story.status.get('error')}"


def _true_ends(story: Story) -> set:
    """Where all is killed one after the other, the agent may be first: its runner writes that down before its own end.

    That is the outcome then, and no other end is true.
    """
    saw_its_agent_killed = story.victim == "all" and story.state == "completing" and story.lost_its_agent
    return {BROKEN_OFF} if saw_its_agent_killed else TRUE_ENDS[story.victim].get(_state_at_blow(story), set())


def _state_at_blow(story: Story) -> str:
    """A runner that outlives its sandbox may have written down that the agent begins before it saw the end of both."""
    outran = story.victim == "sandbox" and story.state == "ready" and story.has("agent_started")
    saw_it_first = story.victim == "all" and story.state == "completing" and story.lost_its_sandbox
    return "running" if saw_it_first or (outran and story.end != DONE) else story.state


def no_line_is_lost_or_doubled(story: Story) -> Iterator[str]:
    """Of what the agent printed.

    Where the runner lives on, all of it; where it died, a beginning in whole lines. Where the agent was killed, it may
    have written its last line down and not printed it. What was there to be read once stays.
    """
    printed, written = story.printed, story.written or b""
    if not story.stdout.startswith(story.seen):
        yield "what was read before is no longer there"
    if story.end == LOST_RUNNER:
        if not written.startswith(printed) or (printed and not printed.endswith(b"\n")):
            yield f"{_compared(printed, written)}, which is no beginning of it"
    elif story.end == DONE or story.victim not in {"sandbox", "gateway", "all"}:
        if printed != written:
            yield _compared(printed, written)
    elif printed not in {written, _without_last_line(written)}:
        yield _compared(printed, written)


def artifacts_are_whole(story: Story) -> Iterator[str]:
    """Bytes match sizes and checksums, the patch applies, and what must be there is."""
    for kept in story.artifacts:
        found = f"sha256:{hashlib.sha256(kept.content).hexdigest()}"
        if (found, len(kept.content)) != (kept.checksum, kept.size_bytes):
            yield f"{kept.name} is not what it was"
    contents = {kept.name: kept.content for kept in story.artifacts}
    if len(contents) != len(story.artifacts):
        yield f"artifacts are there twice: {sorted(kept.name for kept in story.artifacts)}"
    if story.has("workspace_prepared"):
        yield from _what_is_missing(story, contents)


def _what_is_missing(story, contents):
    for name in (f"{story.task_id}.patch", "transcript.ndjson", "metadata.json"):
        if name not in contents:
            yield f"{name} is missing"
    if story.patched != (story.written or b""):
        yield "the patch does not give what was in the workspace"
    if contents.get("transcript.ndjson", story.stdout) != story.stdout:
        yield "the transcript is not what was printed"
    if story.end == DONE:
        wrong = [n for n in range(story.files) if contents.get(f"made-{n}") != f"{n}\n".encode()]
        if wrong:
            yield f"files of the agent are missing or changed: {wrong}"


def no_agent_runs_twice(story: Story) -> Iterator[str]:
    """Unless the manifest says so; and what is completed was done by one."""
    told = sum(one["event"]["type"] == "agent_started" for one in story.records)
    for starts, who in ((story.starts, "by what the model heard"), (told, "by the journal")):
        if starts > 1 + story.retries:
            yield f"the agent ran {starts} times, {who}"
    if story.end == DONE and not (story.starts and told):
        yield "it is completed, and no agent ran"


def every_follower_has_the_journal(journals: dict, transcripts: dict) -> Iterator[str]:
    """What followers heard, however often they had to come back, is the journal: each event once, in order, to the end.

    journals: `{task id: frames}`; transcripts: `{(who, task id): frames}`.
    """
    for (who, task_id), heard in transcripts.items():
        wanted = journals[task_id]
        if heard != wanted:
            same = next((n for n, (a, b) in enumerate(zip(heard, wanted, strict=False)) if a != b), None)
            place = f"first at {same}: {heard[same]} and {wanted[same]}" if same is not None else "at the end"
            yield f"{who} of {task_id} heard {len(heard)} frames, the journal has {len(wanted)}; they differ {place}"


def _stdout_of(records):
    events = (one["event"] for one in records if one["event"]["type"] == "output")
    return "".join(event["text"] for event in events if event["stream"] == "stdout").encode()


def _without_last_line(text):
    return text[: text.rstrip(b"\n").rfind(b"\n") + 1]


def _compared(printed, written):
    lines = [text.count(b"\n") for text in (printed, written)]
    return f"{lines[0]} lines ({len(printed)} bytes) are journaled, {lines[1]} ({len(written)} bytes) were written"
