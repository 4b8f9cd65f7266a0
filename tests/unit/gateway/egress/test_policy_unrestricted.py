"""With `network_mode: full`, every public name is allowed, and the proxy also allows every public address."""

import pytest

from doubles.egress_host import client_hello
from sandbox.gateway.egress.inspector_interface import Denial, Tunnel
from sandbox.gateway.egress.policy import EgressPolicy
from sandbox.gateway.egress.proxy_inspector import ProxyInspector
from sandbox.gateway.egress.tls import TlsInspector
from sandbox.model.egress import EgressRules

MODEL = "api.anthropic.com"
FULL = EgressRules(is_unrestricted=True)
DIRECT, BY_PROXY = EgressPolicy(FULL, MODEL), EgressPolicy(FULL, MODEL, allows_ip_addresses=True)


def connect(authority: str, policy: EgressPolicy = BY_PROXY):
    head = f"CONNECT {authority} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    return ProxyInspector(policy, 3128).client_data_received(head)


@pytest.mark.parametrize(
    "authority", ["files.example.org:443", "files.example.org:22", "8.8.4.4:443", "8.8.4.4:53", "[2606:4700::1]:8443"]
)
def test_proxy_opens_a_tunnel_to_every_public_host(authority):
    assert isinstance(connect(authority), Tunnel)


@pytest.mark.parametrize(
    "authority",
    [
        *("api.anthropic.com:443", "API.anthropic.com.:443", "localhost:443", "metadata:80", "printer.local:80"),
        *("files.example.org:0", "2130706433:443", "0x7f000001:443", "127.1:443", "8.0x080404:443", "010.8.8.8:443"),
        *("8.8.4.4.:443", "[fe80::1%251]:443"),
    ],
)
def test_model_host_and_local_names_and_obfuscated_addresses_are_denied(authority):
    assert isinstance(connect(authority), Denial)


def test_ip_addresses_are_allowed_only_through_the_proxy():
    assert isinstance(connect("8.8.4.4:443", DIRECT), Denial)
    assert not DIRECT.allows_host("8.8.4.4")
    assert not BY_PROXY.allows_host("8.8.4.4"), "an address is not a name to resolve"


def test_tls_to_an_ip_address_may_name_only_that_address():
    for data in (client_hello("8.8.4.4"), b"SSH-2.0-x\r\n"):
        assert isinstance(TlsInspector(BY_PROXY, "8.8.4.4", "8.8.4.4", 443).client_data_received(data), Tunnel)
    denial = TlsInspector(BY_PROXY, "8.8.4.4", "8.8.4.4", 443).client_data_received(client_hello(MODEL))
    assert isinstance(denial, Denial)
    truncated = TlsInspector(BY_PROXY, "8.8.4.4", "8.8.4.4", 443)
    assert truncated.client_data_received(client_hello(MODEL)[:40]) is None
    assert isinstance(truncated.client_data_received(b""), Denial), "a server name might have followed"


def test_plain_request_to_an_ip_address_must_name_the_address_as_its_host():
    good = b"GET http://8.8.4.4/ HTTP/1.1\r\nHost: 8.8.4.4\r\n\r\n"
    bad = b"GET http://8.8.4.4/ HTTP/1.1\r\nHost: api.anthropic.com\r\n\r\n"
    assert isinstance(ProxyInspector(BY_PROXY, 3128).client_data_received(good), Tunnel)
    assert isinstance(ProxyInspector(BY_PROXY, 3128).client_data_received(bad), Denial)


def test_encrypted_client_hello_is_allowed_with_unrestricted_egress():
    hello = client_hello("files.example.org", has_ech=True)
    assert isinstance(TlsInspector(DIRECT, "files.example.org", "198.18.0.2", 443).client_data_received(hello), Tunnel)
