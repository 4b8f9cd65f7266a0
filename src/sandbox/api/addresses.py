"""The sockets that the server listens on."""

import errno
import socket
from collections.abc import Sequence
from ipaddress import ip_address

from sandbox.model.errors import SandboxError

_LOOPBACKS = ("127.0.0.1", "::1")
_FREE_PORT_TRIES = 20
_BACKLOG = 2048
_NO_IPV6 = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


class AddressError(SandboxError):
    """The server cannot listen there."""

    code = "address_unavailable"


class OpenAddressError(SandboxError):
    """Others than this machine's users reach the address, and nothing tells them apart from the operator."""

    code = "address_open"

    def __init__(self, host: str) -> None:
        super().__init__(
            f"{host} can be reached from other machines, and there is no token to ask them for. Make one for this "
            "data directory with: sandbox token create --role operator   Or listen on 127.0.0.1, and reach it from "
            "elsewhere through ssh -L."
        )


def is_open(sockets: Sequence[socket.socket]) -> bool:
    """Whether one of the bound sockets can be reached from another machine."""
    addresses = (bound.getsockname()[0].partition("%")[0] for bound in sockets)
    return not all(ip_address(address).is_loopback for address in addresses)


def bind(host: str, port: int, key: str = "port") -> list[socket.socket]:
    """Bound sockets, all on one port; 127.0.0.1 and localhost bring ::1 along where there is IPv6.

    Port 0 means any free port; `key` of the configuration says which one. Raises AddressError.
    """
    hosts = _LOOPBACKS if host in {"127.0.0.1", "localhost"} else (host,)
    for _ in range(_FREE_PORT_TRIES if port == 0 else 1):
        try:
            return _bind_all(hosts, port)
        except OSError as error:
            cause = error
    raise _taken(host, port, key, cause)


def listen(sockets: Sequence[socket.socket], key: str = "port") -> None:
    """Take clients from now on. Who comes earlier is refused, and knows that nothing was done. Raises AddressError.

    Only who listens has the port: SO_REUSEADDR lets another server bind to it until then.
    """
    for bound in sockets:
        try:
            bound.listen(_BACKLOG)
        except OSError as error:
            host, port, *_ = bound.getsockname()
            raise _taken(host, port, key, error) from None


def _taken(host: str, port: int, key: str, cause: OSError) -> AddressError:
    return AddressError(
        f"Cannot listen on {host} port {port}: {cause.strerror}. Choose another port with --{key.replace('_', '-')} "
        f"(SANDBOX_{key.upper()}, server.{key} in sandbox.toml), or another address with --host."
    )


def _bind_all(hosts: tuple[str, ...], port: int) -> list[socket.socket]:
    """With port 0 the first socket takes a free port, and the other ones the same."""
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
        if is_optional and error.errno in _NO_IPV6:
            return None
        raise
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        if is_optional and error.errno in _NO_IPV6:
            return None
        raise
    return opened
