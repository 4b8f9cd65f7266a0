"""With `network_mode: full` every public name is reached, by the proxy addresses too, and still nothing else."""

import pytest

from doubles.remote_host import client_hello
from sandbox.gateway.egress.policy import Denial, EgressPolicy, Tunnel
from sandbox.gateway.egress.proxy_handshake import ProxyHandshake
from sandbox.gateway.egress.tls_handshake import TlsHandshake
from sandbox.model.egress import EgressRules

MODEL = "api.anthropic.com"
FULL = EgressRules(is_unrestricted=True)
DIRECT, BY_PROXY = EgressPolicy(FULL, MODEL), EgressPolicy(FULL, MODEL, allows_ip_addresses=True)


def connect(authority: str, policy: EgressPolicy = BY_PROXY):
    return ProxyHandshake(policy, 3128).client_data_received(
        f"CONNECT {authority} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    )


@pytest.mark.parametrize(
    "authority", ["files.example.org:443", "files.example.org:22", "8.8.4.4:443", "8.8.4.4:53", "[2606:4700::1]:8443"]
)
def test_the_proxy_opens_a_tunnel_to_every_public_host(authority):
    assert isinstance(connect(authority), Tunnel)


@pytest.mark.parametrize(
    "authority",
    [
        *("api.anthropic.com:443", "API.anthropic.com.:443", "localhost:443", "metadata:80", "printer.local:80"),
        *("files.example.org:0", "2130706433:443", "0x7f000001:443", "127.1:443", "8.0x080404:443", "010.8.8.8:443"),
        *("8.8.4.4.:443", "[fe80::1%251]:443"),
    ],
)
def test_neither_the_model_nor_local_names_nor_addresses_in_disguise(authority):
    assert isinstance(connect(authority), Denial)


def test_addresses_are_for_the_proxy_only():
    assert isinstance(connect("8.8.4.4:443", DIRECT), Denial)
    assert not DIRECT.allows_host("8.8.4.4")
    assert not BY_PROXY.allows_host("8.8.4.4"), "an address has no name that could resolve"


def test_tls_to_an_address_names_no_server_or_that_address():
    for said in (client_hello("8.8.4.4"), b"SSH-2.0-x\r\n"):
        assert isinstance(TlsHandshake(BY_PROXY, "8.8.4.4", "8.8.4.4", 443).client_data_received(said), Tunnel)
    refusal = TlsHandshake(BY_PROXY, "8.8.4.4", "8.8.4.4", 443).client_data_received(client_hello(MODEL))
    assert isinstance(refusal, Denial)
    cut = TlsHandshake(BY_PROXY, "8.8.4.4", "8.8.4.4", 443)
    assert cut.client_data_received(client_hello(MODEL)[:40]) is None
    assert isinstance(cut.client_data_received(b""), Denial), "a name might have come"


def test_a_plain_request_to_an_address_has_that_address_as_its_host():
    good = b"GET http://8.8.4.4/ HTTP/1.1\r\nHost: 8.8.4.4\r\n\r\n"
    bad = b"GET http://8.8.4.4/ HTTP/1.1\r\nHost: api.anthropic.com\r\n\r\n"
    assert isinstance(ProxyHandshake(BY_PROXY, 3128).client_data_received(good), Tunnel)
    assert isinstance(ProxyHandshake(BY_PROXY, 3128).client_data_received(bad), Denial)


def test_a_second_name_that_is_encrypted_passes_only_where_every_name_may():
    said = client_hello("files.example.org", encrypted_too=True)
    assert isinstance(TlsHandshake(DIRECT, "files.example.org", "198.18.0.2", 443).client_data_received(said), Tunnel)
