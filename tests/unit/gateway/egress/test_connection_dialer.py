"""The dialer connects only to public addresses, even if a name resolves to non-public addresses."""

import asyncio
import socket
from ipaddress import ip_address

import pytest

from sandbox.gateway.egress import connection
from sandbox.gateway.egress.connection import AddressDeniedError, EgressHostUnreachableError, PublicDialer
from sandbox.gateway.egress.policy import is_global
from sandbox.gateway.limits import RESOLVED_ADDRESSES_MAX
from sandbox.gateway.tcp_connections import OutboundConnections, unmap_ipv4


def test_ipv4_mapped_ipv6_address_is_unmapped():
    assert unmap_ipv4(ip_address("::ffff:10.0.0.1")) == ip_address("10.0.0.1")
    assert unmap_ipv4(ip_address("2606:4700::1")) == ip_address("2606:4700::1")


def addresses_from(first: str, count: int) -> list[str]:
    return [str(ip_address(first) + offset) for offset in range(count)]


@pytest.mark.parametrize(
    ("before", "is_dialed"), [(0, True), (RESOLVED_ADDRESSES_MAX - 1, True), (RESOLVED_ADDRESSES_MAX, False)]
)
def test_number_of_checked_addresses_is_limited(monkeypatch, before, is_dialed):
    """A response of 64 KiB contains 4000 addresses. Checking all of them would block the gateway for 0.2 s."""
    names = {
        "files.example.org": [*addresses_from("10.0.0.0", before), "8.8.4.4", *addresses_from("10.1.0.0", 4000)],
        "model.example.com": ["8.8.4.6"],
    }
    checked, dialed = [], []

    def resolve(host, *_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in names[host.removesuffix(".")]]

    def is_checked_as_global(address):
        checked.append(str(address))
        return is_global(address)

    async def connect(_connections, _host, _port, allowed):
        dialed.extend(map(str, allowed))
        raise EgressHostUnreachableError(502, "not connected in this test")

    monkeypatch.setattr(connection.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(connection, "_connect", connect)

    async def dial():
        public = PublicDialer("model.example.com", is_checked_as_global, set(), OutboundConnections())
        with pytest.raises((EgressHostUnreachableError, AddressDeniedError)):
            await public.dial("files.example.org", 443)

    asyncio.run(dial())
    assert dialed == ["8.8.4.4"] * is_dialed
    assert sorted(checked) == sorted(names["files.example.org"][:RESOLVED_ADDRESSES_MAX])
