"""An allow-list admits only host names: IP addresses and malformed names are denied on every path."""

import pytest

from sandbox.gateway.egress.http import HttpInspector
from sandbox.gateway.egress.inspector_interface import Denial, Tunnel
from sandbox.gateway.egress.policy import ISOLATED_DENY_REASON, NOT_PUBLIC_DENY_REASON, EgressPolicy, is_host_name
from sandbox.gateway.egress.proxy_inspector import ProxyInspector
from sandbox.model.egress import EgressRule, EgressRules

MODEL = "api.anthropic.com"
LISTED = EgressRules((EgressRule("files.example.org"), EgressRule("*.example.net"), EgressRule("8.8.4.4")))
# The gateway sets allows_ip_addresses for the proxy of every task, regardless of the task's rules.
ALLOW_LIST = EgressPolicy(LISTED, MODEL, allows_ip_addresses=True)
FULL = EgressPolicy(EgressRules(is_unrestricted=True), MODEL, allows_ip_addresses=True)
FULL_TRANSPARENT = EgressPolicy(EgressRules(is_unrestricted=True), MODEL)

LABEL = "a" * 63
LONGEST = ".".join([LABEL] * 3 + ["a" * 61])


def connect(authority: str, policy: EgressPolicy):
    head = f"CONNECT {authority} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    return ProxyInspector(policy, 3128).client_data_received(head)


@pytest.mark.parametrize("authority", ["8.8.4.4:443", "8.8.8.8:443", "8.8.8.8:80", "[2606:4700::1]:443"])
def test_proxy_denies_ip_addresses_with_an_allow_list(authority):
    denial = connect(authority, ALLOW_LIST)
    assert isinstance(denial, Denial)
    assert denial.reason == "hosts are reachable by name; IP addresses are reachable only with network_mode full."
    assert isinstance(connect(authority, FULL), Tunnel), "the same tunnel passes with network_mode full"


def test_deny_reason_explains_how_addresses_can_be_reached():
    assert ALLOW_LIST.deny_reason("8.8.8.8", 443).endswith("IP addresses are reachable only with network_mode full.")
    assert FULL_TRANSPARENT.deny_reason("8.8.8.8", 443).endswith("IP addresses are reachable only through the proxy.")
    assert FULL.deny_reason("010.8.8.8", 443) == "an address must be four decimal numbers, or IPv6."


MALFORMED_NAMES = [
    *("a..example.net", ".example.net", "-a.example.net", "a-.example.net", "a b.example.net", "a\0.example.net"),
    *("a/.example.net", "a@b.example.net", "ä.example.net", "a\n.example.net", "a.example.net..", "a%2e.example.net"),
    f"{LONGEST}.example.net",
]


@pytest.mark.parametrize("name", MALFORMED_NAMES)
def test_malformed_name_is_denied_even_if_a_wildcard_matches(name):
    assert not ALLOW_LIST.allows_host(name)
    assert ALLOW_LIST.deny_reason(name, 443) == "vm.allowed_hosts does not list it."
    assert FULL.deny_reason(name, 443) == NOT_PUBLIC_DENY_REASON
    assert ALLOW_LIST.name_deny_reason(name) == "vm.allowed_hosts does not list it."


@pytest.mark.parametrize(
    "name", ["a.example.net", "a-b.example.net", "_acme.example.net", "A.EXAMPLE.NET.", "1.b.example.net"]
)
def test_valid_name_that_matches_the_wildcard_is_allowed(name):
    assert ALLOW_LIST.allows_host(name)
    assert ALLOW_LIST.deny_reason(name, 443) is None
    assert FULL.deny_reason(name, 443) is None


def test_host_name_has_at_most_253_characters():
    assert len(LONGEST) == 253
    assert is_host_name(LONGEST)
    assert is_host_name(f"{LONGEST}.")
    assert not is_host_name(f"{LONGEST}a.")
    assert FULL.deny_reason(LONGEST, 443) is None


@pytest.mark.parametrize("number", ["1.2.3.4", "127.1", "0x7f000001", "a.0x1f", "2130706433", "a.example.9"])
def test_numeric_host_is_not_a_host_name(number):
    assert not is_host_name(number)


def test_listed_host_is_allowed_only_on_its_listed_ports():
    policy = EgressPolicy(EgressRules((EgressRule("a.example.org", (1, 65535)),)), MODEL)
    assert [policy.deny_reason("a.example.org", port) for port in (1, 65535)] == [None, None]
    assert [policy.deny_reason("a.example.org", port) for port in (0, 65536, -1)] == ["the port is invalid."] * 3
    assert policy.deny_reason("a.example.org", 443) == "vm.allowed_hosts does not list it at this port."
    assert policy.deny_reason("b.example.org", 1) == "vm.allowed_hosts does not list it."


def test_deny_reason_for_a_name_explains_why_the_name_is_not_resolved():
    assert ALLOW_LIST.name_deny_reason("files.example.org") == "too many names were resolved."
    assert ALLOW_LIST.name_deny_reason("other.example") == "vm.allowed_hosts does not list it."
    assert FULL.name_deny_reason("printer.local") == NOT_PUBLIC_DENY_REASON
    assert EgressPolicy(EgressRules(), MODEL).name_deny_reason("files.example.org") == ISOLATED_DENY_REASON


def test_ip_address_is_not_resolved_as_a_name():
    assert FULL.name_deny_reason("8.8.4.4") == "it cannot be resolved."


def test_plain_request_to_a_malformed_host_is_denied():
    head = b"GET / HTTP/1.1\r\nHost: a..example.net\r\n\r\n"
    assert isinstance(HttpInspector(ALLOW_LIST, "a..example.net", "198.18.0.2", 80).client_data_received(head), Denial)


@pytest.mark.parametrize("port", [80, 443])
@pytest.mark.parametrize("data", [b"SSH-2.0-OpenSSH_10.0\r\n", b"\0\1\2\3\4\5\6\7", b"EHLO x\r\n"])
@pytest.mark.parametrize("policy", [ALLOW_LIST, FULL])
def test_tunnel_to_port_80_or_443_denies_other_protocols(policy, port, data):
    tunnel = connect(f"files.example.org:{port}", policy)
    assert isinstance(tunnel, Tunnel)
    forwarded = tunnel.stream_filter.client_data_received(data)
    assert isinstance(forwarded or tunnel.stream_filter.client_data_received(b""), Denial)
