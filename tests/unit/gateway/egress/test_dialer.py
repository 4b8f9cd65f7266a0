"""The dialer connects only to public addresses, even if a name resolves to non-public addresses."""

import asyncio
import socket
from ipaddress import ip_address

import pytest

from sandbox.gateway.egress import dialer
from sandbox.gateway.egress.dialer import AddressDeniedError, EgressHostUnreachableError, PublicDialer, is_global
from sandbox.gateway.limits import RESOLVED_ADDRESSES_MAX
from sandbox.gateway.transport import OutboundConnections, unmap_ipv4


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "0.1.2.3", "10.0.0.0", "10.255.255.255", "100.64.0.0", "100.100.100.200", "100.127.255.255"),
        *("127.0.0.1", "127.255.255.255", "168.63.129.16", "169.254.0.1", "169.254.169.254", "172.16.0.0"),
        *("172.31.255.255", "192.0.0.0", "192.0.0.192", "192.0.2.1", "192.88.99.0", "192.88.99.255", "192.168.0.0"),
        *("192.168.255.255", "198.18.0.1", "198.19.255.255", "198.51.100.7", "203.0.113.2", "224.0.0.1"),
        *("239.255.255.255", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "::7f00:1", "::169.254.169.254", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:8.8.8.8"),
        *("64:ff9b::a9fe:a9fe", "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "1fff:ffff::1", "2001::1", "2001:0:1::1"),
        *("2001:2::1", "2001:10::1", "2001:20::1", "2001:1ff:ffff::1", "2001:db8::1", "2002:a9fe:a9fe::1"),
        *("2a00:1450::5efe:a9fe:a9fe", "2a00:1450::200:5efe:7f00:1", "2a00:1450::5efe:808:808"),
        *("2002:808:808::1", "3fff::1", "3fff:fff:ffff::1", "4000::1", "5f00::1", "fc00::1", "fd00:ec2::254"),
        *("fe80::1", "fe80::1%1", "fec0::1", "ff02::1", "ff0e::1", "2606:4700::1%1"),
    ],
)
def test_special_purpose_addresses_are_not_global(address):
    assert not is_global(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "8.8.4.4", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
        *("128.0.0.0", "168.63.129.15", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0"),
        *("191.255.255.255", "192.0.1.0", "192.88.98.255", "192.88.100.0", "192.167.255.255", "192.169.0.0"),
        *("198.17.255.255", "198.20.0.0", "223.255.255.255", "::ffff:8.8.8.8", "2000::1", "2001:200::1"),
        *("2001:4860:4860::8888", "2003::1", "2606:4700::1", "2606:4700::5eff:a9fe:a9fe", "3ffe::1", "3fff:1000::1"),
    ],
)
def test_addresses_adjacent_to_special_ranges_are_global(address):
    assert is_global(ip_address(address))


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

    monkeypatch.setattr(dialer.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(dialer, "_connect", connect)

    async def dial():
        public = PublicDialer("model.example.com", is_checked_as_global, set(), OutboundConnections())
        with pytest.raises((EgressHostUnreachableError, AddressDeniedError)):
            await public.dial("files.example.org", 443)

    asyncio.run(dial())
    assert dialed == ["8.8.4.4"] * is_dialed
    assert sorted(checked) == sorted(names["files.example.org"][:RESOLVED_ADDRESSES_MAX])
