"""Inside a tunnel everything passes once its beginning was looked at, and nothing before."""

import pytest

from sandbox.gateway.egress.policy import Denial, EgressPolicy, InspectingFilter, Tunnel, is_address
from sandbox.gateway.egress.tls_handshake import TlsHandshake
from sandbox.model.egress import EgressRules


class Played:
    """An opening and a sieve as the test wants them."""

    def __init__(self, *outcomes: Tunnel | Denial | None) -> None:
        self.outcomes = list(outcomes)
        self.looked_at: list[bytes] = []
        self.is_done = False
        self.is_passthrough = False

    def client_data_received(self, data: bytes) -> Tunnel | Denial | bytes | None:
        self.looked_at.append(data)
        return self.outcomes.pop(0) if self.outcomes else data.upper()

    def start(self) -> bytes:
        return b"".join(self.looked_at)


def test_nothing_passes_until_the_beginning_is_whole_and_then_it_and_what_follows():
    sieve = Played()
    opening = Played(None, Tunnel("h", 22, sieve))
    tunnel = InspectingFilter(opening, b"")
    assert (tunnel.start(), tunnel.is_done) == (b"", False)
    sieve.looked_at.append(b"SSH-2.0")
    assert tunnel.client_data_received(b"SSH") == b""
    assert tunnel.is_done is False
    assert tunnel.client_data_received(b"-2.0") == b"SSH-2.0"
    assert opening.looked_at == [b"SSH", b"-2.0"]
    assert tunnel.client_data_received(b"more") == b"MORE"
    assert opening.looked_at == [b"SSH", b"-2.0"], "the beginning is over"
    assert tunnel.is_done is False
    sieve.is_done = True
    assert tunnel.is_done is True


def test_a_tunnel_is_read_in_large_pieces_only_once_nothing_is_looked_for_any_more():
    sieve = Played()
    tunnel = InspectingFilter(Played(None, Tunnel("h", 22, sieve)), b"")
    sieve.is_passthrough = True
    tunnel.client_data_received(b"SSH")
    assert tunnel.is_passthrough is False, "the beginning is not whole"
    tunnel.client_data_received(b"-2.0")
    assert tunnel.is_passthrough is True
    sieve.is_passthrough = False
    assert tunnel.is_passthrough is False


def test_what_came_with_the_request_for_a_tunnel_is_looked_at_first():
    refusal = Denial("h", 22, "no")
    opening = Played(refusal)
    assert InspectingFilter(opening, b"came").start() is refusal
    assert opening.looked_at == [b"came"]


def test_a_beginning_that_is_refused_stays_refused():
    refusal = Denial("h", 22, "no")
    tunnel = InspectingFilter(Played(refusal, refusal), b"")
    assert tunnel.client_data_received(b"a") is refusal
    assert tunnel.client_data_received(b"b") is refusal
    assert tunnel.is_done is False


def test_a_client_that_speaks_tls_is_told_nothing_in_plain_text():
    full = EgressPolicy(EgressRules(is_unrestricted=True), "api.anthropic.com", allows_ip_addresses=True)
    passage = TlsHandshake(full, "8.8.4.4", "8.8.4.4", 443).client_data_received(b"SSH-2.0-x\r\n")
    assert isinstance(passage, Tunnel)
    assert (passage.greeting, passage.unreachable_response(504, "h does not answer.")) == (b"", b"")


@pytest.mark.parametrize("address", ["8.8.4.4", "2606:4700::1", "::1"])
def test_an_address_has_one_proper_spelling(address):
    assert is_address(address)
    for other in (
        f"{address}%1",
        f"{address}%eth0",
        f"0{address}x",
        f"[{address}]",
        f" {address}",
        "8.8.4",
        "host",
        "",
    ):
        assert not is_address(other)
