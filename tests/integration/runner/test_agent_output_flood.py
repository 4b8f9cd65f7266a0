"""An agent that writes nothing but line ends does not keep its runner from everything else."""

import asyncio
from collections import Counter

from doubles.attempt_dependencies import Script, Stage
from sandbox.interfaces.journal import read_records
from sandbox.model.events import Gap, Output, ToolCall

LINES = 5000
LINES_IN_A_TURN_MAX = 250
"""One turn of each of the two streams, and some room."""


def test_a_flood_of_lines_leaves_everybody_else_their_turn(tmp_path):
    scene = Stage(tmp_path, Script(stdout=b"\n" * LINES, stderr=b"\n" * LINES))
    turn, lines = 0, Counter()
    record = scene.recorder.record

    def counted(event):
        if isinstance(event, Output):
            lines[turn] += 1
        return record(event)

    scene.recorder.record = counted

    async def others():
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def story():
        other = asyncio.create_task(others())
        await scene.life.run()
        other.cancel()

    asyncio.run(story())
    scene.writer.close()
    assert lines.total() == 2 * LINES
    assert max(lines.values()) <= LINES_IN_A_TURN_MAX


def test_output_past_the_total_is_told_and_the_result_is_heard_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.runner.agent_output.OUTPUT_BYTES_MAX", 1000)
    scene = Stage(tmp_path, Script(stdout=b"+Bash\n" + b"line\n" * 100 + b"-Bash\n"))
    asyncio.run(scene.life.run())
    scene.writer.close()
    events = [record.event for record in read_records(scene.journals, "task-1")]
    kept = [event for event in events if isinstance(event, Output)]
    first, last = [event for event in events if isinstance(event, Gap)]
    assert scene.states[-1] == "completed"
    assert 0 < len(kept) < 10
    assert "not kept" in first.reason
    left_out_bytes = 6 + 500 + 6 - sum(len(event.data) for event in kept)
    assert last.reason.startswith(f"{left_out_bytes} bytes")
    assert scene.task.progress.tool_calls == 1


def test_a_flood_of_tool_calls_that_nobody_made_is_counted_and_does_not_fill_the_journal(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.runner.agent_output.OUTPUT_BYTES_MAX", 1000)
    monkeypatch.setattr("sandbox.runner.progress.TOOL_CALL_EVENTS_MAX", 10, raising=False)
    scene = Stage(tmp_path, Script(stdout=b"+Bash\n-Bash\n" * 1000))
    asyncio.run(scene.life.run())
    scene.writer.close()
    assert scene.states[-1] == "completed"
    assert len(scene.events(ToolCall)) == 10
    assert scene.task.progress.tool_calls == 1000
    assert any("tool calls" in gap.reason for gap in scene.events(Gap))
