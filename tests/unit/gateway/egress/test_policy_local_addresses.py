"""A sandbox cannot reach this machine, even through its public address."""

import errno
import socket
from ipaddress import ip_address

import pytest

from sandbox.gateway.egress.policy import is_dialable

PUBLIC_V4, PUBLIC_V6 = "8.8.4.4", "2001:4860:4860::8888"


class Machine:
    """A machine whose sockets can bind only to its own addresses."""

    def __init__(self, *addresses: str, other_errno: int = errno.EADDRNOTAVAIL) -> None:
        self.addresses = addresses
        self.other_errno = other_errno
        self.bound: list[tuple] = []
        self.open_sockets = 0

    def socket(self, family: int, kind: int) -> "Socket":
        return Socket(self, family, kind)


class Socket:
    """A socket of a `Machine`."""

    def __init__(self, machine: Machine, family: int, kind: int) -> None:
        self._machine = machine
        self._family = family
        self._kind = kind

    def __enter__(self) -> "Socket":
        self._machine.open_sockets += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._machine.open_sockets -= 1

    def bind(self, address: tuple[str, int]) -> None:
        self._machine.bound.append((self._family, self._kind, *address))
        if address[0] not in self._machine.addresses:
            raise OSError(self._machine.other_errno, "cannot bind")


@pytest.fixture
def is_dialable_from(monkeypatch):
    def decide(machine: Machine, address: str) -> bool:
        with monkeypatch.context() as patched:
            patched.setattr(socket, "socket", machine.socket)
            outcome = is_dialable(ip_address(address))
        assert machine.open_sockets == 0
        return outcome

    return decide


@pytest.mark.parametrize(("address", "family"), [(PUBLIC_V4, socket.AF_INET), (PUBLIC_V6, socket.AF_INET6)])
def test_public_address_is_dialable_only_from_other_machines(is_dialable_from, address, family):
    this_machine, other_machine = Machine(address), Machine("192.0.2.1")
    assert is_dialable_from(this_machine, address) is False
    assert is_dialable_from(other_machine, address) is True
    assert this_machine.bound == other_machine.bound == [(family, socket.SOCK_DGRAM, address, 0)]


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fd00::1"])
def test_private_address_is_not_dialable(is_dialable_from, address):
    machine = Machine()
    assert is_dialable_from(machine, address) is False
    assert machine.bound == []


def test_public_address_is_dialable_from_a_machine_without_its_family(is_dialable_from):
    assert is_dialable_from(Machine(other_errno=errno.EAFNOSUPPORT), PUBLIC_V6) is True


@pytest.mark.parametrize("other_errno", [errno.EMFILE, errno.EACCES, errno.EADDRINUSE])
def test_address_is_not_dialable_if_it_cannot_be_checked(is_dialable_from, other_errno):
    assert is_dialable_from(Machine(other_errno=other_errno), PUBLIC_V4) is False
