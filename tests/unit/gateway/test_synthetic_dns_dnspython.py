"""The gateway and dnspython read the same name from damaged DNS queries."""

from collections import Counter
from contextlib import suppress
from ipaddress import IPv4Address

import dns.exception
import dns.message
import dns.name
import dns.rdatatype

from doubles import random_seed
from doubles.damaged_bytes import damage
from sandbox.gateway.synthetic_dns import respond

NAME = "www.files.example.org"
QUERY_COUNT = 5000


def name_read_by_dnspython(query: bytes) -> tuple[bytes, ...] | None:
    """Return the labels of a query's question, or None if the query is malformed or does not have one question."""
    with suppress(dns.exception.DNSException):
        message = dns.message.from_wire(query, ignore_trailing=True, question_only=True)
        if len(message.question) == 1:
            return message.question[0].name.labels
    return None


def name_read_by_gateway(query: bytes) -> str | None:
    """Return the name that the gateway looks up, or None if it rejects the query."""
    names = []

    def resolve(name: str) -> IPv4Address | None:
        names.append(name)
        return None

    respond(query, resolve)
    return names[0] if names else None


def test_gateway_and_dnspython_read_the_same_name_from_damaged_queries():
    query = dns.message.make_query(NAME, dns.rdatatype.A).to_wire()
    assert name_read_by_gateway(query) == NAME
    outcomes: Counter[str] = Counter()
    for number, damaged in enumerate(damage(query, QUERY_COUNT, random_seed.seed())):
        name, labels = name_read_by_gateway(damaged), name_read_by_dnspython(damaged)
        if name is not None and labels is not None:
            decoded = ".".join(label.decode("ascii", errors="backslashreplace") for label in labels if label) or "."
            assert name == decoded, (number, damaged.hex())
        outcomes["both" if name and labels else "gateway" if name else "dnspython" if labels else "none"] += 1
    assert min(outcomes["both"], outcomes["none"]) > QUERY_COUNT / 10, outcomes
