"""Connections to hosts of the public internet: looked up here, checked, and dialled at the address that was checked."""

import asyncio
import errno
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, ip_address

from sandbox.contracts.waiting_thread import wait_in_thread
from sandbox.gateway import limits
from sandbox.gateway.address_table import Address, is_global, unwrapped
from sandbox.gateway.line import Line
from sandbox.gateway.pace import Pace
from sandbox.gateway.wide_lines import WideLines

AddressPolicy = Callable[[Address], bool]


class NotDialledError(Exception):
    """An address behind the name is none that may be dialled; the message says why, for people."""


class NotReachedError(Exception):
    """The host was not reached; `status` is HTTP's for a gateway, the message is for people."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def may_be_dialled(address: Address) -> bool:
    """Whether this is another host's public address. Only tests have another policy."""
    return is_global(address) and not _is_own(address)


class Outward:
    """Dials hosts by name, by the system's resolver (/etc/hosts included), but never the model's.

    model_addresses: where the model has been found; it grows here and where the model is dialled.
    """

    def __init__(self, model_host: str, address_policy: AddressPolicy, model_addresses: set[Address]) -> None:
        self._model_host = model_host
        self._model_addresses = model_addresses
        self._model_looked_up_at = float("-inf")
        self._may_be_dialled = address_policy
        self._lookups = asyncio.Semaphore(limits.LOOKUPS_MAX)
        self._wide = WideLines()
        self._pace = Pace(limits.HOST_CONNECTIONS_AT_ONCE, limits.HOST_CONNECTIONS_PER_SECOND)

    async def dial(self, host: str, port: int) -> Line:
        """Raises NotDialledError, NotReachedError. Waits where connections are opened too often."""
        addresses = await self._look_up(host)
        await self._look_for_model()
        if not self._model_addresses.isdisjoint(addresses):
            raise NotDialledError("its address is the model's, which is reached through the gateway only.")
        allowed = [address for address in addresses if self._may_be_dialled(address)]
        if not allowed:
            raise NotDialledError("its name resolves to no public address of another host.")
        await self._pace.wait()
        line = await _connect(host, port, allowed[: limits.ADDRESSES_MAX])
        self._wide.add(line)
        return line

    async def _look_for_model(self) -> None:
        """Every address that it ever had counts. As long as none is known, no host can be told from the model."""
        now = asyncio.get_running_loop().time()
        if now - self._model_looked_up_at < limits.MODEL_LOOKUP_SECONDS:
            return
        try:
            self._model_addresses.update(await self._look_up(self._model_host))
            self._model_looked_up_at = now
        except NotReachedError:
            if not self._model_addresses:
                message = "The model's host does not resolve, and unless it does no other host is reached."
                raise NotReachedError(502, message) from None

    async def _look_up(self, host: str) -> list[Address]:
        with suppress(ValueError):
            return [unwrapped(ip_address(host))]
        try:
            async with asyncio.timeout(limits.LOOKUP_SECONDS):
                await self._lookups.acquire()
                return _sorted(await wait_in_thread(partial(_resolve, host), self._lookups.release))
        except TimeoutError:
            raise NotReachedError(504, f"{host} was not resolved within {limits.LOOKUP_SECONDS:.0f} s.") from None
        except (OSError, UnicodeError):
            raise NotReachedError(502, f"{host} does not resolve.") from None


async def _connect(host: str, port: int, addresses: list[Address]) -> Line:
    for address in addresses:
        with suppress(OSError):  # TimeoutError included
            async with asyncio.timeout(limits.CONNECT_SECONDS / len(addresses)):
                return await Line.to(str(address), port)
    raise NotReachedError(502, f"{host}:{port} does not answer.")


def _resolve(host: str) -> set[str]:
    return {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}


def _sorted(found: set[str]) -> list[Address]:
    """IPv4 first, which more machines can reach."""
    addresses = {unwrapped(ip_address(one)) for one in found}
    return sorted(addresses, key=lambda address: (not isinstance(address, IPv4Address), int(address)))


def _is_own(address: Address) -> bool:
    """Whether the address is this host's: only then a socket can be bound to it. In doubt it is."""
    family = socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True
