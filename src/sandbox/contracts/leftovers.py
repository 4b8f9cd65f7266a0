"""What attempts that are over have left on a machine beside their files."""

from collections.abc import Collection
from typing import Protocol

from sandbox.contracts.layout import AttemptLayout


class Leftovers(Protocol):
    """Of one kind. Whether an attempt is over, and whose it is, the caller knows: it holds the task's lock."""

    @property
    def kind(self) -> str:
        """In a word or two, for operators."""
        ...

    @property
    def is_private(self) -> bool:
        """Whether what is found is this server's by its place, so that nobody else can have it in use."""
        ...

    def attempt_ids(self) -> Collection[str]:
        """Attempts of which something is there, whoever's they are. Blocks. Raises OSError."""
        ...

    async def end(self, attempt_id: str, files: AttemptLayout) -> None:
        """End what is there of an attempt that nobody carries out any more; again is fine.

        Raises AttemptError, OSError.
        """
        ...
