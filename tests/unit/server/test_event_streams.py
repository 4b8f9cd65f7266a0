"""A client that resumes after any record receives exactly the remaining events."""

import asyncio
import json
import tempfile
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from sandbox.agents.claude_code.output_parser import convert_recorded_line
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.store import IndexedTask
from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import JournalRecorder
from sandbox.model import events as e
from sandbox.model.fixed_limits import FOLLOW_BATCH_BYTES
from sandbox.model.task import StateHistoryEntry, Task
from sandbox.model.task_state import FINAL_STATES, TaskState
from sandbox.primitives import fair_client_shares
from sandbox.server.event_streams import Broadcast, EventStream
from sandbox.server.tracked_task import NoKnownOwner, TrackedTask

TO_RUNNING = (
    e.AttemptStarted("abcdefghijkl", "bubblewrap", "here"),
    e.WorkspacePrepared("c" * 40),
    e.SandboxCreated("vm", "bubblewrap", "host"),
    e.AgentStarted("s"),
)
UNPUBLISHED_LINES = 50


def test_status_message_is_shown_for_unfinished_tasks_only():
    states = {state: Task("t", manifest("t"), state, "Status", (), last_seq=1) for state in TaskState}
    tracked_task = TrackedTask(IndexedTask(states[TaskState.PENDING], 0), NoKnownOwner())
    tracked_task.status_message = "Waiting for 4 CPUs (0 free)"
    states_with_message = {
        state
        for state, task in states.items()
        if tracked_task.with_status_message(task).state_message == tracked_task.status_message
    }
    assert states_with_message == set(TaskState) - FINAL_STATES


PUBLISHED_OUTPUT = e.Output.from_bytes("stdout", b"seen\n")
TRANSCRIPT_OUTPUT = e.Output.from_bytes("transcript", b"not streamed to clients\n")

event_lists = st.lists(
    st.integers(0, 30_000).map(lambda size: e.Output.from_bytes("stdout", b"x" * size + b"\n"))
    | st.sampled_from([TRANSCRIPT_OUTPUT, e.Progress(turns=1), e.Gap(0, 0, "full")]),
    max_size=30,
)


def message_line(text):
    """Return a line of the agent's own event stream."""
    return json.dumps({"type": "assistant", "message": {"content": [{"type": "text", "text": text}]}}).encode() + b"\n"


class StreamedJournal:
    """A task's journal, and the successive servers that stream the journal."""

    def __init__(self, data_dir, **sections):
        self.journals, self.store = FileJournals(data_dir), MemoryStore()
        self.recorder = JournalRecorder(self.journals.create("task-1"), None, SystemClock().now)
        self.tracked_tasks = []
        self.record(e.TaskSubmitted("task-1", manifest(**sections)), *TO_RUNNING)
        self.start_server()

    def start_server(self):
        """Start a server that has read the journal up to its current end."""
        replayed = self.journals.replay("task-1")
        self.tracked_tasks.append(TrackedTask(IndexedTask(replayed.task, replayed.offset), NoKnownOwner()))
        self.stream = EventStream(
            {"task-1": self.tracked_tasks[-1]}, self.journals, self.store, Broadcast(), convert_recorded_line
        )

    def record(self, *events):
        for event in events:
            self.recorder.record(event)

    def update_index(self):
        for tracked_task in self.tracked_tasks:
            replayed = self.journals.replay("task-1", tracked_task.replay_state)
            tracked_task.update(replayed.task, replayed.offset)

    async def recorded_events(self, after):
        return [event async for event in self.stream.recorded_events("task-1", after=after)]

    async def follow(self, after):
        return [event async for event in self.stream.follow("task-1", after=after)]


@contextmanager
def streamed_journal(**sections):
    with tempfile.TemporaryDirectory() as directory:
        streamed = StreamedJournal(Path(directory), **sections)
        yield streamed
        streamed.recorder.writer.close()


def events_after(received, after):
    return [event for event in received if event["seq"] > after]


@given(event_lists)
def test_replay_after_any_record_returns_the_remaining_events(events):
    async def resume_after_each_record(streamed):
        all_events = await streamed.recorded_events(0)
        for after in (*range(streamed.recorder.writer.last_seq + 2), 2**62):
            assert await streamed.recorded_events(after) == events_after(all_events, after)
        return len(all_events)

    with streamed_journal() as streamed:
        streamed.record(*events)
        # Records that are not yet in the index are not streamed.
        assert asyncio.run(resume_after_each_record(streamed)) == 5
        streamed.update_index()
        assert asyncio.run(resume_after_each_record(streamed)) == 5 + len(events) - events.count(TRANSCRIPT_OUTPUT)


async def test_long_replay_without_events_yields_to_other_coroutines():
    async def replay_all(streamed):
        iterations = 0

        async def count_loop_iterations():
            nonlocal iterations
            while True:
                iterations += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(count_loop_iterations())
        await streamed.recorded_events(streamed.recorder.task.last_seq - UNPUBLISHED_LINES)
        other.cancel()
        return iterations

    with streamed_journal() as streamed:
        streamed.record(*[e.Output.from_bytes("transcript", b"x" * 100_000 + b"\n")] * UNPUBLISHED_LINES)
        streamed.update_index()
        assert (await replay_all(streamed)) >= UNPUBLISHED_LINES * 100_000 // FOLLOW_BATCH_BYTES


class ReadsPerLoopIteration:
    """The maximum number of journal batches read in one iteration of the event loop."""

    def __init__(self, journals, monkeypatch):
        self.maximum = self._count_in_iteration = 0
        read = journals.read

        def counted(*arguments, **options):
            self._count_in_iteration += 1
            self.maximum = max(self.maximum, self._count_in_iteration)
            return read(*arguments, **options)

        monkeypatch.setattr(journals, "read", counted)

    async def watch(self):
        while True:
            self._count_in_iteration = 0
            await asyncio.sleep(0)


async def replay_with_share(streamed, share, after):
    fair_client_shares.set_current_share(share)
    return await streamed.recorded_events(after)


@pytest.mark.parametrize("client_count", [1, 3])
async def test_readers_of_one_client_share_one_batch_per_loop_iteration(monkeypatch, client_count):
    async def replay_all(streamed, reads):
        shares = fair_client_shares.FairShares()
        clients = [shares.of(f"client {number % client_count}") for number in range(12)]
        watching = asyncio.create_task(reads.watch())
        after = streamed.recorder.task.last_seq - UNPUBLISHED_LINES - 1
        replayed = await asyncio.gather(
            *(asyncio.create_task(replay_with_share(streamed, share, after)) for share in clients)
        )
        watching.cancel()
        return replayed

    with streamed_journal() as streamed:
        streamed.record(
            PUBLISHED_OUTPUT, *[e.Output.from_bytes("transcript", b"x" * 100_000 + b"\n")] * UNPUBLISHED_LINES
        )
        streamed.update_index()
        reads = ReadsPerLoopIteration(streamed.journals, monkeypatch)
        replayed = await replay_all(streamed, reads)
        assert [[event["data"] for event in received] for received in replayed] == [["seen\n"]] * 12
        assert reads.maximum <= 2 * client_count


resumptions = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 70)), min_size=1, max_size=8)


@given(event_lists, event_lists, resumptions, st.integers(0, 30))
def test_resuming_client_receives_all_later_events(before, during, resumptions, restart_at):
    """resumptions: pairs of the step at which a client connects and the last `seq` that it has received."""

    async def run(streamed):
        followers = {}
        for step, event in enumerate([*during, *TO_COMPLETED]):
            if step == restart_at:
                streamed.start_server()
            for resumption in resumptions:
                if resumption[0] == step:
                    followers[resumption] = asyncio.create_task(streamed.follow(resumption[1]))
            streamed.record(event)
            await asyncio.sleep(0)
            streamed.update_index()
            await asyncio.sleep(0)
        all_events = await streamed.recorded_events(0)
        for (_, after), following in followers.items():
            # A client whose position is past the end receives the last event.
            assert await asyncio.wait_for(following, 10) == (events_after(all_events, after) or all_events[-1:])

    with streamed_journal() as streamed:
        streamed.record(*before)
        streamed.update_index()
        asyncio.run(run(streamed))


async def test_replay_of_the_last_events_reads_only_the_end_of_the_journal(monkeypatch):
    with streamed_journal() as streamed:
        streamed.record(*[e.Output.from_bytes("stdout", b"x" * 200 + b"\n")] * 3000)
        streamed.update_index()
        read, offsets = streamed.journals.read, []
        monkeypatch.setattr(
            streamed.journals,
            "read",
            lambda task_id, offset, bytes_max: offsets.append(offset) or read(task_id, offset, bytes_max=bytes_max),
        )
        assert len(await streamed.recorded_events(3000)) == 5
        assert streamed.tracked_tasks[0].offset - offsets[0] < 5 * 1000


OLD_RECORDS = (
    e.Output.from_bytes("stdout", message_line("Hello.")),
    e.Output.from_bytes("stdout", b"noise\n"),
    e.Output.from_bytes("stdout", b'{"type":"rate_limit_event"}\n'),
    e.Output.from_bytes("transcript", message_line("Rendered later.")),
    e.Output.from_bytes("transcript", b'{"type":"rate_limit_event"}\n'),
    e.Output.from_bytes("stderr", message_line("An error message.")),
)


async def test_output_of_earlier_versions_is_converted():
    with streamed_journal() as streamed:
        streamed.record(*OLD_RECORDS)
        streamed.update_index()
        events = (await streamed.recorded_events(0))[5:]
    texts = [[each["text"] for each in event.get("conversation", ())] for event in events]
    assert [event["type"] for event in events] == ["output", "output", "output", "conversation", "output"]
    assert texts == [["Hello."], [], [], ["Rendered later."], []]
    assert [event.get("parsed") for event in events] == [True, False, True, None, False]
    assert [event["seq"] for event in events] == [6, 7, 8, 9, 11]


async def test_output_with_conversation_events_is_not_converted():
    with streamed_journal() as streamed:
        streamed.record(e.Output.from_bytes("stdout", message_line("Hello."), is_parsed=True), e.AgentMessage("Hello."))
        streamed.update_index()
        output, message = (await streamed.recorded_events(0))[5:]
    assert "conversation" not in output
    assert (message["type"], message["text"]) == ("agent_message", "Hello.")


async def test_output_of_an_interactive_task_is_not_converted():
    with streamed_journal(claude={"headless": False}) as streamed:
        streamed.record(*OLD_RECORDS[:3])
        streamed.update_index()
        events = (await streamed.recorded_events(0))[5:]
    assert [event["parsed"] for event in events] == [False] * 3


async def test_line_that_is_expensive_to_convert_has_no_conversation():
    blocks = b'{"type":"text","text":"x"},' * 30_000
    line = b'{"type":"assistant","message":{"content":[%s{}]}}\n' % blocks
    with streamed_journal() as streamed:
        streamed.record(e.Output.from_bytes("stdout", line))
        streamed.update_index()
        (event,) = (await streamed.recorded_events(0))[5:]
    assert (event["parsed"], event["conversation"]) == (True, [])


async def test_memory_used_by_converted_output_is_counted():
    share = fair_client_shares.FairShare()
    fair_client_shares.set_current_share(share)
    line = json.dumps({"type": "result", "result": "\U0001f600" * 90_000}, ensure_ascii=False).encode() + b"\n"

    async def reserved_bytes(*, is_parsed):
        with streamed_journal() as streamed:
            streamed.record(e.Output.from_bytes("stdout", line, is_parsed=is_parsed))
            streamed.update_index()
            held = [
                share.memory.reserved_bytes
                async for event in streamed.stream.recorded_events("task-1")
                if "data" in event
            ]
        assert share.memory.reserved_bytes == 0
        return held[-1]

    assert await reserved_bytes(is_parsed=False) - await reserved_bytes(is_parsed=True) > 4 * 80_000


class FollowedStates:
    """An event stream from an in-memory index, and the events that its follower received."""

    def __init__(self):
        self.store, self.broadcast = MemoryStore(), Broadcast()
        self.stream = EventStream({}, None, self.store, self.broadcast, None)

    def save(self, task_id, state):
        history = (StateHistoryEntry(state, datetime(2026, 1, 29, tzinfo=UTC)),)
        self.store.save(IndexedTask(Task(task_id, manifest(task_id), state, "Status", history, last_seq=1), 0))
        self.broadcast.notify_state_change()

    async def next_changes(self, iterator, count):
        async with asyncio.timeout(10):
            changed = [await anext(iterator) for _ in range(count)]
        events = [each.events[0] for each in changed]
        return [(event["task_id"], event["new_state"]) for event in events], changed[-1].position


async def test_states_are_followed_and_resumed_without_gaps():
    followed = FollowedStates()
    followed.save("old", TaskState.RUNNING)
    iterator = followed.stream.follow_states(None)
    position = await anext(iterator)
    followed.save("a", TaskState.PENDING)
    changes, _ = await followed.next_changes(iterator, 1)
    assert changes == [("a", "pending")]
    followed.save("a", TaskState.STAGING)
    followed.save("a", TaskState.FAILED)
    followed.save("b", TaskState.PENDING)
    assert (await followed.next_changes(iterator, 2))[0] == [("a", "failed"), ("b", "pending")]
    await iterator.aclose()

    resumed = followed.stream.follow_states(position)
    assert await anext(resumed) == position
    changes, position = await followed.next_changes(resumed, 2)
    assert changes == [("a", "failed"), ("b", "pending")]
    assert [each async for each in followed.stream.follow_states(position, is_live=False)] == [position]
    waiting = asyncio.ensure_future(anext(resumed))
    followed.save("old", TaskState.COMPLETED)
    assert (await asyncio.wait_for(waiting, 10)).events[0]["task_id"] == "old"


async def test_many_changed_tasks_are_read_in_parts(monkeypatch):
    monkeypatch.setattr("sandbox.server.event_streams._CHANGED_TASKS_PER_READ", 3)
    followed = FollowedStates()
    begin = followed.store.last_change_position()
    for number in range(10):
        followed.save(f"t{number}", TaskState.PENDING)
    iterator = followed.stream.follow_states(begin)
    await anext(iterator)
    changes, position = await followed.next_changes(iterator, 10)
    assert [task_id for task_id, _ in changes] == [f"t{number}" for number in range(10)]
    assert position == followed.store.last_change_position()
