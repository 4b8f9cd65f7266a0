"""The last line of a story on a terminal: what goes on now, for how long, at what price. It leaves no trace."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sandbox.cli.output.formatting import duration

if TYPE_CHECKING:
    from sandbox.cli.output.event_printer import Story

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
REFRESHES_PER_SECOND = 8


class NowLine:
    """Renders the moment; Rich asks again some times a second."""

    def __init__(self, story: Story, console: Console) -> None:
        self._story = story
        self._console = console
        self._shown = ""
        self._since = time.monotonic()

    def __rich__(self) -> Text:
        now = self._story.now
        if now != self._shown:
            self._shown, self._since = now, time.monotonic()
        seconds = time.monotonic() - self._since
        spinner = _SPINNER[int(time.monotonic() * REFRESHES_PER_SECOND) % len(_SPINNER)]
        took = duration(seconds) if seconds >= 10 else f"{int(seconds)} s"
        what = Text(now)
        tail = self._tail(took, what.cell_len)
        what.truncate(max(self._console.width - len(tail) - 3, 10), overflow="ellipsis")
        return Text.assemble((f"{spinner} ", "cyan"), what, (tail, "dim"), no_wrap=True, overflow="ellipsis")

    def _tail(self, took: str, wanted_cells: int) -> str:
        """Time and figures; where they would leave what goes on less than half of the window, the price is enough."""
        tails = ["  " + " · ".join([took, *figures]) for figures in (self._story.figures, self._story.figures[-1:])]
        room = min(wanted_cells, self._console.width // 2)
        return next((tail for tail in tails if len(tail) + 3 + room <= self._console.width), tails[-1])


def now_line(story: Story, console: Console) -> Live:
    """A context in which the line is shown below whatever is printed on `console`."""
    return Live(
        NowLine(story, console),
        console=console,
        transient=True,
        refresh_per_second=REFRESHES_PER_SECOND,
        redirect_stdout=False,
        redirect_stderr=False,
    )
