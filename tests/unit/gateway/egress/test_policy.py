"""What a sandbox asks of the proxy, of port 80 and of port 443: let through to allowed hosts, else refused and told."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles.remote_host import client_hello
from sandbox.gateway.egress.http_handshake import HttpHandshake
from sandbox.gateway.egress.policy import ISOLATED, Denial, EgressPolicy, InspectingFilter, Tunnel
from sandbox.gateway.egress.proxy_handshake import ProxyHandshake
from sandbox.gateway.egress.tls_handshake import TlsHandshake
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX
from sandbox.model.egress import EgressRule, EgressRules, egress_rules
from sandbox.model.manifest.schema import Vm

HOST = "files.example.org"
MODEL = "api.anthropic.com"
OUTBOUND = EgressPolicy(EgressRules((EgressRule(HOST), EgressRule(MODEL), EgressRule("10.0.0.1"))), MODEL)
NOTHING = EgressPolicy(EgressRules(), MODEL)


def hello(name: str | None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = name is not None
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def proxy(policy=OUTBOUND):
    return ProxyHandshake(policy, 3128)


def plain(name=HOST, policy=OUTBOUND):
    return HttpHandshake(policy, name, "198.18.0.2", 80)


def tls(name=HOST, policy=OUTBOUND):
    return TlsHandshake(policy, name, "198.18.0.2", 443)


def let_through(outcome) -> Tunnel:
    assert isinstance(outcome, Tunnel), outcome
    return outcome


def refused(outcome) -> Denial:
    assert isinstance(outcome, Denial), outcome
    return outcome


# The proxy


@pytest.mark.parametrize("target", [HOST, HOST.upper(), HOST + "."])
def test_a_tunnel_to_an_allowed_host_is_opened_and_its_tls_must_name_that_host(target):
    asked = f"CONNECT {target}:443 HTTP/1.1\r\nHost: {target}:443\r\n\r\n".encode()
    passage = let_through(proxy().client_data_received(asked))
    assert (passage.host, passage.port) == (target, 443)
    assert passage.greeting.startswith(b"HTTP/1.1 200 ")
    assert passage.stream_filter.start() == b""
    whole = hello(HOST)
    assert passage.stream_filter.client_data_received(whole[:100]) == b"", "nothing goes on before the name is known"
    assert passage.stream_filter.client_data_received(whole[100:]) == whole
    assert passage.stream_filter.client_data_received(b"anything") == b"anything"
    assert passage.stream_filter.client_data_received(b"") == b""


def test_what_comes_with_the_request_for_a_tunnel_is_part_of_the_tunnel():
    whole = hello(HOST)
    passage = let_through(
        proxy().client_data_received(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode() + whole)
    )
    assert passage.stream_filter.start() == whole


@pytest.mark.parametrize(
    "inside", [hello("other.example"), hello(None), b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n", b""]
)
def test_a_tunnel_to_443_carries_nothing_but_tls_for_its_host(inside):
    passage = let_through(proxy().client_data_received(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode()))
    assert refused(passage.stream_filter.client_data_received(inside)).port == 443


def test_a_tunnel_to_80_carries_one_request_for_its_host():
    asked = f"CONNECT {HOST}:80 HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    sieve = let_through(proxy().client_data_received(asked)).stream_filter
    assert isinstance(sieve, InspectingFilter)
    assert sieve.client_data_received(f"GET /a HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()).startswith(
        b"GET /a HTTP/1.1\r\n"
    )
    assert sieve.is_done
    sieve = let_through(proxy().client_data_received(asked)).stream_filter
    assert (
        refused(sieve.client_data_received(b"GET /a HTTP/1.1\r\nHost: other.example\r\n\r\n")).host == "other.example"
    )


def test_a_plain_request_goes_on_without_what_is_the_proxys():
    own = "Proxy-Authorization: Basic eA==\r\nProxy-Connection: keep-alive\r\nConnection: X-Hop\r\nX-Hop: 1\r\n"
    kept = f"Host: {HOST}\r\nCookie: a=b\r\n"
    asked = f"POST http://{HOST}/a?b=c HTTP/1.1\r\n{own}{kept}Content-Length: 4\r\n\r\nab".encode()
    passage = let_through(proxy().client_data_received(asked))
    sent = passage.stream_filter.start().decode()
    expected = f"POST /a?b=c HTTP/1.1\r\n{kept}Content-Length: 4\r\nConnection: close\r\n\r\nab"
    assert sent.lower() == expected.lower()
    assert passage.stream_filter.client_data_received(b"cd") == b"cd"
    assert passage.stream_filter.is_done
    assert (
        passage.stream_filter.client_data_received(
            f"GET http://{HOST}/second HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
        )
        == b""
    )


NAMES_ANOTHER_HOST = (
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
)
"""Of these a server in front of others tells them which host was asked for; many programs take that for the host."""


@pytest.mark.parametrize("named", NAMES_ANOTHER_HOST)
def test_no_request_tells_of_another_host_in_a_proxys_name(named):
    kept = f"Host: {HOST}\r\nX-Hosted-By: me\r\nOrigin: http://{HOST}\r\n"
    asked = f"GET http://{HOST}/ HTTP/1.1\r\n{named}\r\n{kept}\r\n".encode()
    sent = let_through(proxy().client_data_received(asked)).stream_filter.start().decode()
    assert sent.lower() == f"GET / HTTP/1.1\r\n{kept}Connection: close\r\n\r\n".lower()


@pytest.mark.parametrize(
    ("asked", "host", "port"),
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
def test_the_proxy_refuses_everything_else_with_a_sentence(asked, host, port):
    refusal = refused(proxy().client_data_received(asked))
    assert (refusal.host, refusal.port) == (host, port)
    assert not asked or refusal.response.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 400 "))
    assert not asked or b"connection: close" in refusal.response.lower()
    assert not asked or f"Sandbox refused {host}:{port}: {refusal.reason}".encode() in refusal.response


def test_a_request_that_comes_in_pieces_is_waited_for():
    opening = proxy()
    assert opening.client_data_received(b"CONNECT files.example") is None
    let_through(opening.client_data_received(b".org:443 HTTP/1.1\r\nHost: x\r\n\r\n"))


# Port 80


@pytest.mark.parametrize("host", [HOST, f"{HOST}:80", HOST.upper()])
def test_a_plain_request_to_the_address_of_an_allowed_host_goes_on_and_is_the_only_one(host):
    first = f"GET /a HTTP/1.1\r\nHost: {host}\r\nConnection: keep-alive\r\n\r\n".encode()
    smuggled = b"GET /b HTTP/1.1\r\nHost: other.example\r\n\r\n"
    passage = let_through(plain().client_data_received(first + smuggled))
    sent = passage.stream_filter.start()
    assert sent.startswith(b"GET /a HTTP/1.1\r\n")
    assert sent.lower().endswith(b"connection: close\r\n\r\n")
    assert b"/b" not in sent
    assert passage.stream_filter.is_done


def test_a_body_in_chunks_is_framed_anew():
    head = f"POST / HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    sieve = let_through(plain().client_data_received(head + b"2;x=y\r\nab\r\n")).stream_filter
    assert sieve.start().endswith(b"\r\n\r\n2\r\nab\r\n")
    assert sieve.client_data_received(b"0\r\nTrailer: x\r\n\r\nGET /b HTTP/1.1\r\n\r\n") == b"0\r\n\r\n"


def test_a_body_that_breaks_off_ends_the_connection():
    head = f"POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 9\r\n\r\nab".encode()
    sieve = let_through(plain().client_data_received(head)).stream_filter
    sieve.start()
    refused(sieve.client_data_received(b""))


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
def test_port_80_refuses_everything_else_with_a_sentence(head):
    assert refused(plain().client_data_received(head.encode() + b"\r\n\r\n")).response.startswith(
        (b"HTTP/1.1 403 ", b"HTTP/1.1 400 ")
    )


@pytest.mark.parametrize("token", ["host", "Host", "close, HOST"])
def test_a_request_that_wants_its_host_left_out_on_the_way_is_told_why_it_goes_nowhere(token):
    head = f"Host: {HOST}\r\nConnection: {token}\r\n\r\n"
    direct = refused(plain().client_data_received(f"GET / HTTP/1.1\r\n{head}".encode()))
    by_proxy = refused(proxy().client_data_received(f"GET http://{HOST}/ HTTP/1.1\r\n{head}".encode()))
    for refusal in (direct, by_proxy):
        assert refusal.response.startswith(b"HTTP/1.1 400 ")
        assert b"Connection" in refusal.response
        assert (refusal.host, refusal.port) == (HOST, 80)


def test_an_endless_head_is_refused():
    opening = plain()
    pieces = [f"GET / HTTP/1.1\r\nHost: {HOST}\r\nX: ".encode(), *[b"a" * 16_384] * 2]
    outcomes = [opening.client_data_received(piece) for piece in pieces]
    assert outcomes[:2] == [None, None]
    assert refused(outcomes[2]).response.startswith(b"HTTP/1.1 400 ")


def test_an_address_that_no_name_was_given_is_refused_even_for_an_allowed_host():
    assert (
        "no address"
        in refused(plain(None).client_data_received(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())).reason
    )
    assert "no address" in refused(tls(None).client_data_received(hello(HOST))).reason


# Port 443


def test_tls_to_the_address_of_an_allowed_host_goes_on_from_its_first_byte():
    whole = hello(HOST)
    opening = tls()
    assert opening.client_data_received(whole[:50]) is None
    passage = let_through(opening.client_data_received(whole[50:]))
    assert (passage.host, passage.port, passage.greeting) == (HOST, 443, b"")
    assert passage.stream_filter.start() == whole


@pytest.mark.parametrize(
    ("said", "host"),
    [
        (hello("other.example"), "other.example"),
        (hello(None), HOST),
        (b"SSH-2.0-x\r\n", HOST),
        (b"", HOST),
        (b"\x16\x03\x01\x40\x00\x01" + bytes(CLIENT_HELLO_BYTES_MAX), HOST),
    ],
)
def test_tls_for_another_server_or_for_none_gets_no_byte(said, host):
    refusal = refused(tls().client_data_received(said))
    assert (refusal.host, refusal.port, refusal.response) == (host, 443, b"")


def test_a_second_name_that_is_encrypted_is_refused_where_only_some_names_may_be_reached():
    let_through(tls().client_data_received(client_hello(HOST)))
    assert "ECH" in refused(tls().client_data_received(client_hello(HOST, encrypted_too=True))).reason


def test_the_models_host_is_not_reached_even_where_a_rule_allows_it():
    assert "model" in refused(tls(MODEL).client_data_received(hello(MODEL))).reason
    assert not OUTBOUND.allows_host(MODEL)


# Nowhere


def test_where_nothing_is_allowed_each_is_refused_with_its_name():
    asked = [
        (proxy(NOTHING), f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode()),
        (proxy(NOTHING), f"GET http://{HOST}/ HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()),
        (plain(None, NOTHING), f"HEAD / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()),
        (tls(None, NOTHING), hello(HOST)),
    ]
    for opening, data in asked:
        refusal = refused(opening.client_data_received(data))
        assert (refusal.host, refusal.reason) == (HOST, ISOLATED)


@pytest.mark.parametrize(
    ("vm", "told"),
    [
        (Vm(), "vm.network_mode is isolated: nothing but the model is reached."),
        (Vm(network_mode="outbound"), "vm.allowed_hosts is empty: nothing but the model is reached."),
    ],
)
def test_why_nothing_is_allowed_is_told(vm, told):
    assert EgressPolicy(egress_rules(vm), MODEL).deny_reason(HOST, 443) == told


@given(st.lists(st.binary(max_size=60), max_size=6), st.sampled_from([proxy, plain, tls]))
def test_no_bytes_make_it_raise_or_wait_for_ever(pieces, kind):
    opening, outcome = kind(), None
    for piece in [*pieces, b""]:
        outcome = opening.client_data_received(piece)
        if outcome is not None:
            break
    assert isinstance(outcome, Denial)


@given(st.text(max_size=40), st.sampled_from(["CONNECT {} HTTP/1.1", "GET http://{}/ HTTP/1.1", "GET {} HTTP/1.1"]))
def test_no_target_makes_it_raise(target, line):
    opening = proxy()
    outcome = opening.client_data_received(
        line.format(target).encode() + b"\r\nHost: a\r\n\r\n"
    ) or opening.client_data_received(b"")
    assert refused(outcome).reason
