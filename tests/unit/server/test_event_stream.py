"""Whoever comes back after any record is told exactly the rest, from wherever in the journal that begins."""

import asyncio
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.journal import Recorder, replay_task
from sandbox.interfaces.store import IndexedTask
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e
from sandbox.model.limits import FOLLOW_BATCH_BYTES
from sandbox.model.task import Task
from sandbox.model.task_state import TERMINAL_STATES, TaskState
from sandbox.server.broadcast import Broadcast
from sandbox.server.event_stream import EventStream
from sandbox.server.journal_tailer import JournalTailer
from sandbox.server.tracked_task import TrackedTask
from sandbox.system import fair_share

TO_RUNNING = (
    e.AttemptStarted("abcdefghijkl", "bubblewrap", "here"),
    e.WorkspacePrepared("c" * 40),
    e.SandboxCreated("vm", "bubblewrap", "host"),
    e.AgentStarted("s"),
)
UNSEEN_LINES = 50


def test_a_task_that_has_ended_waits_for_nothing_whatever_its_feed_was_told():
    states = {state: Task("t", manifest("t"), state, "So it is", (), last_seq=1) for state in TaskState}
    feed = TrackedTask(IndexedTask(states[TaskState.PENDING], 0))
    feed.status_message = "Waiting for 4 CPUs (0 free)"
    told = {
        state for state, task in states.items() if feed.with_status_message(task).state_message == feed.status_message
    }
    assert told == set(TaskState) - TERMINAL_STATES


TO_END = (e.AgentExited(0, {"is_error": False}), e.TaskFinished())

SEEN = e.Output.from_bytes("stdout", b"seen\n")
UNSEEN = e.Output.from_bytes("transcript", b"what no client is shown\n")

happenings = st.lists(
    st.integers(0, 30_000).map(lambda size: e.Output.from_bytes("stdout", b"x" * size + b"\n"))
    | st.sampled_from([UNSEEN, e.Progress(turns=1), e.Gap(0, 0, "full")]),
    max_size=30,
)


class Story:
    """A task's journal, and the servers that told of it, one after the other."""

    def __init__(self, data_dir):
        self.journals, self.store = FileJournals(data_dir), MemoryStore()
        self.recorder = Recorder(self.journals.create("task-1"), None, SystemClock().now)
        self.feeds = []
        self.play(e.TaskSubmitted("task-1", manifest()), *TO_RUNNING)
        self.start_server()

    def start_server(self):
        """It knows the task as far as the journal reaches now."""
        reading = replay_task(self.journals, "task-1")
        follower = JournalTailer(self.journals, self.store, SystemClock(), Broadcast())
        self.feeds.append(TrackedTask(IndexedTask(reading.task, reading.offset)))
        follower.tracked_tasks["task-1"] = self.feeds[-1]
        self.telling = EventStream(self.journals, self.store, follower, Broadcast())

    def play(self, *events):
        for event in events:
            self.recorder.record(event)

    def learn(self):
        for feed in self.feeds:
            reading = replay_task(self.journals, "task-1", feed.reading)
            feed.update(reading.task, reading.offset)

    async def told(self, after):
        return [frame async for frame in self.telling.replay("task-1", after=after)]

    async def followed(self, after):
        return [frame async for frame in self.telling.follow("task-1", after=after)]


@contextmanager
def a_story():
    with tempfile.TemporaryDirectory() as directory:
        story = Story(Path(directory))
        yield story
        story.recorder.writer.close()


def rest(frames, after):
    return [frame for frame in frames if frame["seq"] > after]


@given(happenings)
def test_what_is_there_now_is_told_past_any_record(events):
    async def come_back_after_everything(story):
        whole = await story.told(0)
        for after in (*range(story.recorder.writer.last_seq + 2), 2**62):
            assert await story.told(after) == rest(whole, after)
        return len(whole)

    with a_story() as story:
        story.play(*events)
        # What the journal has and the index does not know yet is told to nobody.
        assert asyncio.run(come_back_after_everything(story)) == 5
        story.learn()
        assert asyncio.run(come_back_after_everything(story)) == 5 + len(events) - events.count(UNSEEN)


def test_others_have_their_turn_while_a_long_story_shows_nothing():
    async def tell(story):
        turns = 0

        async def take_turns():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(take_turns())
        await story.told(story.recorder.task.last_seq - UNSEEN_LINES)
        other.cancel()
        return turns

    with a_story() as story:
        story.play(*[e.Output.from_bytes("transcript", b"x" * 100_000 + b"\n")] * UNSEEN_LINES)
        story.learn()
        assert asyncio.run(tell(story)) >= UNSEEN_LINES * 100_000 // FOLLOW_BATCH_BYTES


class ReadsPerTurn:
    """The most batches of a journal that were read in one turn of the event loop."""

    def __init__(self, journals, monkeypatch):
        self.most = self._now = 0
        read = journals.read

        def counted(*arguments, **options):
            self._now += 1
            self.most = max(self.most, self._now)
            return read(*arguments, **options)

        monkeypatch.setattr(journals, "read", counted)

    async def watch(self):
        while True:
            self._now = 0
            await asyncio.sleep(0)


async def told_to(story, share, after):
    fair_share.use(share)
    return await story.told(after)


@pytest.mark.parametrize("client_count", [1, 3])
def test_many_readers_of_one_client_read_one_batch_a_turn_also_where_it_shows_nothing(monkeypatch, client_count):
    async def tell(story, reads):
        shares = fair_share.FairShares()
        clients = [shares.of(f"client {number % client_count}") for number in range(12)]
        watching = asyncio.create_task(reads.watch())
        begin = story.recorder.task.last_seq - UNSEEN_LINES - 1
        told = await asyncio.gather(*(asyncio.create_task(told_to(story, share, begin)) for share in clients))
        watching.cancel()
        return told

    with a_story() as story:
        story.play(SEEN, *[e.Output.from_bytes("transcript", b"x" * 100_000 + b"\n")] * UNSEEN_LINES)
        story.learn()
        reads = ReadsPerTurn(story.journals, monkeypatch)
        told = asyncio.run(tell(story, reads))
        assert [[frame["data"] for frame in frames] for frames in told] == [["seen\n"]] * 12
        assert reads.most <= 2 * client_count


comings = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 70)), min_size=1, max_size=8)


@given(happenings, happenings, comings, st.integers(0, 30))
def test_who_comes_back_while_the_task_works_is_told_the_rest_to_the_end(before, during, comings, restart_at):
    """comings: after which of the events somebody comes, and the last record that it has seen."""

    async def play(story):
        followers = {}
        for step, event in enumerate([*during, *TO_END]):
            if step == restart_at:
                story.start_server()
            for coming in comings:
                if coming[0] == step:
                    followers[coming] = asyncio.create_task(story.followed(coming[1]))
            story.play(event)
            await asyncio.sleep(0)
            story.learn()
            await asyncio.sleep(0)
        whole = await story.told(0)
        for (_, after), told in followers.items():
            # A place past the end is told the end all the same.
            assert await asyncio.wait_for(told, 10) == (rest(whole, after) or whole[-1:])

    with a_story() as story:
        story.play(*before)
        story.learn()
        asyncio.run(play(story))


def test_who_has_nearly_everything_has_nearly_nothing_read_for_it(monkeypatch):
    with a_story() as story:
        story.play(*[e.Output.from_bytes("stdout", b"x" * 200 + b"\n")] * 3000)
        story.learn()
        read, offsets = story.journals.read, []
        monkeypatch.setattr(
            story.journals,
            "read",
            lambda task_id, offset, bytes_max: offsets.append(offset) or read(task_id, offset, bytes_max=bytes_max),
        )
        assert len(asyncio.run(story.told(3000))) == 5
        assert story.feeds[0].offset - offsets[0] < 5 * 1000
