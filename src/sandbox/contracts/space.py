"""Room on the file system that the data directory is on."""

from collections.abc import Callable
from typing import Protocol

from sandbox.model.watermark import Space

MeasureSpace = Callable[[], Space]
"""What is free at the moment. Raises OSError."""


class Reserve(Protocol):
    """Room that is kept for writing what must not be lost when there is none any more."""

    @property
    def is_taken(self) -> bool:
        """Whether it is there to be given back. Raises OSError."""
        ...

    def take(self) -> None:
        """Keep it; again is fine. Raises OSError."""
        ...

    def give_back(self) -> bool:
        """Make room of it. Whether there was any to give. Raises nothing."""
        ...
