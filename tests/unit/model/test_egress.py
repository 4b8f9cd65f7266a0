"""What a manifest's network fields allow."""

import pytest

from sandbox.model.egress import TRANSPARENT_PORTS_MAX, EgressRules, egress_rules, is_public_name, transparent_ports
from sandbox.model.manifest.schema import Vm


def outbound(*hosts: str) -> EgressRules:
    return egress_rules(Vm(network_mode="outbound", allowed_hosts=hosts))


@pytest.mark.parametrize("host", ["git.example.org", "GIT.Example.ORG", "git.example.org."])
@pytest.mark.parametrize("port", [443, 80])
def test_a_host_without_a_port_is_reached_at_443_and_80(host, port):
    assert outbound("Git.Example.org").allows(host, port)


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("git.example.org", 22),
        ("git.example.org", 8443),
        ("example.org", 443),
        ("a.git.example.org", 443),
        ("notgit.example.org", 443),
        ("git.example.org.evil.example", 443),
        ("git.example.orgx", 443),
        ("git.example.org..", 443),
        ("gitxexample.org", 443),
        ("", 443),
    ],
)
def test_a_host_is_nothing_but_itself(host, port):
    assert not outbound("git.example.org").allows(host, port)


@pytest.mark.parametrize("host", ["a.example.org", "a.b.c.example.org", "A.EXAMPLE.ORG", "xn--bcher-kva.example.org."])
def test_a_wildcard_is_every_subdomain_at_any_depth(host):
    assert outbound("*.example.org").allows(host, 443)


@pytest.mark.parametrize(
    "host",
    [
        "example.org",
        ".example.org",
        "badexample.org",
        "a.badexample.org",
        "a.example.org.evil.example",
        "example.org.evil.example",
        "a.example.orgx",
        "*",
        "org",
    ],
)
def test_a_wildcard_is_not_the_domain_nor_what_looks_like_it(host):
    assert not outbound("*.example.org").allows(host, 443)


def test_a_port_stands_instead_of_the_two():
    rules = outbound("db.example.org:5432", "*.example.net:8443", "git.example.org")
    assert rules.allows("db.example.org", 5432)
    assert rules.allows("x.example.net", 8443)
    assert not rules.allows("db.example.org", 443)
    assert not rules.allows("x.example.net", 443)
    assert not rules.allows("git.example.org", 5432), "a port of one host is none of another's"
    assert rules.allows_host("db.example.org")
    assert not rules.allows_host("example.net")


def test_a_host_may_stand_there_twice():
    rules = outbound("git.example.org", "git.example.org:22")
    assert rules.allows("git.example.org", 443)
    assert rules.allows("git.example.org", 22)


@pytest.mark.parametrize("vm", [Vm(), Vm(network_mode="outbound"), Vm(network_mode="isolated")])
def test_nothing_is_allowed_where_nothing_is_asked_for(vm):
    rules = egress_rules(vm)
    assert rules.is_isolated
    assert not rules.allows("git.example.org", 443)
    assert not rules.allows_host("git.example.org")


@pytest.mark.parametrize("host", ["git.example.org", "a.b.co.uk", "xn--bcher-kva.example.org", "GIT.EXAMPLE.ORG."])
@pytest.mark.parametrize("port", [443, 80, 22, 1, 65535])
def test_full_is_every_public_name_at_every_port(host, port):
    assert egress_rules(Vm(network_mode="full")).allows(host, port)


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "metadata", "intranet", "localhost.", "a.localhost", "printer.local", "x.home.arpa"),
        *("metadata.google.internal", "a.internal.", "x.onion", "x.invalid", "x.test", "x.alt", "home.arpa"),
        *("127.0.0.1", "127.1", "8.8.4.4", "8.0x080404", "1.0x7f", "0x7f000001", "2130706433", "a.0x", "a.1"),
    ],
)
def test_full_is_no_local_name_and_no_address(host):
    assert not is_public_name(host)
    assert not egress_rules(Vm(network_mode="full")).allows_host(host)


def test_programs_without_proxy_support_reach_the_ports_that_are_named():
    assert transparent_ports(EgressRules()) == (443, 80)
    assert transparent_ports(outbound("a.example.org:22", "b.example.org:8443", "c.example.org:443")) == (
        443,
        80,
        22,
        8443,
    )
    assert transparent_ports(egress_rules(Vm(network_mode="full"))) == (443, 80, 22)


def test_a_port_at_which_the_gateway_listens_for_itself_is_left_to_the_proxy():
    hosts = ("a.example.org:53", "a.example.org:3128", "a.example.org:8123", "a.example.org:54")
    assert transparent_ports(outbound(*hosts)) == (443, 80, 54)


def test_there_are_not_more_listeners_than_can_be_handed_over():
    ports = transparent_ports(outbound(*(f"a.example.org:{port}" for port in range(1000, 1256))))
    assert len(ports) == len(set(ports)) == TRANSPARENT_PORTS_MAX
