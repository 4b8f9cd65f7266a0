"""An agent that floods its output does not starve the other coroutines of its runner."""

import asyncio
from collections import Counter

from doubles.attempt_harness import AttemptHarness, AttemptScript
from sandbox.model.events import Gap, Output, ToolCallEnded
from sandbox.runner.attempt_context import read_records

LINES = 5000
LINES_PER_LOOP_ITERATION_MAX = 250
"""The maximum for the total of both streams, with a margin."""


async def test_line_flood_does_not_starve_other_coroutines(tmp_path):
    harness = AttemptHarness(tmp_path, AttemptScript(stdout=b"\n" * LINES, stderr=b"\n" * LINES))
    iteration, lines = 0, Counter()
    record = harness.recorder.record

    def count_lines(event):
        if isinstance(event, Output):
            lines[iteration] += 1
        return record(event)

    harness.recorder.record = count_lines

    async def count_iterations():
        nonlocal iteration
        while True:
            iteration += 1
            await asyncio.sleep(0)

    async def scenario():
        counter = asyncio.create_task(count_iterations())
        await harness.run()
        counter.cancel()

    await scenario()
    harness.writer.close()
    assert lines.total() == 2 * LINES
    assert max(lines.values()) <= LINES_PER_LOOP_ITERATION_MAX


async def test_output_above_the_total_limit_is_parsed_but_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.runner.agent_output.OUTPUT_BYTES_MAX", 1000)
    harness = AttemptHarness(tmp_path, AttemptScript(stdout=b"+Bash\n" + b"line\n" * 100 + b"-Bash\n"))
    await harness.run()
    harness.writer.close()
    events = [record.event for record in read_records(harness.journals, "task-1")]
    stored = [event for event in events if isinstance(event, Output)]
    first, last = [event for event in events if isinstance(event, Gap)]
    assert harness.states[-1] == "completed"
    assert 0 < len(stored) < 10
    assert "MiB is dropped" in first.reason
    skipped_bytes = 6 + 500 + 6 - sum(len(event.data) for event in stored)
    assert last.reason.startswith(f"{skipped_bytes} bytes")
    assert harness.task.progress.tool_calls == 1


async def test_flood_of_fake_tool_calls_is_counted_without_filling_the_journal(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.runner.agent_output.OUTPUT_BYTES_MAX", 1000)
    monkeypatch.setattr("sandbox.runner.progress_and_conversation_recorder.TOOL_CALL_EVENTS_MAX", 10, raising=False)
    harness = AttemptHarness(tmp_path, AttemptScript(stdout=b"+Bash\n-Bash\n" * 1000))
    await harness.run()
    harness.writer.close()
    assert harness.states[-1] == "completed"
    assert len(harness.events(ToolCallEnded)) == 10
    assert harness.task.progress.tool_calls == 1000
    assert any("Tool calls" in gap.reason for gap in harness.events(Gap))
