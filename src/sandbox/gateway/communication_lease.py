"""A lease on the network: without contact with the server, a sandbox may communicate only until a deadline."""

import asyncio
import math
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def seconds_since_boot() -> float:
    """Return the seconds since the host booted, including the time in which the host was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


LEASE_EXPIRED_MESSAGE = "This host has lost contact with the server; the network is off until contact is restored."
"""The response to requests of the sandbox while the lease is expired."""

_SLEEP_SECONDS_MAX = 1.0
"""The event loop's clock stops while the host is suspended, so the deadline is checked again after this time."""

_USER_TIMEOUT_MS_MAX = 24 * 60 * 60 * 1000
"""Maximum value of TCP_USER_TIMEOUT, a 32-bit number. During a longer lease, data is discarded before the deadline."""


class LeaseExpiredError(ConnectionError):
    """The lease has expired, so nothing is sent."""


class CommunicationLease:
    """The deadline after which a gateway sends nothing.

    deadline: in seconds of `seconds_since_boot`.
    """

    def __init__(self, deadline: float, clock: Callable[[], float] = seconds_since_boot) -> None:
        self._deadline = deadline
        self._clock = clock
        self._renewed = asyncio.Event()
        self._sockets: WeakSet[LeasedSocket] = WeakSet()

    @property
    def seconds_left(self) -> float:
        """The time until the deadline; 0 or less after it."""
        return self._deadline - self._clock()

    @property
    def is_valid(self) -> bool:
        """Whether the deadline is in the future."""
        return self.seconds_left > 0

    def add(self, connection: "LeasedSocket") -> None:
        """Update the connection's timeout in the kernel whenever the lease is renewed."""
        self._sockets.add(connection)

    def renew(self, deadline: float) -> None:
        """Extend the lease. An earlier deadline has no effect, because renewals may arrive in any order."""
        if deadline > self._deadline:
            self._deadline = deadline
            self._renewed.set()
            for connection in list(self._sockets):
                with suppress(OSError):  # the connection is closed, or the new deadline is in the past too
                    connection.apply_lease()

    async def wait_until_valid(self) -> None:
        """Wait until the lease is valid."""
        while not self.is_valid:
            self._renewed.clear()
            await self._renewed.wait()

    async def wait_until_expired(self) -> None:
        """Wait until the lease has expired."""
        while (seconds := self.seconds_left) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(seconds, _SLEEP_SECONDS_MAX))


class LeasedSocket(socket.socket):
    """A TCP socket that refuses to connect and to send without a valid lease.

    asyncio may send buffered data long after it was written, for example in a process that was stopped and continued.
    Therefore, the lease is checked here, directly before the system call. Data that the kernel has buffered is
    discarded at the deadline (TCP_USER_TIMEOUT, tcp(7)), even if this process is stopped.
    """

    _lease: CommunicationLease

    @property
    def lease(self) -> CommunicationLease:
        """The lease, which must be set before the socket connects."""
        return self._lease

    @lease.setter
    def lease(self, lease: CommunicationLease) -> None:
        self._lease = lease
        lease.add(self)

    def connect(self, address: Any) -> None:
        """Connect. Raises LeaseExpiredError, OSError."""
        self.apply_lease()
        super().connect(address)

    def send(self, data: "ReadableBuffer", flags: int = 0, /) -> int:
        """Send data. Raises LeaseExpiredError, OSError."""
        self.apply_lease()
        return super().send(data, flags)

    def sendmsg(self, buffers: "Iterable[ReadableBuffer]", *arguments: Any) -> int:
        """Send data. Raises LeaseExpiredError, OSError."""
        self.apply_lease()
        return super().sendmsg(buffers, *arguments)

    def apply_lease(self) -> None:
        """Pass the current deadline to the kernel. Raises LeaseExpiredError, OSError."""
        milliseconds = math.ceil(self.lease.seconds_left * 1000)
        if milliseconds <= 0:
            raise LeaseExpiredError
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(milliseconds, _USER_TIMEOUT_MS_MAX))
