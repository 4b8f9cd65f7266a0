"""The last line of a story on a terminal: what goes on now, for how long, at what price. It leaves no trace."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sandbox.cli.figures import duration

if TYPE_CHECKING:
    from sandbox.cli.story import Story

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
        tail = "  " + " · ".join(part for part in (took, self._story.figures) if part)
        what = Text(now)
        what.truncate(max(self._console.width - len(tail) - 4, 10), overflow="ellipsis")
        return Text.assemble((f"{spinner} ", "cyan"), what, (tail, "dim"), no_wrap=True, overflow="ellipsis")


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
