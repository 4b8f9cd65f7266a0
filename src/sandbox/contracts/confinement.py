"""Where the host runs programs that read what is hostile: as the sandbox's kernel uid and in its control group."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from socket import socket
from typing import Protocol

import msgspec


class ConfinedCommand(msgspec.Struct, frozen=True):
    """A program to run to its end.

    directory: of the host, one of the confinement's or below one. stdin, stdout, stderr: descriptors, which stay the
    caller's. descriptors: further ones, numbered from FIRST_DESCRIPTOR on. files: path to content, to be read only.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: Path
    stdin: int
    stdout: int
    stderr: int
    descriptors: Sequence[int] = ()
    files: Mapping[str, bytes] = {}


CERTIFICATES = ("/etc/ssl/certs", "/etc/pki/ca-trust", "/etc/pki/tls/certs")
"""Directories of the host that programs in a confinement see by their own names, beside /usr."""

FIRST_DESCRIPTOR = 3
"""The number that the first of a command's further descriptors has; small, because shells know no others."""


class ConfinementLostError(OSError):
    """Somebody ended the confinement from outside, and what ran in it."""


class Confinement(Protocol):
    """Programs in it see the host's /usr, the directories that it was made with, side by side under their own names,
    and no network."""

    @property
    def door(self) -> socket | None:
        """Listens at 127.0.0.1:PROXY_PORT (of `inside`), which is all that can be connected to; None: the host's own
        network is in sight, because nothing is confined."""
        ...

    @property
    def memory_bytes(self) -> int | None:
        """What its programs may have together; None: as much as there is."""
        ...

    def has_killed_for_memory(self) -> bool:
        """The kernel ended one of its programs because that was used up."""
        ...

    async def run(self, command: ConfinedCommand) -> int:
        """Gives the exit code, 128+n after signal n. Cancelled, it kills the program and all that it started.

        Raises OSError, and ConfinementLostError where it has gone meanwhile.
        """
        ...


Confine = Callable[[Sequence[Path], Sequence[Path]], AbstractAsyncContextManager[Confinement]]
"""Makes one for an attempt, with directories that it may write to and others that it may read; they must exist.

What stands in the former afterwards is hostile: whoever reads or writes there follows no link.
Raises AttemptError (provision_failed). All is gone at the end of the block.
"""
