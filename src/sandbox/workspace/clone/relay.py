"""The only way out of a confined clone: a SOCKS proxy in the runner, at the confinement's door.

Git resolves no name and dials nothing: it asks for a host, and is connected to the one that it was told to clone from.
Bytes are passed on as they are; TLS ends in the confinement.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple

CLONE_CONNECT_SECONDS = 30.0
"""For the name of a clone's host to resolve and one of its addresses to answer; then the clone fails."""

CLONE_CONNECTIONS_MAX = 32
"""At once, two descriptors of the runner's each; git itself needs a handful. A further one waits at the door."""

_REST_SECONDS = 0.1
_CHUNK_BYTES = 256 * 1024
_WEB_PORTS = (80, 443)
_GRANTED, _FORBIDDEN, _UNREACHABLE, _UNKNOWN_NAME, _REFUSED = 0, 2, 3, 4, 5
_IPV4, _NAME, _IPV6 = 1, 3, 4
_TRANSLATED = IPv6Network("64:ff9b::/96")
"""RFC 6052: an IPv4 address as machines without IPv4 reach it."""


class Reach(NamedTuple):
    """is_public: which addresses are other hosts' public ones. follows_redirects: whether a clone may be sent on."""

    is_public: Callable[[IPv4Address | IPv6Address], bool]
    follows_redirects: bool


class Address(NamedTuple):
    """A host, by name or address, and a port."""

    host: str
    port: int


def canonical(host: str) -> str:
    """One spelling of a host, however it was written: of an IPv4 address too the short, octal and hexadecimal forms."""
    name = host.lower().rstrip(".")
    with suppress(ValueError):
        return ip_address(name).compressed
    with suppress(OSError):
        return socket.inet_ntoa(socket.inet_aton(name))
    return name


class Relay:
    """Connects to `wanted`; where redirects are followed also to other ports of its host, and to the web's ports of
    public addresses.

    A host that was found at a public address is not followed to others: whoever owns its name could name this machine.
    via: the proxy of the server's user; then everything goes there, and what git says is for that proxy to read.
    """

    def __init__(self, wanted: Address, *, via: Address | None, reach: Reach) -> None:
        self._wanted = wanted
        self._via = via
        self._reach = reach
        self._was_public = False

    @asynccontextmanager
    async def serving(self, door: socket.socket) -> AsyncIterator[None]:
        """Answer at the door until the block ends; then every connection is cut."""
        serving: set[asyncio.Task[None]] = set()
        room = asyncio.Semaphore(CLONE_CONNECTIONS_MAX)

        def end(task: asyncio.Task[None]) -> None:
            serving.discard(task)
            room.release()

        async def accept() -> None:
            while True:
                await room.acquire()
                try:
                    client, _ = await asyncio.get_running_loop().sock_accept(door)
                except OSError:  # git is gone already, or there is no descriptor left
                    room.release()
                    await asyncio.sleep(_REST_SECONDS)
                    continue
                task = asyncio.create_task(self._serve(client))
                serving.add(task)
                task.add_done_callback(end)

        door.setblocking(False)
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
            if self._via is not None:
                far = await asyncio.wait_for(asyncio.open_connection(*self._via), CLONE_CONNECT_SECONDS)
            else:
                far = await self._negotiate(reader, writer)
            await _join((reader, writer), far)
        except (OSError, TimeoutError, ValueError, EOFError):
            pass
        finally:
            writer.transport.abort()

    async def _negotiate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> "Ends":
        """RFC 1928, without authentication, CONNECT only."""
        async with asyncio.timeout(CLONE_CONNECT_SECONDS):
            _, methods = await reader.readexactly(2)
            await reader.readexactly(methods)
            writer.write(b"\x05\x00")
            address = await _read_address(reader)
        try:
            async with asyncio.timeout(CLONE_CONNECT_SECONDS):
                far = await self._dial(address)
        except OSError as error:
            writer.write(_answer(_code_of(error)))
            await writer.drain()
            raise
        writer.write(_answer(_GRANTED))
        return far

    async def _dial(self, address: Address) -> "Ends":
        is_wanted = self._is_wanted(address)
        if not is_wanted and not (self._reach.follows_redirects and address.port in _WEB_PORTS):
            # Not even asked for: a name can carry what a clone has read, and its answer tells what names there are.
            raise _forbidden()
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        addresses = [Address(str(one[4][0]), address.port) for one in found]
        public = [one for one in addresses if self._reach.is_public(_translated(one.host))]
        if not is_wanted:
            return await _dial_any(public)
        self._was_public = self._was_public or bool(public)
        return await _dial_any(public if self._was_public else addresses)

    def _is_wanted(self, address: Address) -> bool:
        return address == self._wanted or (self._reach.follows_redirects and address.host == self._wanted.host)


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _read_address(reader: asyncio.StreamReader) -> Address:
    _, command, _, kind = await reader.readexactly(4)
    if command != 1:
        raise ValueError("only CONNECT is spoken")
    if kind == _IPV4:
        host = socket.inet_ntop(socket.AF_INET, await reader.readexactly(4))
    elif kind == _IPV6:
        host = socket.inet_ntop(socket.AF_INET6, await reader.readexactly(16))
    else:
        (length,) = await reader.readexactly(1)
        host = (await reader.readexactly(length)).decode("ascii")
    (port,) = struct.unpack("!H", await reader.readexactly(2))
    return Address(canonical(host), port)


def _translated(host: str) -> IPv4Address | IPv6Address:
    """What an address leads to."""
    address = ip_address(host)
    return IPv4Address(address.packed[-4:]) if address in _TRANSLATED else address


async def _dial_any(addresses: Sequence[Address]) -> Ends:
    problem = _forbidden()
    for address in addresses:
        try:
            return await asyncio.open_connection(*address)
        except OSError as error:
            problem = error
    raise problem


def _forbidden() -> OSError:
    return OSError(errno.EACCES, "no such host may be reached")


def _answer(code: int) -> bytes:
    return bytes([5, code, 0, _IPV4]) + bytes(6)


def _code_of(error: OSError) -> int:
    if isinstance(error, socket.gaierror):
        return _UNKNOWN_NAME
    return {errno.EACCES: _FORBIDDEN, errno.ECONNREFUSED: _REFUSED}.get(error.errno or 0, _UNREACHABLE)


async def _join(one: Ends, other: Ends) -> None:
    """Pass bytes on both ways until both sides have ended."""
    try:
        await asyncio.gather(_pass_on(one[0], other[1]), _pass_on(other[0], one[1]))
    finally:
        other[1].transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()
