"""Show: what stands for stdout, where the attempt that was to show its own does not come."""

import asyncio

from sandbox.contracts.recorder import read_records
from sandbox.model.event import AgentExited, Output
from sandbox.runner.equipment import Attempt
from sandbox.runner.lines import LineSplitter


async def show_last_result(attempt: Attempt) -> None:
    """Make stdout of the agent's last end, unless it is there or the agent wrote it itself. Raises OSError."""
    claude = attempt.task.manifest.claude
    if not claude.headless or claude.output_format == "stream-json":
        return
    exited = await asyncio.to_thread(_find_unshown, attempt)
    if exited is None:
        return
    splitter = LineSplitter()
    text = attempt.equipment.agent.render(attempt.task.manifest, exited.result)
    for piece, continued in (*splitter.feed(text), *splitter.end()):
        attempt.recorder.record(Output.of("stdout", piece, continued=continued))


def _find_unshown(attempt: Attempt) -> AgentExited | None:
    exited = None
    for record in read_records(attempt.equipment.journals, attempt.task.id):
        if isinstance(record.event, Output) and record.event.stream == "stdout":
            return None
        if isinstance(record.event, AgentExited):
            exited = record.event
    return exited
