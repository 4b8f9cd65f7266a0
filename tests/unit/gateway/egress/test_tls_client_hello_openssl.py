"""The gateway and OpenSSL read the same server name from damaged ClientHellos."""

import contextlib
import ssl
from collections import Counter

import pytest

from doubles import random_seed
from doubles.damaged_bytes import damage
from sandbox.gateway.egress.tls import parse_client_hello

NAME = "files.example.org"
HELLO_COUNT = 3000


def client_hello(server_name: str) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=server_name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def names_read_by_openssl(data: bytes) -> list[str]:
    """Return the server name for which OpenSSL selects a certificate; empty if OpenSSL rejects the data earlier."""
    names: list[str] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda _, name, __: names.append(name) if name is not None else None
    received = ssl.MemoryBIO()
    received.write(data)
    received.write_eof()
    server = context.wrap_bio(received, ssl.MemoryBIO(), server_side=True)
    with contextlib.suppress(ssl.SSLError):
        server.do_handshake()
    return names


# The callback of the ssl module cannot decode names that are not ASCII.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_gateway_and_openssl_read_the_same_name_from_damaged_hellos():
    hello = client_hello(NAME)
    assert names_read_by_openssl(hello) == [NAME]
    outcomes: Counter[str] = Counter()
    for number, damaged in enumerate(damage(hello, HELLO_COUNT, random_seed.seed())):
        names = names_read_by_openssl(damaged)
        name = parse_client_hello(damaged).server_name
        assert not names or names == [name], (number, damaged.hex())
        outcomes["both" if names else "gateway" if name else "none"] += 1
    assert min(outcomes["both"], outcomes["none"]) > HELLO_COUNT / 10, outcomes
