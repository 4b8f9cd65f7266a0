"""What the launcher needs to become a sandbox's program."""

import os
from collections.abc import Iterable

import msgspec

from sandbox.model.errors import AttemptError, FailureCode
from sandbox.runtimes import launcher


class Payload(msgspec.Struct):
    """An argv, and files in memory by the numbers that they have there."""

    argv: list[str] = []
    descriptors: list[int] = []

    def place(self, descriptor: int) -> str:
        """Take a descriptor over; gives its number in the launcher."""
        self.descriptors.append(descriptor)
        return str(launcher.FIRST_DESCRIPTOR + len(self.descriptors) - 1)

    def close(self) -> None:
        """Close them once they are sent."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def refuse_nul(words: Iterable[str]) -> None:
    """Raises AttemptError (provision_failed) for words that the kernel would cut short."""
    if any("\0" in word for word in words):
        raise AttemptError(FailureCode.PROVISION_FAILED, "A NUL character cannot be in an argument or the environment.")
