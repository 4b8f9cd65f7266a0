"""Requests to the proxy and to ports 80 and 443 are forwarded to allowed hosts, or denied with a reason."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles.egress_host import client_hello
from sandbox.gateway.egress.http import HttpInspector
from sandbox.gateway.egress.inspector_interface import Denial, Tunnel
from sandbox.gateway.egress.policy import ISOLATED_DENY_REASON, EgressPolicy, is_address
from sandbox.gateway.egress.protocol_sniffing import NestedConnectionFilter
from sandbox.gateway.egress.proxy_inspector import ProxyInspector
from sandbox.gateway.egress.tls import TlsInspector
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX
from sandbox.model.egress import EgressRule, EgressRules, egress_rules
from sandbox.model.manifest.schema import Vm

HOST = "files.example.org"
MODEL = "api.anthropic.com"
OUTBOUND = EgressPolicy(EgressRules((EgressRule(HOST), EgressRule(MODEL), EgressRule("10.0.0.1"))), MODEL)
NO_HOSTS = EgressPolicy(EgressRules(), MODEL)


def hello(name: str | None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = name is not None
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def proxy_inspector(policy=OUTBOUND):
    return ProxyInspector(policy, 3128)


def http_inspector(name=HOST, policy=OUTBOUND):
    return HttpInspector(policy, name, "198.18.0.2", 80)


def tls_inspector(name=HOST, policy=OUTBOUND):
    return TlsInspector(policy, name, "198.18.0.2", 443)


def expect_tunnel(outcome) -> Tunnel:
    assert isinstance(outcome, Tunnel), outcome
    return outcome


def expect_denial(outcome) -> Denial:
    assert isinstance(outcome, Denial), outcome
    return outcome


# The proxy


@pytest.mark.parametrize("target", [HOST, HOST.upper(), HOST + "."])
def test_tls_in_a_connect_tunnel_must_name_the_allowed_host(target):
    request = f"CONNECT {target}:443 HTTP/1.1\r\nHost: {target}:443\r\n\r\n".encode()
    tunnel = expect_tunnel(proxy_inspector().client_data_received(request))
    assert (tunnel.host, tunnel.port) == (target, 443)
    assert tunnel.established_response.startswith(b"HTTP/1.1 200 ")
    assert tunnel.stream_filter.start() == b""
    client_hello = hello(HOST)
    assert tunnel.stream_filter.client_data_received(client_hello[:100]) == b"", (
        "no data is forwarded before the server name is known"
    )
    assert tunnel.stream_filter.client_data_received(client_hello[100:]) == client_hello
    assert tunnel.stream_filter.client_data_received(b"anything") == b"anything"
    assert tunnel.stream_filter.client_data_received(b"") == b""


def test_data_after_the_connect_request_belongs_to_the_tunnel():
    client_hello = hello(HOST)
    tunnel = expect_tunnel(
        proxy_inspector().client_data_received(
            f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode() + client_hello
        )
    )
    assert tunnel.stream_filter.start() == client_hello


@pytest.mark.parametrize(
    "payload", [hello("other.example"), hello(None), b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n", b""]
)
def test_tunnel_to_port_443_accepts_only_tls_for_its_host(payload):
    tunnel = expect_tunnel(
        proxy_inspector().client_data_received(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    )
    assert expect_denial(tunnel.stream_filter.client_data_received(payload)).port == 443


def test_tunnel_to_port_80_accepts_one_request_for_its_host():
    request = f"CONNECT {HOST}:80 HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    stream_filter = expect_tunnel(proxy_inspector().client_data_received(request)).stream_filter
    assert isinstance(stream_filter, NestedConnectionFilter)
    assert stream_filter.client_data_received(f"GET /a HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()).startswith(
        b"GET /a HTTP/1.1\r\n"
    )
    assert stream_filter.drops_rest
    stream_filter = expect_tunnel(proxy_inspector().client_data_received(request)).stream_filter
    assert (
        expect_denial(stream_filter.client_data_received(b"GET /a HTTP/1.1\r\nHost: other.example\r\n\r\n")).host
        == "other.example"
    )


def test_plain_proxy_request_is_forwarded_without_hop_by_hop_headers():
    hop_by_hop = "Proxy-Authorization: Basic eA==\r\nProxy-Connection: keep-alive\r\nConnection: X-Hop\r\nX-Hop: 1\r\n"
    end_to_end = f"Host: {HOST}\r\nCookie: a=b\r\n"
    request = f"POST http://{HOST}/a?b=c HTTP/1.1\r\n{hop_by_hop}{end_to_end}Content-Length: 4\r\n\r\nab".encode()
    tunnel = expect_tunnel(proxy_inspector().client_data_received(request))
    sent = tunnel.stream_filter.start().decode()
    expected = f"POST /a?b=c HTTP/1.1\r\n{end_to_end}Content-Length: 4\r\nConnection: close\r\n\r\nab"
    assert sent.lower() == expected.lower()
    assert tunnel.stream_filter.client_data_received(b"cd") == b"cd"
    assert tunnel.stream_filter.drops_rest
    assert (
        tunnel.stream_filter.client_data_received(f"GET http://{HOST}/second HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        == b""
    )


HOST_OVERRIDE_HEADERS = (
    "Forwarded: host=other.example",
    "X-Forwarded: host=other.example",
    "X-Forwarded-Host: other.example",
    "X_Forwarded_Host: other.example",
    "x.forwarded.host: other.example",
    "X-Host: other.example",
    "X-HTTP-Host-Override: other.example",
    "X-Original-Host: other.example",
    "X-Original-URL: http://other.example/",
    "X-Rewrite-URL: http://other.example/",
    "Base-Url: http://other.example/",
    "X-Envoy-Original-Dst-Host: 10.1.2.3:80",
    "X-Forward-Host: other.example",
    "X-Authority: other.example",
    "X-Vhost: other.example",
    "True-Host: other.example",
    "X-Real-Host: other.example",
    "X-Backend-Host: other.example",
    "X-Forwarded-Server: other.example",
    "Request-URI: http://other.example/",
    "Surrogate_Host: other.example",
    "HTTP-Host: other.example",
    "_Host: other.example",
    "Url: http://other.example/",
    "Proxy: http://other.example/",
)
"""A reverse proxy passes the original host in these headers, which many programs use instead of Host."""


@pytest.mark.parametrize("header", HOST_OVERRIDE_HEADERS)
def test_forwarded_host_headers_are_removed(header):
    others = f"Origin: http://{HOST}\r\nDestination: http://{HOST}/b\r\nX-Callback-URL: http://me.example/\r\n"
    forwarded = f"Host: {HOST}\r\nX-Hosted-By: me\r\n{others}"
    request = f"GET http://{HOST}/ HTTP/1.1\r\n{header}\r\n{forwarded}\r\n".encode()
    sent = expect_tunnel(proxy_inspector().client_data_received(request)).stream_filter.start().decode()
    assert sent.lower() == f"GET / HTTP/1.1\r\n{forwarded}Connection: close\r\n\r\n".lower()


@pytest.mark.parametrize(
    ("data", "host", "port"),
    [
        (b"CONNECT other.example:443 HTTP/1.1\r\nHost: x\r\n\r\n", "other.example", 443),
        (b"CONNECT sub.files.example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", "sub.files.example.org", 443),
        (b"CONNECT files.example.org:22 HTTP/1.1\r\nHost: x\r\n\r\n", HOST, 22),
        (b"CONNECT files.example.org:8443 HTTP/1.1\r\nHost: x\r\n\r\n", HOST, 8443),
        (b"CONNECT 8.8.8.8:443 HTTP/1.1\r\nHost: files.example.org\r\n\r\n", "8.8.8.8", 443),
        (b"CONNECT 10.0.0.1:443 HTTP/1.1\r\nHost: x\r\n\r\n", "10.0.0.1", 443),
        (b"CONNECT 0x7f.1:443 HTTP/1.1\r\nHost: x\r\n\r\n", "0x7f.1", 443),
        (b"CONNECT 2130706433:443 HTTP/1.1\r\nHost: x\r\n\r\n", "2130706433", 443),
        (b"CONNECT [2606:4700::1]:443 HTTP/1.1\r\nHost: x\r\n\r\n", "2606:4700::1", 443),
        (b"CONNECT api.anthropic.com:443 HTTP/1.1\r\nHost: x\r\n\r\n", MODEL, 443),
        (b"CONNECT files.example.org:99999 HTTP/1.1\r\nHost: x\r\n\r\n", "proxy", 3128),
        (b"CONNECT a@files.example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", "proxy", 3128),
        (b"CONNECT files.example.org:443 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde", "proxy", 3128),
        (b"GET http://other.example/ HTTP/1.1\r\nHost: other.example\r\n\r\n", "other.example", 80),
        (b"GET http://files.example.org/ HTTP/1.1\r\nHost: other.example\r\n\r\n", HOST, 80),
        (b"GET http://files.example.org/ HTTP/1.1\r\nHost: files.example.org:81\r\n\r\n", HOST, 80),
        (
            b"GET http://files.example.org/ HTTP/1.1\r\nHost: files.example.org\r\nHost: o.example\r\n\r\n",
            "proxy",
            3128,
        ),
        (b"GET http://other.example#files.example.org/ HTTP/1.1\r\nHost: files.example.org\r\n\r\n", "proxy", 3128),
        (b"GET http://u@files.example.org/ HTTP/1.1\r\nHost: files.example.org\r\n\r\n", "proxy", 3128),
        (b"GET http://files.example.org:443/ HTTP/1.1\r\nHost: files.example.org:443\r\n\r\n", HOST, 443),
        (b"GET https://files.example.org/ HTTP/1.1\r\nHost: files.example.org\r\n\r\n", HOST, 443),
        (b"GET ftp://files.example.org/ HTTP/1.1\r\nHost: files.example.org\r\n\r\n", HOST, 80),
        (b"GET / HTTP/1.1\r\nHost: files.example.org\r\n\r\n", "proxy", 3128),
        (
            b"POST http://files.example.org/ HTTP/1.1\r\nHost: files.example.org\r\nContent-Length: 3\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            HOST,
            80,
        ),
        (b"nonsense\r\n\r\n", "proxy", 3128),
        (b"\x16\x03\x01", "proxy", 3128),
        (b"", "proxy", 3128),
    ],
)
def test_proxy_denies_disallowed_and_invalid_requests_with_a_reason(data, host, port):
    denial = expect_denial(proxy_inspector().client_data_received(data))
    assert (denial.host, denial.port) == (host, port)
    assert not data or denial.response.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 400 "))
    assert not data or b"connection: close" in denial.response.lower()
    assert not data or f"Sandbox refused {host}:{port}: {denial.reason}".encode() in denial.response


def test_partial_connect_request_is_incomplete():
    inspector = proxy_inspector()
    assert inspector.client_data_received(b"CONNECT files.example") is None
    expect_tunnel(inspector.client_data_received(b".org:443 HTTP/1.1\r\nHost: x\r\n\r\n"))


# Port 80


@pytest.mark.parametrize("host", [HOST, f"{HOST}:80", HOST.upper()])
def test_plain_request_to_an_allowed_host_is_forwarded_once(host):
    first = f"GET /a HTTP/1.1\r\nHost: {host}\r\nConnection: keep-alive\r\n\r\n".encode()
    smuggled = b"GET /b HTTP/1.1\r\nHost: other.example\r\n\r\n"
    tunnel = expect_tunnel(http_inspector().client_data_received(first + smuggled))
    sent = tunnel.stream_filter.start()
    assert sent.startswith(b"GET /a HTTP/1.1\r\n")
    assert sent.lower().endswith(b"connection: close\r\n\r\n")
    assert b"/b" not in sent
    assert tunnel.stream_filter.drops_rest


@pytest.mark.parametrize(
    ("length", "is_allowed"),
    [
        ("0", True),
        ("3", True),
        ("999999999999999999", True),
        ("1000000000000000000", False),
        ("18446744073709551619", False),
        ("99999999999999999999", False),
        ("00000000000000000003", False),
        ("03", False),
        ("00", False),
    ],
)
def test_content_length_that_servers_may_read_differently_is_denied(length, is_allowed):
    """18446744073709551619 is 3 modulo 2**64: a server might treat the rest of the body as a request to any host."""
    for inspector, target in ((http_inspector(), "/"), (proxy_inspector(), f"http://{HOST}/")):
        data = f"POST {target} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {length}\r\n\r\n".encode()
        outcome = inspector.client_data_received(data + b"abcGET / HTTP/1.1\r\nHost: other.example\r\n\r\n")
        if is_allowed:
            assert f"content-length: {length}\r\n".encode() in expect_tunnel(outcome).stream_filter.start()
        else:
            denial = expect_denial(outcome)
            assert denial.reason == "Content-Length must have at most 18 digits, without leading zeros."
            assert denial.response.startswith(b"HTTP/1.1 400 ")


def test_chunked_body_is_reframed():
    head = f"POST / HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    stream_filter = expect_tunnel(http_inspector().client_data_received(head + b"2;x=y\r\nab\r\n")).stream_filter
    assert stream_filter.start().endswith(b"\r\n\r\n2\r\nab\r\n")
    assert stream_filter.client_data_received(b"0\r\nTrailer: x\r\n\r\nGET /b HTTP/1.1\r\n\r\n") == b"0\r\n\r\n"


def test_truncated_body_ends_the_connection():
    head = f"POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 9\r\n\r\nab".encode()
    stream_filter = expect_tunnel(http_inspector().client_data_received(head)).stream_filter
    stream_filter.start()
    expect_denial(stream_filter.client_data_received(b""))


@pytest.mark.parametrize(
    "head",
    [
        "GET / HTTP/1.1\r\nHost: other.example",
        f"GET / HTTP/1.1\r\nHost: {HOST}:81",
        f"GET http://{HOST}/ HTTP/1.1\r\nHost: {HOST}",
        "GET / HTTP/1.1\r\nHost: [",
        "GET / HTTP/1.0",
        "nonsense",
    ],
)
def test_port_80_denies_disallowed_and_invalid_requests_with_a_response(head):
    assert expect_denial(http_inspector().client_data_received(head.encode() + b"\r\n\r\n")).response.startswith(
        (b"HTTP/1.1 403 ", b"HTTP/1.1 400 ")
    )


@pytest.mark.parametrize("token", ["host", "Host", "close, HOST"])
def test_connection_header_that_lists_host_is_denied_with_a_reason(token):
    head = f"Host: {HOST}\r\nConnection: {token}\r\n\r\n"
    direct = expect_denial(http_inspector().client_data_received(f"GET / HTTP/1.1\r\n{head}".encode()))
    by_proxy = expect_denial(proxy_inspector().client_data_received(f"GET http://{HOST}/ HTTP/1.1\r\n{head}".encode()))
    for denial in (direct, by_proxy):
        assert denial.response.startswith(b"HTTP/1.1 400 ")
        assert b"Connection" in denial.response
        assert (denial.host, denial.port) == (HOST, 80)


def test_oversized_request_head_is_denied():
    inspector = http_inspector()
    pieces = [f"GET / HTTP/1.1\r\nHost: {HOST}\r\nX: ".encode(), *[b"a" * 16_384] * 2]
    outcomes = [inspector.client_data_received(piece) for piece in pieces]
    assert outcomes[:2] == [None, None]
    assert expect_denial(outcomes[2]).response.startswith(b"HTTP/1.1 400 ")


def test_unassigned_address_is_denied_even_for_an_allowed_host():
    assert (
        "not assigned to a host name"
        in expect_denial(
            http_inspector(None).client_data_received(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        ).reason
    )
    assert "not assigned to a host name" in expect_denial(tls_inspector(None).client_data_received(hello(HOST))).reason


# Port 443


def test_tls_to_an_allowed_host_is_forwarded_from_its_first_byte():
    client_hello = hello(HOST)
    inspector = tls_inspector()
    assert inspector.client_data_received(client_hello[:50]) is None
    tunnel = expect_tunnel(inspector.client_data_received(client_hello[50:]))
    assert (tunnel.host, tunnel.port, tunnel.established_response) == (HOST, 443, b"")
    assert tunnel.stream_filter.start() == client_hello


@pytest.mark.parametrize(
    ("data", "host"),
    [
        (hello("other.example"), "other.example"),
        (hello(None), HOST),
        (b"SSH-2.0-x\r\n", HOST),
        (b"", HOST),
        (b"\x16\x03\x01\x40\x00\x01" + bytes(CLIENT_HELLO_BYTES_MAX), HOST),
    ],
)
def test_tls_for_another_host_is_denied_without_a_response(data, host):
    denial = expect_denial(tls_inspector().client_data_received(data))
    assert (denial.host, denial.port, denial.response) == (host, 443, b"")


def test_encrypted_client_hello_is_denied_with_an_allow_list():
    expect_tunnel(tls_inspector().client_data_received(client_hello(HOST)))
    assert "ECH" in expect_denial(tls_inspector().client_data_received(client_hello(HOST, has_ech=True))).reason


def test_model_host_is_denied_even_if_a_rule_allows_it():
    assert "model" in expect_denial(tls_inspector(MODEL).client_data_received(hello(MODEL))).reason
    assert not OUTBOUND.allows_host(MODEL)


# No network access


def test_isolated_policy_denies_every_request_and_reports_its_host():
    requests = [
        (proxy_inspector(NO_HOSTS), f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode()),
        (proxy_inspector(NO_HOSTS), f"GET http://{HOST}/ HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()),
        (http_inspector(None, NO_HOSTS), f"HEAD / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()),
        (tls_inspector(None, NO_HOSTS), hello(HOST)),
    ]
    for inspector, data in requests:
        denial = expect_denial(inspector.client_data_received(data))
        assert (denial.host, denial.reason) == (HOST, ISOLATED_DENY_REASON)


@pytest.mark.parametrize(
    ("vm", "reason"),
    [
        (Vm(), "vm.network_mode is isolated: only the model is reachable."),
        (Vm(network_mode="outbound"), "vm.allowed_hosts is empty: only the model is reachable."),
    ],
)
def test_deny_reason_names_the_setting_that_isolates_the_task(vm, reason):
    assert EgressPolicy(egress_rules(vm), MODEL).deny_reason(HOST, 443) == reason


@given(st.lists(st.binary(max_size=60), max_size=6), st.sampled_from([proxy_inspector, http_inspector, tls_inspector]))
def test_arbitrary_bytes_are_eventually_denied(pieces, kind):
    inspector, outcome = kind(), None
    for piece in [*pieces, b""]:
        outcome = inspector.client_data_received(piece)
        if outcome is not None:
            break
    assert isinstance(outcome, Denial)


@given(st.text(max_size=40), st.sampled_from(["CONNECT {} HTTP/1.1", "GET http://{}/ HTTP/1.1", "GET {} HTTP/1.1"]))
def test_arbitrary_request_target_is_denied(target, line):
    inspector = proxy_inspector()
    outcome = inspector.client_data_received(
        line.format(target).encode() + b"\r\nHost: a\r\n\r\n"
    ) or inspector.client_data_received(b"")
    assert expect_denial(outcome).reason


@pytest.mark.parametrize("address", ["8.8.4.4", "2606:4700::1", "::1"])
def test_address_check_accepts_only_the_canonical_form(address):
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
