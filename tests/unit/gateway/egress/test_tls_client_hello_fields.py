"""A ClientHello is parsed as defined in RFC 8446 and 6066. No server may read a different name from the same bytes."""

import pytest

from sandbox.gateway.egress.tls import ClientHello, parse_client_hello

NAME, OTHER = b"files.example.org", b"other.example"
ALPN, EARLY_DATA, ENCRYPTED_HELLO, KEY_SHARE = 16, 42, 0xFE0D, 51


def vector(size: int, content: bytes) -> bytes:
    return len(content).to_bytes(size) + content


def server_names(*names: tuple[int, bytes]) -> tuple[int, bytes]:
    return 0, vector(2, b"".join(kind.to_bytes(1) + vector(2, name) for kind, name in names))


def message(
    *extensions: tuple[int, bytes], session: bytes = b"", ciphers: bytes = b"\x13\1", more: bytes = b""
) -> bytes:
    """Build a handshake message; `more` follows the extensions."""
    encoded = b"".join(kind.to_bytes(2) + vector(2, content) for kind, content in extensions)
    body = (
        b"\3\3" + b"\xaa" * 32 + vector(1, session) + vector(2, ciphers) + vector(1, b"\0") + vector(2, encoded) + more
    )
    return b"\1" + vector(3, body)


def records(handshake: bytes, size: int = 16384, version: bytes = b"\3\1") -> bytes:
    pieces = [handshake[begin : begin + size] for begin in range(0, len(handshake), size)]
    return b"".join(b"\x16" + version + vector(2, piece) for piece in pieces)


def read(*extensions: tuple[int, bytes], **fields: bytes) -> ClientHello:
    data = records(message(*extensions, **fields))
    hello = parse_client_hello(data)
    assert hello.is_complete
    assert hello.byte_count == len(data)
    return hello


COMPLETE_HELLO = records(message(server_names((0, NAME))))


def test_server_name_is_read_at_any_extension_position():
    assert read(server_names((0, NAME))).server_name == "files.example.org"
    others = [(ALPN, b"\0\3\2h2"), (KEY_SHARE, bytes(300)), (0xFFFF, b"")]
    for place in range(4):
        extensions = [*others[:place], server_names((0, NAME)), *others[place:]]
        assert read(*extensions) == ClientHello(
            True, "files.example.org", byte_count=len(records(message(*extensions)))
        )


@pytest.mark.parametrize("session", [b"", b"s" * 32, b"s" * 255])
@pytest.mark.parametrize("ciphers", [b"\x13\1", b"\x13\1" * 200])
def test_fields_that_precede_the_extensions_are_skipped(session, ciphers):
    assert read(server_names((0, NAME)), session=session, ciphers=ciphers).server_name == "files.example.org"


# Selection of the server name


@pytest.mark.parametrize(
    "extensions",
    [
        [server_names((0, NAME), (0, OTHER))],
        [server_names((0, OTHER), (0, NAME))],
        [server_names((0, NAME), (0, NAME))],
        [server_names((0, NAME)), server_names((0, OTHER))],
        [server_names((0, NAME)), (ALPN, b""), server_names((0, NAME))],
        [server_names((1, OTHER)), server_names((0, NAME))],
        [server_names((0, NAME)), server_names((1, OTHER))],
        [server_names(), server_names((0, NAME))],
        [server_names((0, NAME)), server_names((0, b""))],
    ],
)
def test_two_server_names_are_ambiguous(extensions):
    assert read(*extensions).server_name is None


@pytest.mark.parametrize("kind", [1, 2, 255])
def test_name_of_another_type_is_ambiguous(kind):
    """nginx and HAProxy read only the first entry. If it has another type or is empty, they select a default server."""
    for names in ([(kind, NAME)], [(kind, OTHER), (0, NAME)], [(0, NAME), (kind, OTHER)]):
        assert read(server_names(*names)).server_name is None
    for names in ([(0, b""), (0, NAME)], [(0, NAME), (0, b"")], [(kind, b""), (0, NAME)]):
        assert read(server_names(*names)).server_name is None


@pytest.mark.parametrize("extensions", [[], [server_names()], [server_names((0, b""))], [(ALPN, b"\0\3\2h2")]])
def test_hello_without_server_name_extension_has_no_server_name(extensions):
    assert read(*extensions).server_name is None


@pytest.mark.parametrize("kind", [1, 256, 0xFF00, ALPN])
def test_extension_of_another_type_has_no_server_name(kind):
    assert read((kind, server_names((0, NAME))[1])).server_name is None


def test_non_ascii_name_is_decoded_with_escapes_so_that_redaction_finds_secrets_in_it():
    assert read(server_names((0, b"files.example.or\xe9"))).server_name == r"files.example.or\xe9"


def test_long_server_name_is_read_in_full():
    assert read(server_names((0, b"a" * 300))).server_name == "a" * 300


# Other extensions


def test_encrypted_server_name_of_the_older_draft_is_found():
    hello = read(server_names((0, NAME)), (0xFFCE, b"x"))
    assert (hello.has_encrypted_name, hello.server_name) == (True, NAME.decode())


def test_encrypted_hello_and_early_data_are_distinguished():
    plain, encrypted, early = (
        read(server_names((0, NAME)), *more) for more in ([], [(ENCRYPTED_HELLO, b"x")], [(EARLY_DATA, b"")])
    )
    assert [(one.has_encrypted_name, one.has_early_data) for one in (plain, encrypted, early)] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    for kind in (EARLY_DATA - 1, EARLY_DATA + 1, ENCRYPTED_HELLO - 1, ENCRYPTED_HELLO + 1, 0x0D, 0xFE):
        other = read(server_names((0, NAME)), (kind, b""))
        assert (other.has_encrypted_name, other.has_early_data) == (False, False)
    both = read((ENCRYPTED_HELLO, b""), (EARLY_DATA, b""), (ALPN, b""), server_names((0, NAME)))
    assert (both.has_encrypted_name, both.has_early_data, both.server_name) == (True, True, "files.example.org")


# Lengths


def test_long_hello_uses_all_three_length_bytes():
    long = message((ALPN, bytes(40_000)), server_names((0, NAME)), ciphers=bytes(40_000))
    assert long[1] == 1, "more than 65535 bytes"
    data = records(long)
    assert parse_client_hello(data) == ClientHello(True, "files.example.org", byte_count=len(data))
    assert parse_client_hello(data[:-1]) == ClientHello(False)


@pytest.mark.parametrize("length", [b"\1\0\0", b"\0\1\0", b"\0\0\1"])
def test_message_shorter_than_its_declared_length_is_incomplete(length):
    whole = message(server_names((0, NAME)))
    declared = int.from_bytes(whole[1:4]) + int.from_bytes(length)
    assert parse_client_hello(records(b"\1" + declared.to_bytes(3) + whole[4:])) == ClientHello(False)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_message_header_may_span_records(size):
    data = records(message(server_names((0, NAME))), size)
    assert parse_client_hello(data) == ClientHello(True, "files.example.org", byte_count=len(data))


def test_empty_hello_has_no_server_name():
    assert parse_client_hello(records(b"\1\0\0\0")) == ClientHello(True, byte_count=9)
    assert parse_client_hello(records(b"\1\0\0")) == ClientHello(False)


@pytest.mark.parametrize("size", [1, 100])
def test_trailing_data_in_the_same_record_discards_the_server_name(size):
    """The server might use the name in the second message."""
    whole = message(server_names((0, NAME)))
    data = records(whole + bytes(size))
    assert parse_client_hello(data) == ClientHello(True, byte_count=len(data))
    # The rest of the record is not needed.
    assert parse_client_hello(data[:-1]) == ClientHello(True, byte_count=len(data))


def test_oversized_record_is_rejected():
    for size, is_read in ((16384 + 256, True), (16384 + 257, False)):
        rest = size - len(message(server_names((0, NAME)), (ALPN, b"")))
        data = records(message(server_names((0, NAME)), (ALPN, bytes(rest))), size)
        assert int.from_bytes(data[3:5]) == size
        hello = parse_client_hello(data)
        assert (hello.is_complete, hello.server_name is not None) == (True, is_read)
        assert hello.byte_count == (len(data) if is_read else 5)


def test_empty_record_is_rejected():
    assert parse_client_hello(b"\x16\3\1\0\0") == ClientHello(True, byte_count=5)
    assert parse_client_hello(records(COMPLETE_HELLO[5:9]) + b"\x16\3\1\0\0") == ClientHello(True, byte_count=14)


@pytest.mark.parametrize("trailing", [b"\0", b"\0\0", b"\0\0\0\1"])
def test_truncated_extensions_have_no_server_name(trailing):
    """The declared length of the extensions includes another extension, which is truncated."""
    original = message(server_names((0, NAME)))
    body = original[4:]
    at = 2 + 32 + 1 + 4 + 2
    longer = body[:at] + (int.from_bytes(body[at : at + 2]) + len(trailing)).to_bytes(2) + body[at + 2 :] + trailing
    data = records(b"\1" + vector(3, longer))
    assert parse_client_hello(data) == ClientHello(True, byte_count=len(data))


@pytest.mark.parametrize("more", [b"\0", b"\0\0\0\1", b"\0\0" + vector(2, server_names((0, OTHER))[1])])
def test_hello_with_bytes_after_the_extensions_has_no_server_name(more):
    assert read(server_names((0, NAME)), more=more).server_name is None
    assert read(more=more).server_name is None


def test_truncated_name_list_has_no_server_name():
    _, content = server_names((0, NAME))
    for cut in (content[:-1], content[:1], b"", vector(2, content[2:] + b"\0"), vector(2, content[2:] + b"\0\0")):
        assert read((0, cut)).server_name is None


def test_hello_with_bytes_after_the_name_list_has_no_server_name():
    _, content = server_names((0, NAME))
    for more in (b"\0", content[2:], content):
        assert read((0, content + more)).server_name is None


# Other data and nonstandard records


@pytest.mark.parametrize("kind", [0, 2, 11, 255])
def test_other_handshake_messages_are_not_a_hello(kind):
    assert parse_client_hello(records(kind.to_bytes(1) + message(server_names((0, NAME)))[1:])) == ClientHello(True)


@pytest.mark.parametrize("kind", [0x14, 0x15, 0x17, 0x18, 0x80])
def test_non_handshake_record_is_rejected_at_the_start_and_between_fragments(kind):
    assert parse_client_hello(kind.to_bytes(1) + COMPLETE_HELLO[1:]) == ClientHello(True)
    first = records(COMPLETE_HELLO[5:30])
    assert parse_client_hello(first + kind.to_bytes(1) + b"\3\1\0\1x") == ClientHello(True, byte_count=len(first) + 5)


@pytest.mark.parametrize("version", [b"\2\1", b"\4\1", b"\0\3", b"\x7f\1"])
def test_record_of_another_major_version_is_rejected_early(version):
    data = records(COMPLETE_HELLO[5:], version=version)
    assert parse_client_hello(data) == ClientHello(True, byte_count=5)
    assert parse_client_hello(data[:4]) == ClientHello(True, byte_count=4)
    assert parse_client_hello(data[:2]) == ClientHello(True, byte_count=2)
    assert parse_client_hello(data[:1]) == ClientHello(False)


@pytest.mark.parametrize("minor", [0, 1, 3, 4, 255])
def test_minor_version_of_a_record_is_ignored(minor):
    assert parse_client_hello(records(COMPLETE_HELLO[5:], version=bytes([3, minor]))).server_name == "files.example.org"


@pytest.mark.parametrize("first", [b"\x15", b"G", b"\x17\3", b"\0"])
def test_one_byte_suffices_to_detect_another_protocol(first):
    assert parse_client_hello(first) == ClientHello(True)
    assert parse_client_hello(b"") == ClientHello(False)
