"""Egress rules derived from a manifest's network fields."""

import pytest

from sandbox.model.egress import TRANSPARENT_PORTS_MAX, EgressRules, egress_rules, is_public_name, transparent_ports
from sandbox.model.manifest.schema import Vm


def outbound(*hosts: str) -> EgressRules:
    return egress_rules(Vm(network_mode="outbound", allowed_hosts=hosts))


@pytest.mark.parametrize("host", ["git.example.org", "GIT.Example.ORG", "git.example.org."])
@pytest.mark.parametrize("port", [443, 80])
def test_host_without_a_port_allows_443_and_80(host, port):
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
def test_host_rule_matches_only_that_host(host, port):
    assert not outbound("git.example.org").allows(host, port)


@pytest.mark.parametrize("host", ["a.example.org", "a.b.c.example.org", "A.EXAMPLE.ORG", "xn--bcher-kva.example.org."])
def test_wildcard_matches_subdomains_at_any_depth(host):
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
def test_wildcard_matches_neither_the_domain_nor_similar_names(host):
    assert not outbound("*.example.org").allows(host, 443)


def test_explicit_port_replaces_the_default_ports():
    rules = outbound("db.example.org:5432", "*.example.net:8443", "git.example.org")
    assert rules.allows("db.example.org", 5432)
    assert rules.allows("x.example.net", 8443)
    assert not rules.allows("db.example.org", 443)
    assert not rules.allows("x.example.net", 443)
    assert not rules.allows("git.example.org", 5432), "a port of one host does not apply to another"
    assert rules.allows_host("db.example.org")
    assert not rules.allows_host("example.net")


def test_host_may_be_listed_twice():
    rules = outbound("git.example.org", "git.example.org:22")
    assert rules.allows("git.example.org", 443)
    assert rules.allows("git.example.org", 22)


@pytest.mark.parametrize("vm", [Vm(), Vm(network_mode="outbound"), Vm(network_mode="isolated")])
def test_rules_without_hosts_are_isolated(vm):
    rules = egress_rules(vm)
    assert rules.is_isolated
    assert not rules.allows("git.example.org", 443)
    assert not rules.allows_host("git.example.org")


@pytest.mark.parametrize("host", ["git.example.org", "a.b.co.uk", "xn--bcher-kva.example.org", "GIT.EXAMPLE.ORG."])
@pytest.mark.parametrize("port", [443, 80, 22, 1, 65535])
def test_network_mode_full_allows_every_public_name_on_every_port(host, port):
    assert egress_rules(Vm(network_mode="full")).allows(host, port)


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "metadata", "intranet", "localhost.", "a.localhost", "printer.local", "x.home.arpa"),
        *("metadata.google.internal", "a.internal.", "x.onion", "x.invalid", "x.test", "x.alt", "home.arpa"),
        *("127.0.0.1", "127.1", "8.8.4.4", "8.0x080404", "1.0x7f", "0x7f000001", "2130706433", "a.0x", "a.1"),
    ],
)
def test_network_mode_full_denies_local_names_and_addresses(host):
    assert not is_public_name(host)
    assert not egress_rules(Vm(network_mode="full")).allows_host(host)


def test_transparent_ports_are_the_listed_ports():
    assert transparent_ports(EgressRules()) == (443, 80)
    assert transparent_ports(outbound("a.example.org:22", "b.example.org:8443", "c.example.org:443")) == (
        443,
        80,
        22,
        8443,
    )
    assert transparent_ports(egress_rules(Vm(network_mode="full"))) == (443, 80, 22)


def test_gateway_ports_are_not_transparent():
    hosts = ("a.example.org:53", "a.example.org:3128", "a.example.org:8123", "a.example.org:54")
    assert transparent_ports(outbound(*hosts)) == (443, 80, 54)


def test_number_of_transparent_ports_is_limited():
    ports = transparent_ports(outbound(*(f"a.example.org:{port}" for port in range(1000, 1256))))
    assert len(ports) == len(set(ports)) == TRANSPARENT_PORTS_MAX
