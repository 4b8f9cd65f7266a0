"""The only network access of a confined clone: a SOCKS proxy in the runner, on the confinement's proxy listener.

git resolves no names and opens no other connections. git requests a host, and the proxy connects git only to the
clone's remote and, if redirects are allowed, to other public hosts. Bytes are relayed unchanged; TLS ends in the
confinement.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple

from sandbox.primitives.concurrency import accept_connection
from sandbox.primitives.message_stream import StreamPair

CLONE_CONNECT_TIMEOUT_SECONDS = 30.0
"""Time limit for resolving the remote's name and connecting to one of its addresses. After that, the clone fails."""

CLONE_CONNECTIONS_MAX = 32
"""Maximum number of concurrent connections of a clone; additional ones wait. Each uses two file descriptors."""

_ACCEPT_RETRY_SECONDS = 0.1
_CHUNK_BYTES = 256 * 1024
_WEB_PORTS = (80, 443)
_SUCCEEDED, _NOT_ALLOWED, _HOST_UNREACHABLE, _NAME_NOT_RESOLVED, _CONNECTION_REFUSED = 0, 2, 3, 4, 5
_ADDRESS_IPV4, _ADDRESS_DOMAIN, _ADDRESS_IPV6 = 1, 3, 4
_NAT64_PREFIX = IPv6Network("64:ff9b::/96")
"""RFC 6052: prefix under which machines without IPv4 reach IPv4 addresses."""


class DialPolicy(NamedTuple):
    """Determines which addresses a clone may connect to.

    is_public: returns whether an address is public and belongs to another host. follows_redirects: whether a clone may
    follow redirects.
    """

    is_public: Callable[[IPv4Address | IPv6Address], bool]
    follows_redirects: bool


class HostPort(NamedTuple):
    """A host, by name or address, and a port."""

    host: str
    port: int


def canonical_host(host: str) -> str:
    """Normalize a host. An IPv4 address may be in short, octal or hexadecimal form."""
    name = host.lower().rstrip(".")
    with suppress(ValueError):
        return ip_address(name).compressed
    with suppress(OSError):
        return socket.inet_ntoa(socket.inet_aton(name))
    return name


class SocksProxy:
    """Connects to `target` and, if redirects are followed, to other ports of its host and web ports of public hosts.

    Once the target has been resolved to a public address, only public addresses are dialed for it: the owner of its
    name could make the name resolve to this machine. upstream_proxy: the proxy of the server's user. If there is one,
    all connections go to it, and it interprets what git sends.
    """

    def __init__(self, target: HostPort, *, upstream_proxy: HostPort | None, dial_policy: DialPolicy) -> None:
        self._target = target
        self._upstream_proxy = upstream_proxy
        self._dial_policy = dial_policy
        self._has_public_address = False

    @asynccontextmanager
    async def serving(self, listener: socket.socket) -> AsyncIterator[None]:
        """Accept connections on the listener until the block ends, then close all connections."""
        serving: set[asyncio.Task[None]] = set()
        slots = asyncio.Semaphore(CLONE_CONNECTIONS_MAX)

        def end(task: asyncio.Task[None]) -> None:
            serving.discard(task)
            slots.release()

        async def accept() -> None:
            while True:
                await slots.acquire()
                try:
                    client = await accept_connection(listener)
                except OSError:  # git has already exited, or no descriptor is left
                    slots.release()
                    await asyncio.sleep(_ACCEPT_RETRY_SECONDS)
                    continue
                task = asyncio.create_task(self._serve(client))
                serving.add(task)
                task.add_done_callback(end)

        listener.setblocking(False)
        accepting = asyncio.create_task(accept())
        try:
            yield
        finally:
            accepting.cancel()
            for task in serving:
                task.cancel()
            await asyncio.gather(accepting, *serving, return_exceptions=True)

    async def _serve(self, client: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=client)
        try:
            if self._upstream_proxy is not None:
                remote = await asyncio.wait_for(
                    asyncio.open_connection(*self._upstream_proxy), CLONE_CONNECT_TIMEOUT_SECONDS
                )
            else:
                remote = await self._negotiate(reader, writer)
            await _relay_streams((reader, writer), remote)
        except (OSError, TimeoutError, ValueError, EOFError):
            pass
        finally:
            writer.transport.abort()

    async def _negotiate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> StreamPair:
        """Serve SOCKS5 (RFC 1928), without authentication and with CONNECT only."""
        async with asyncio.timeout(CLONE_CONNECT_TIMEOUT_SECONDS):
            _, methods = await reader.readexactly(2)
            await reader.readexactly(methods)
            writer.write(b"\x05\x00")
            address = await _read_address(reader)
        try:
            async with asyncio.timeout(CLONE_CONNECT_TIMEOUT_SECONDS):
                remote = await self._dial(address)
        except OSError as error:
            writer.write(_encode_reply(_reply_code(error)))
            await writer.drain()
            raise
        writer.write(_encode_reply(_SUCCEEDED))
        return remote

    async def _dial(self, address: HostPort) -> StreamPair:
        is_target = self._is_target(address)
        if not is_target and not (self._dial_policy.follows_redirects and address.port in _WEB_PORTS):
            # Refuse the host before resolving it: a DNS name could exfiltrate data that a clone has read, and the
            # response would show which names exist.
            raise _not_allowed_error()
        loop = asyncio.get_running_loop()
        resolved = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        addresses = [HostPort(str(one[4][0]), address.port) for one in resolved]
        public = [one for one in addresses if self._dial_policy.is_public(_unmap_nat64(one.host))]
        if not is_target:
            return await _dial_any(public)
        self._has_public_address = self._has_public_address or bool(public)
        return await _dial_any(public if self._has_public_address else addresses)

    def _is_target(self, address: HostPort) -> bool:
        return address == self._target or (self._dial_policy.follows_redirects and address.host == self._target.host)


async def _read_address(reader: asyncio.StreamReader) -> HostPort:
    _, command, _, kind = await reader.readexactly(4)
    if command != 1:
        raise ValueError("only CONNECT is supported")
    if kind == _ADDRESS_IPV4:
        host = socket.inet_ntop(socket.AF_INET, await reader.readexactly(4))
    elif kind == _ADDRESS_IPV6:
        host = socket.inet_ntop(socket.AF_INET6, await reader.readexactly(16))
    else:
        (length,) = await reader.readexactly(1)
        host = (await reader.readexactly(length)).decode("ascii")
    (port,) = struct.unpack("!H", await reader.readexactly(2))
    return HostPort(canonical_host(host), port)


def _unmap_nat64(host: str) -> IPv4Address | IPv6Address:
    """Return the IPv4 address in a NAT64 address; return any other address unchanged."""
    address = ip_address(host)
    return IPv4Address(address.packed[-4:]) if address in _NAT64_PREFIX else address


async def _dial_any(addresses: Sequence[HostPort]) -> StreamPair:
    last_error = _not_allowed_error()
    for address in addresses:
        try:
            return await asyncio.open_connection(*address)
        except OSError as error:
            last_error = error
    raise last_error


def _not_allowed_error() -> OSError:
    return OSError(errno.EACCES, "this host is not allowed")


def _encode_reply(code: int) -> bytes:
    return bytes([5, code, 0, _ADDRESS_IPV4]) + bytes(6)


def _reply_code(error: OSError) -> int:
    if isinstance(error, socket.gaierror):
        return _NAME_NOT_RESOLVED
    return {errno.EACCES: _NOT_ALLOWED, errno.ECONNREFUSED: _CONNECTION_REFUSED}.get(
        error.errno or 0, _HOST_UNREACHABLE
    )


async def _relay_streams(client: StreamPair, remote: StreamPair) -> None:
    """Copy data in both directions until both sides have closed."""
    try:
        await asyncio.gather(_copy_stream(client[0], remote[1]), _copy_stream(remote[0], client[1]))
    finally:
        remote[1].transport.abort()


async def _copy_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()
