"""Binds the server's listening sockets, sets their options, and starts to listen."""

import errno
import socket
from collections.abc import Sequence
from ipaddress import ip_address

from sandbox.model.errors import SandboxError

UNREAD_BYTES_MAX = 32 * 1024
"""Bytes of unread requests that the kernel buffers per connection; the kernel doubles the value for overhead."""

UNSENT_BYTES_MAX = 128 * 1024
"""Bytes of a response that the kernel buffers for a client that does not read. The default is several megabytes."""

_LOOPBACK_HOSTS = ("127.0.0.1", "::1")
_EPHEMERAL_PORT_TRIES = 20
_BACKLOG = 2048
_NO_IPV6_ERRNOS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


class AddressError(SandboxError):
    """The server cannot listen on this address."""

    code = "address_unavailable"


class UnprotectedAddressError(SandboxError):
    """The address is reachable from other machines, and there are no tokens to authenticate the operator."""

    code = "address_open"

    def __init__(self, host: str) -> None:
        super().__init__(
            f"{host} is reachable from other machines, and no token exists. Create one for this data directory: "
            "sandbox token create --role operator   Or listen on 127.0.0.1, and connect from other machines "
            "through ssh -L."
        )


def is_externally_reachable(sockets: Sequence[socket.socket]) -> bool:
    """Return whether one of the bound sockets is reachable from another machine."""
    addresses = (bound.getsockname()[0].partition("%")[0] for bound in sockets)
    return not all(ip_address(address).is_loopback for address in addresses)


def bind(host: str, port: int, key: str = "port") -> list[socket.socket]:
    """Bind sockets to the same port. 127.0.0.1 and localhost include ::1 if IPv6 is available.

    Port 0 selects any free port. `key` is the port's name in the configuration. Raises AddressError.
    """
    hosts = _LOOPBACK_HOSTS if host in {"127.0.0.1", "localhost"} else (host,)
    for _ in range(_EPHEMERAL_PORT_TRIES if port == 0 else 1):
        try:
            return _bind_all(hosts, port)
        except OSError as error:
            cause = error
    raise _address_error(host, port, key, cause)


def listen(sockets: Sequence[socket.socket], key: str = "port") -> None:
    """Start accepting connections. The kernel refused all earlier connections, so no earlier request had an effect.

    Only listening reserves the port: with SO_REUSEADDR, another server can bind to it until then. Raises AddressError.
    """
    for bound in sockets:
        try:
            bound.listen(_BACKLOG)
        except OSError as error:
            host, port, *_ = bound.getsockname()
            raise _address_error(host, port, key, error) from None


def _address_error(host: str, port: int, key: str, cause: OSError) -> AddressError:
    return AddressError(
        f"Cannot listen on {host} port {port}: {cause.strerror}. Choose another port with --{key.replace('_', '-')} "
        f"(SANDBOX_{key.upper()}, server.{key} in sandbox.toml), or another address with --host."
    )


def _bind_all(hosts: tuple[str, ...], port: int) -> list[socket.socket]:
    """Bind a socket for each host.

    With port 0, the first socket selects a free port, and the others use the same one.
    """
    bound: list[socket.socket] = []
    try:
        for host in hosts:
            if (opened := _bind_one(host, port, is_optional=bool(bound))) is not None:
                bound.append(opened)
                port = opened.getsockname()[1]
    except OSError:
        for opened in bound:
            opened.close()
        raise
    return bound


def _bind_one(host: str, port: int, *, is_optional: bool) -> socket.socket | None:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    try:
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        if is_optional and error.errno in _NO_IPV6_ERRNOS:
            return None
        raise
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD_BYTES_MAX)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        if is_optional and error.errno in _NO_IPV6_ERRNOS:
            return None
        raise
    return opened
