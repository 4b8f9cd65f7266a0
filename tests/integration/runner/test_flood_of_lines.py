"""An agent that writes nothing but line ends does not keep its runner from everything else."""

import asyncio
from collections import Counter

from doubles.attempt_equipment import Script, Stage
from sandbox.model.event import Output

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
        await scene.life.carry_out()
        other.cancel()

    asyncio.run(story())
    scene.writer.close()
    assert lines.total() == 2 * LINES
    assert max(lines.values()) <= LINES_IN_A_TURN_MAX
