"""A ClientHello is read field by field as RFC 8446 and RFC 6066 lay it out; the server must not read another name."""

import pytest

from sandbox.gateway.egress.client_hello import ClientHello, parse_client_hello

NAME, OTHER = b"files.example.org", b"other.example"
ALPN, EARLY_DATA, ENCRYPTED_HELLO, KEY_SHARE = 16, 42, 0xFE0D, 51


def vector(size: int, content: bytes) -> bytes:
    return len(content).to_bytes(size) + content


def server_names(*names: tuple[int, bytes]) -> tuple[int, bytes]:
    return 0, vector(2, b"".join(kind.to_bytes(1) + vector(2, name) for kind, name in names))


def message(
    *extensions: tuple[int, bytes], session: bytes = b"", ciphers: bytes = b"\x13\1", more: bytes = b""
) -> bytes:
    """A handshake message. more: behind the extensions."""
    told = b"".join(kind.to_bytes(2) + vector(2, content) for kind, content in extensions)
    body = b"\3\3" + b"\xaa" * 32 + vector(1, session) + vector(2, ciphers) + vector(1, b"\0") + vector(2, told) + more
    return b"\1" + vector(3, body)


def records(handshake: bytes, size: int = 16384, version: bytes = b"\3\1") -> bytes:
    pieces = [handshake[begin : begin + size] for begin in range(0, len(handshake), size)]
    return b"".join(b"\x16" + version + vector(2, piece) for piece in pieces)


def read(*extensions: tuple[int, bytes], **fields: bytes) -> ClientHello:
    said = records(message(*extensions, **fields))
    hello = parse_client_hello(said)
    assert hello.is_complete
    assert hello.byte_count == len(said)
    return hello


WHOLE = records(message(server_names((0, NAME))))


def test_the_name_is_read_wherever_its_extension_stands():
    assert read(server_names((0, NAME))).server_name == "files.example.org"
    others = [(ALPN, b"\0\3\2h2"), (KEY_SHARE, bytes(300)), (0xFFFF, b"")]
    for place in range(4):
        extensions = [*others[:place], server_names((0, NAME)), *others[place:]]
        assert read(*extensions) == ClientHello(
            True, "files.example.org", byte_count=len(records(message(*extensions)))
        )


@pytest.mark.parametrize("session", [b"", b"s" * 32, b"s" * 255])
@pytest.mark.parametrize("ciphers", [b"\x13\1", b"\x13\1" * 200])
def test_the_fields_before_the_extensions_are_passed_over(session, ciphers):
    assert read(server_names((0, NAME)), session=session, ciphers=ciphers).server_name == "files.example.org"


# Which name counts


@pytest.mark.parametrize(
    "extensions",
    [
        [server_names((0, NAME), (0, OTHER))],
        [server_names((0, OTHER), (0, NAME))],
        [server_names((0, NAME), (0, NAME))],
        [server_names((0, NAME)), server_names((0, OTHER))],
        [server_names((0, NAME)), (ALPN, b""), server_names((0, NAME))],
    ],
)
def test_of_two_names_none_counts(extensions):
    assert read(*extensions).server_name is None


@pytest.mark.parametrize("kind", [1, 2, 255])
def test_a_name_of_another_type_is_no_host_name(kind):
    assert read(server_names((kind, NAME))).server_name is None
    assert read(server_names((kind, OTHER), (0, NAME))).server_name == "files.example.org"
    assert read(server_names((0, NAME), (kind, OTHER))).server_name == "files.example.org"


@pytest.mark.parametrize("extensions", [[], [server_names()], [server_names((0, b""))], [(ALPN, b"\0\3\2h2")]])
def test_a_hello_without_a_name_has_none(extensions):
    assert read(*extensions).server_name is None


@pytest.mark.parametrize("kind", [1, 256, 0xFF00, ALPN])
def test_an_extension_of_another_type_names_nobody(kind):
    assert read((kind, server_names((0, NAME))[1])).server_name is None


def test_a_name_that_is_not_ascii_is_no_name_of_a_listed_host():
    assert read(server_names((0, b"files.example.or\xe9"))).server_name == "files.example.or\ufffd"


def test_a_name_of_many_bytes_is_read_in_full():
    assert read(server_names((0, b"a" * 300))).server_name == "a" * 300


# What else the extensions tell


def test_an_encrypted_hello_and_early_data_are_told_apart():
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


def test_a_long_hello_is_read_by_all_three_bytes_of_its_length():
    long = message((ALPN, bytes(40_000)), server_names((0, NAME)), ciphers=bytes(40_000))
    assert long[1] == 1, "more than 65535 bytes"
    said = records(long)
    assert parse_client_hello(said) == ClientHello(True, "files.example.org", byte_count=len(said))
    assert parse_client_hello(said[:-1]) == ClientHello(False)


@pytest.mark.parametrize("length", [b"\1\0\0", b"\0\1\0", b"\0\0\1"])
def test_a_message_that_says_it_is_longer_is_waited_for(length):
    whole = message(server_names((0, NAME)))
    told = int.from_bytes(whole[1:4]) + int.from_bytes(length)
    assert parse_client_hello(records(b"\1" + told.to_bytes(3) + whole[4:])) == ClientHello(False)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_the_head_of_the_message_may_come_in_pieces(size):
    said = records(message(server_names((0, NAME))), size)
    assert parse_client_hello(said) == ClientHello(True, "files.example.org", byte_count=len(said))


def test_an_empty_hello_names_nobody():
    assert parse_client_hello(records(b"\1\0\0\0")) == ClientHello(True, byte_count=9)
    assert parse_client_hello(records(b"\1\0\0")) == ClientHello(False)


@pytest.mark.parametrize("size", [1, 100])
def test_what_follows_in_the_same_record_leaves_the_hello_without_a_name(size):
    """The server might take that for the hello that counts."""
    whole = message(server_names((0, NAME)))
    said = records(whole + bytes(size))
    assert parse_client_hello(said) == ClientHello(True, byte_count=len(said))
    # The rest of the record need not be there.
    assert parse_client_hello(said[:-1]) == ClientHello(True, byte_count=len(said))


def test_a_record_has_at_most_so_many_bytes():
    for size, is_read in ((16384 + 256, True), (16384 + 257, False)):
        rest = size - len(message(server_names((0, NAME)), (ALPN, b"")))
        said = records(message(server_names((0, NAME)), (ALPN, bytes(rest))), size)
        assert int.from_bytes(said[3:5]) == size
        hello = parse_client_hello(said)
        assert (hello.is_complete, hello.server_name is not None) == (True, is_read)
        assert hello.byte_count == (len(said) if is_read else 5)


def test_an_empty_record_is_odd():
    assert parse_client_hello(b"\x16\3\1\0\0") == ClientHello(True, byte_count=5)
    assert parse_client_hello(records(WHOLE[5:9]) + b"\x16\3\1\0\0") == ClientHello(True, byte_count=14)


@pytest.mark.parametrize("beside", [b"\0", b"\0\0", b"\0\0\0\1"])
def test_extensions_that_are_cut_short_name_nobody(beside):
    """Their length counts the bytes of a further one, which is not whole."""
    told = message(server_names((0, NAME)))
    body = told[4:]
    at = 2 + 32 + 1 + 4 + 2
    longer = body[:at] + (int.from_bytes(body[at : at + 2]) + len(beside)).to_bytes(2) + body[at + 2 :] + beside
    said = records(b"\1" + vector(3, longer))
    assert parse_client_hello(said) == ClientHello(True, byte_count=len(said))


def test_bytes_behind_the_extensions_are_no_extensions():
    assert read(server_names((0, NAME)), more=b"\0\0\0\1").server_name == "files.example.org"
    assert read(more=server_names((0, NAME))[1]).server_name is None


def test_a_list_of_names_that_is_cut_short_names_nobody():
    _, content = server_names((0, NAME))
    for cut in (content[:-1], content[:1], b"", vector(2, content[2:] + b"\0"), vector(2, content[2:] + b"\0\0")):
        assert read((0, cut)).server_name is None


def test_bytes_behind_the_list_of_names_are_no_names():
    _, content = server_names((0, NAME))
    assert read((0, content + content[2:])).server_name == "files.example.org"


# What is no hello, or an odd one


@pytest.mark.parametrize("kind", [0, 2, 11, 255])
def test_another_handshake_message_is_no_hello(kind):
    assert parse_client_hello(records(kind.to_bytes(1) + message(server_names((0, NAME)))[1:])) == ClientHello(True)


@pytest.mark.parametrize("kind", [0x14, 0x15, 0x17, 0x18, 0x80])
def test_another_record_is_no_hello_and_one_between_the_pieces_of_a_hello_makes_it_odd(kind):
    assert parse_client_hello(kind.to_bytes(1) + WHOLE[1:]) == ClientHello(True)
    first = records(WHOLE[5:30])
    assert parse_client_hello(first + kind.to_bytes(1) + b"\3\1\0\1x") == ClientHello(True, byte_count=len(first) + 5)


@pytest.mark.parametrize("version", [b"\2\1", b"\4\1", b"\0\3", b"\x7f\1"])
def test_a_record_of_another_version_is_odd_as_soon_as_that_shows(version):
    said = records(WHOLE[5:], version=version)
    assert parse_client_hello(said) == ClientHello(True, byte_count=5)
    assert parse_client_hello(said[:4]) == ClientHello(True, byte_count=4)
    assert parse_client_hello(said[:2]) == ClientHello(True, byte_count=2)
    assert parse_client_hello(said[:1]) == ClientHello(False)


@pytest.mark.parametrize("minor", [0, 1, 3, 4, 255])
def test_the_minor_version_of_a_record_does_not_matter(minor):
    assert parse_client_hello(records(WHOLE[5:], version=bytes([3, minor]))).server_name == "files.example.org"


@pytest.mark.parametrize("first", [b"\x15", b"G", b"\x17\3", b"\0"])
def test_one_byte_shows_that_there_is_no_handshake(first):
    assert parse_client_hello(first) == ClientHello(True)
    assert parse_client_hello(b"") == ClientHello(False)
