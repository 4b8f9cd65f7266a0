"""How frames become what one kind of client is sent."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Protocol

from sandbox.model.frame import Frame

Messages = Sequence[bytes]
"""What goes out together; nothing when all of it was filtered out."""


class View(Protocol):
    """Views that are equal show the same, so that clients can share what was encoded once."""

    def __hash__(self) -> int: ...

    def messages(self, frames: Sequence[Frame]) -> Messages:
        """What a client with this view is sent of these frames."""
        ...


async def seen_alone(frames: AsyncIterator[Frame], view: View) -> AsyncIterator[Messages]:
    """Frames that nobody shares, one at a time."""
    try:
        async for frame in frames:
            yield view.messages((frame,))
    finally:
        await close(frames)


async def close(source: AsyncIterator[Any]) -> None:
    """Let go of what a source holds."""
    if isinstance(source, AsyncGenerator):
        await source.aclose()
