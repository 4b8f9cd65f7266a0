"""The search for a ClientHello in the first bytes of an unknown protocol."""

import pytest

from sandbox.gateway.egress.policy import EgressPolicy
from sandbox.gateway.egress.tls import ClientHelloSearch
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX, PARTIAL_HELLOS_MAX, UNKNOWN_PROTOCOL_BYTES_MAX
from sandbox.model.egress import EgressRule, EgressRules

HOST, OTHER = "db.example.org", "other.example"
POLICY = EgressPolicy(EgressRules((EgressRule(HOST, (8080,)),)), "api.anthropic.com")
UNRESTRICTED_POLICY = EgressPolicy(EgressRules(is_unrestricted=True), "api.anthropic.com")
ENCRYPTED_NAME = b"\xfe\x0d\0\x01x"
LAST_START = UNKNOWN_PROTOCOL_BYTES_MAX - CLIENT_HELLO_BYTES_MAX


def record(content: bytes, kind: int = 22, version: bytes = b"\3\1") -> bytes:
    return bytes([kind]) + version + len(content).to_bytes(2) + content


def message(body: bytes, length: int | None = None) -> bytes:
    return b"\1" + (len(body) if length is None else length).to_bytes(3) + body


def body(*names: str, extensions: bytes = b"", version: bytes = b"\3\3") -> bytes:
    entries = b"".join(b"\0" + len(name).to_bytes(2) + name.encode() for name in names)
    if names:
        extensions = b"\0\0" + (len(entries) + 2).to_bytes(2) + len(entries).to_bytes(2) + entries + extensions
    return version + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + len(extensions).to_bytes(2) + extensions


def hello(*names: str, extensions: bytes = b"") -> bytes:
    return record(message(body(*names, extensions=extensions)))


def deny_reason(*chunks: bytes, policy: EgressPolicy = POLICY) -> str | None:
    search, received = ClientHelloSearch(policy, HOST), bytearray()
    for chunk in chunks:
        received += chunk
        if (reason := search.deny_reason(received)) is not None:
            return reason
    return None


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@pytest.mark.parametrize("prefix", [b"", b"\0", b"prefix", b"\x16", b"\x16\3\1\0\1", b"\x16\3\1\0\5\1\0\0"])
@pytest.mark.parametrize("name", [HOST, HOST.upper(), f"{HOST}."])
def test_hello_for_the_host_or_without_a_name_is_allowed(prefix: bytes, name: str):
    for data in (hello(name), hello()):
        assert deny_reason(prefix + data) is None
        assert deny_reason(*bytewise(prefix + data + b"\x17\3\3\0\1x")) is None


@pytest.mark.parametrize("length", [0, 38, 0x30000])
def test_message_with_an_impossible_length_is_not_a_hello(length: int):
    data = record(message(b"\3\3" + bytes(length - 2) if 2 <= length < 100 else b"", length))
    assert deny_reason(data) is None
    assert deny_reason(*bytewise(data)) is None


@pytest.mark.parametrize("prefix", [b"", b"\0", b"prefix", b"\x16", b"\x16\3\1\0\1"])
def test_hello_for_another_server_is_denied(prefix: bytes):
    expected = f"the connection is to {HOST}, but its TLS handshake names another server (SNI)."
    assert deny_reason(prefix + hello(OTHER)) == expected
    assert deny_reason(*bytewise(prefix + hello(OTHER))) == expected
    assert deny_reason(prefix + hello(HOST) + hello(OTHER)) == expected


def test_hello_in_many_records_is_reassembled():
    content = message(body(OTHER))
    for size in (1, 2, 3, 4, 5, 40):
        data = b"".join(record(content[at : at + size]) for at in range(0, len(content), size))
        assert deny_reason(b"-" + data) is not None, size
    between = record(content[:10]) + record(b"\1", kind=20) + record(b"\1\0", kind=21) + record(content[10:])
    assert deny_reason(between) is not None
    assert deny_reason(record(content[:10]) + record(b"data", kind=23) + record(content[10:])) is None


@pytest.mark.parametrize(
    "data",
    [
        hello(HOST, OTHER),
        record(message(body(HOST)) + b"x"),
        record(message(body(HOST)) + message(body(OTHER))),
        record(message(body(HOST)[:-3])),
        record(message(body(HOST, extensions=b"\0\1\0\5"))),
    ],
    ids=["two names", "trailing byte", "two messages", "truncated", "extension past the end"],
)
def test_ambiguous_hello_is_denied(data: bytes):
    assert (
        deny_reason(data)
        == f"the connection to {HOST} contains a TLS ClientHello that servers may interpret differently."
    )


def test_encrypted_name_is_denied_unless_the_policy_allows_it():
    data = hello(HOST, extensions=ENCRYPTED_NAME)
    expected = "the TLS ClientHello contains a second, encrypted server name (ECH); disable ECH in the program."
    assert deny_reason(data) == expected
    assert deny_reason(data, policy=UNRESTRICTED_POLICY) is None


@pytest.mark.parametrize(
    ("length", "is_hello"), [(0, False), (38, False), (0x2FFFF, True), (0x30000, False), (0xFFFFFF, False)]
)
def test_body_length_determines_whether_a_hello_is_expected(length: int, is_hello: bool):
    data = b"\x16\3\1\x40\0" + message(body(OTHER), length) + bytes(CLIENT_HELLO_BYTES_MAX)
    expected = f"the connection to {HOST} contains an incomplete TLS ClientHello." if is_hello else None
    assert deny_reason(data) == expected


@pytest.mark.parametrize("high_byte", [1, 2])
def test_message_length_uses_all_three_bytes(high_byte: int):
    content = body(OTHER)
    assert deny_reason(record(message(content))) is not None
    assert deny_reason(record(message(content, high_byte << 16 | len(content)))) is None


@pytest.mark.parametrize("split", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("header", "is_hello"),
    [
        (b"\1\0\0\x27\3", True),
        (b"\1\0\0\x26\3", False),
        (b"\1\2\xff\xff\3", True),
        (b"\1\3\0\0\3", False),
        (b"\1\0\0\x27\2", False),
        (b"\1\0\0\x27\4", False),
    ],
)
def test_start_of_a_message_in_two_records_determines_whether_a_hello_is_expected(
    header: bytes, is_hello: bool, split: int
):
    content = header + bytes(20)
    data = record(content[:split]) + record(content[split:]) + b"\x16\3\1\x40\0" + bytes(CLIENT_HELLO_BYTES_MAX)
    expected = f"the connection to {HOST} contains an incomplete TLS ClientHello." if is_hello else None
    assert deny_reason(data) == expected


def test_body_of_the_minimum_length_is_checked_for_a_name():
    shortest = b"\3\3" + bytes(32) + b"\0" + b"\0\0" + b"\0" + b"\0"
    assert len(shortest) == 39
    assert deny_reason(record(message(shortest))) is not None
    assert deny_reason(record(message(shortest[:-1]))) is None


@pytest.mark.parametrize("position", [0, 1, 4])
def test_message_with_a_different_header_is_not_a_hello(position: int):
    content = bytearray(message(body(OTHER)))
    assert deny_reason(record(bytes(content))) is not None
    content[position] ^= 0x40
    assert deny_reason(record(bytes(content))) is None


def test_incomplete_hello_is_denied_at_the_size_limit():
    start = record(message(body(OTHER), 0x3000))
    start = start[:3] + (0x3004).to_bytes(2) + start[5:]
    search, received = ClientHelloSearch(POLICY, HOST), bytearray(b"--" + start)
    received += bytes(2 + CLIENT_HELLO_BYTES_MAX - len(received) - 1)
    assert search.deny_reason(received) is None
    received += b"\0"
    assert search.deny_reason(received) == f"the connection to {HOST} contains an incomplete TLS ClientHello."


@pytest.mark.parametrize(("count", "is_denied"), [(PARTIAL_HELLOS_MAX, False), (PARTIAL_HELLOS_MAX + 1, True)])
def test_partial_hellos_are_limited(count: int, is_denied: bool):
    start = b"\x16\3\1\x30\0\1\0\x20\0\3"
    expected = "the connection contains too many possible TLS ClientHellos." if is_denied else None
    assert deny_reason(start * count) == expected
    assert deny_reason(*bytewise(start * count)) == deny_reason(start * count)


def test_complete_hellos_do_not_count_as_partial():
    assert deny_reason(*[hello(HOST)] * (PARTIAL_HELLOS_MAX + 4)) is None
    assert deny_reason(*[b"\x16\3\1\0\x05\1\0\0\5\3"] * (PARTIAL_HELLOS_MAX + 4)) is None


def test_hello_is_searched_up_to_its_last_possible_position():
    assert deny_reason(bytes(LAST_START) + hello(OTHER)) is not None
    assert deny_reason(bytes(LAST_START + 1) + hello(OTHER)) is None
    assert deny_reason(*bytewise(b"-" * 40 + hello(OTHER))) is not None
