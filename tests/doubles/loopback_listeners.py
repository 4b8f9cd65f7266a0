"""The gateway's listeners on free loopback ports, for tests that need no network namespace."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from sandbox.interfaces.runtime import Listeners


@contextmanager
def loopback_listeners() -> Iterator[Listeners]:
    """Yield listeners like a runtime's, but on free ports; `listeners.model.getsockname()` etc. return the ports."""
    listeners = Listeners(
        model=_tcp(),
        proxy=_tcp(),
        dns_udp=_udp(),
        dns_tcp=_tcp(),
        transparent={80: _tcp(), 443: _tcp()},
    )
    try:
        yield listeners
    finally:
        for listener in (
            listeners.model,
            listeners.proxy,
            listeners.dns_udp,
            listeners.dns_tcp,
            *listeners.transparent.values(),
        ):
            listener.close()


def _tcp() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=512)


def _udp() -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.bind(("127.0.0.1", 0))
    return listener
