"""Network access of a confined clone: one host, the credentials of that host, and the user's proxy."""

import asyncio
import errno
import os
import socket
import struct
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from doubles.git_http_server import GitHttpServer
from sandbox.gateway.egress.policy import is_dialable
from sandbox.model.failure import AttemptError
from sandbox.model.manifest.schema import Repository
from sandbox.primitives.concurrency import StopFlag
from sandbox.workspace.clone.git_directory import neutralize_attributes, read_branch_commit, write_git_directory
from sandbox.workspace.clone.remote_access import SETTINGS_FILES_MAX, resolve_remote
from sandbox.workspace.clone.socks_proxy import DialPolicy, HostPort, SocksProxy

CREDENTIAL_RESPONSE = b"username=me\npassword=let-me-in\n"
SOCKS_SUCCEEDED, FORBIDDEN, UNREACHABLE, UNKNOWN_NAME, REFUSED = 0, 2, 3, 4, 5
WITHOUT_REDIRECTS, WITH_REDIRECTS = (DialPolicy(is_dialable, follows_redirects) for follows_redirects in (False, True))


class ExhaustedListener(socket.socket):
    """A listener whose first accept fails, as if no descriptor were free."""

    has_failed = False

    def accept(self):
        if not self.has_failed:
            self.has_failed = True
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


async def test_failed_accept_is_retried(banner_server):
    relay = SocksProxy(HostPort("localhost", banner_server), upstream_proxy=None, dial_policy=WITHOUT_REDIRECTS)
    with ExhaustedListener() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        async with relay.serving(listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"\x05\x01\x00")
            assert await asyncio.wait_for(reader.readexactly(2), 20) == b"\x05\x00"
            writer.close()
        assert listener.has_failed


def connect(relay, host, port):
    """Connect through the proxy; return its reply code (RFC 1928) and the first bytes from the host."""

    async def scenario():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with relay.serving(listener):
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                name = host.encode()
                writer.write(b"\x05\x01\x00\x05\x01\x00\x03" + bytes([len(name)]) + name + struct.pack("!H", port))
                assert await asyncio.wait_for(reader.readexactly(2), 20) == b"\x05\x00"
                reply = await asyncio.wait_for(reader.readexactly(10), 20)
                received = await asyncio.wait_for(reader.read(5), 20) if reply[1] == SOCKS_SUCCEEDED else b""
                writer.close()
                return reply[1], received

    return asyncio.run(scenario())


@pytest.fixture
def banner_server():
    """A host that sends hello to each client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        program = (
            "import socket, sys\nlistener = socket.socket(fileno=int(sys.argv[1]))\n"
            "while True: listener.accept()[0].sendall(b'hello')"
        )
        number = listener.fileno()
        greeting = subprocess.Popen(["python3", "-c", program, str(number)], pass_fds=[number])
        yield listener.getsockname()[1]
        greeting.kill()
        greeting.wait()


def test_clone_host_is_reachable(banner_server):
    relay = SocksProxy(HostPort("localhost", banner_server), upstream_proxy=None, dial_policy=WITHOUT_REDIRECTS)

    assert connect(relay, "localhost", banner_server) == (SOCKS_SUCCEEDED, b"hello")


@pytest.mark.parametrize("requested", ["127.0.0.1", "127.1", "0x7f.1", "2130706433"])
def test_addresses_match_in_any_notation(banner_server, requested):
    remote = resolve_remote(f"http://127.1:{banner_server}/demo.git", [], "", Path("/"))
    relay = SocksProxy(remote.address, upstream_proxy=None, dial_policy=WITHOUT_REDIRECTS)

    assert connect(relay, requested, banner_server) == (SOCKS_SUCCEEDED, b"hello")
    assert connect(relay, "127.2", banner_server)[0] == FORBIDDEN


async def test_connections_of_a_compromised_git_are_limited(banner_server, monkeypatch):
    monkeypatch.setattr("sandbox.workspace.clone.socks_proxy.CLONE_CONNECTIONS_MAX", 2)
    relay = SocksProxy(HostPort("localhost", banner_server), upstream_proxy=None, dial_policy=WITHOUT_REDIRECTS)

    async def greet(listener):
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"\x05\x01\x00")
        return asyncio.create_task(reader.readexactly(2)), writer

    async def scenario():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with relay.serving(listener):
                connections = [await greet(listener) for _ in range(3)]
                (first, first_writer), (second, _), (third, _) = connections
                assert await asyncio.wait_for(asyncio.gather(first, second), 20) == [b"\x05\x00"] * 2
                assert not (await asyncio.wait([third], timeout=0.5))[0]
                first_writer.close()
                assert await asyncio.wait_for(third, 20) == b"\x05\x00"
                for _, writer in connections:
                    writer.close()

    await scenario()


PRIVATE = (
    *("127.0.0.1", "localhost", "::1", "0.0.0.0", "::ffff:127.0.0.1", "169.254.169.254", "168.63.129.16"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::7f00:1", "fec0::1"),
)
"""Addresses that are not public, and NAT64 and 6to4 addresses, which networks may translate to any IPv4 address."""


@pytest.mark.parametrize("policy", [WITH_REDIRECTS, WITHOUT_REDIRECTS])
@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_other_than_the_cloned_hosts_are_unreachable(banner_server, host, policy):
    relay = SocksProxy(HostPort("git.example", banner_server), upstream_proxy=None, dial_policy=policy)

    assert connect(relay, host, banner_server)[0] == FORBIDDEN
    assert connect(relay, host, 80)[0] == FORBIDDEN


PUBLIC, OWN = "127.0.0.2", "127.0.0.1"
"""PUBLIC represents the public address of another host, without a listener; OWN is an address of this machine."""


@pytest.fixture
def set_resolved_addresses(monkeypatch):
    """Return a function that sets the addresses to which every name resolves."""

    def set_addresses(*addresses):
        results = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: results)

    return set_addresses


@pytest.mark.parametrize("follows_redirects", [True, False])
def test_local_addresses_of_a_name_with_a_public_address_are_not_dialed(
    banner_server, set_resolved_addresses, follows_redirects
):
    policy = DialPolicy(lambda address: str(address) == PUBLIC, follows_redirects)
    relay = SocksProxy(HostPort("git.example", banner_server), upstream_proxy=None, dial_policy=policy)

    set_resolved_addresses(PUBLIC, OWN)
    assert connect(relay, "git.example", banner_server)[0] == REFUSED
    set_resolved_addresses(OWN)
    assert connect(relay, "git.example", banner_server)[0] == FORBIDDEN


@pytest.mark.parametrize("addresses", [(PUBLIC, OWN), (OWN, PUBLIC)])
def test_only_public_addresses_of_a_mixed_host_are_dialed(monkeypatch, set_resolved_addresses, addresses):
    """A private address is never dialed, because the owner of the name could add an address of this machine."""
    dialed = []

    async def dial(addresses):
        dialed.extend(addresses)
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))

    monkeypatch.setattr("sandbox.workspace.clone.socks_proxy._dial_any", dial)
    relay = SocksProxy(
        HostPort("git.example", 443),
        upstream_proxy=None,
        dial_policy=DialPolicy(lambda address: str(address) == PUBLIC, False),
    )

    set_resolved_addresses(*addresses)
    assert connect(relay, "git.example", 443)[0] == REFUSED
    assert [address.host for address in dialed] == [PUBLIC]


def test_name_with_only_local_addresses_is_allowed(banner_server, set_resolved_addresses):
    relay = SocksProxy(
        HostPort("git.example", banner_server),
        upstream_proxy=None,
        dial_policy=DialPolicy(lambda address: str(address) == PUBLIC, True),
    )

    set_resolved_addresses(OWN)
    assert connect(relay, "git.example", banner_server) == (SOCKS_SUCCEEDED, b"hello")


@pytest.mark.parametrize(("requested", "is_allowed"), [("64:ff9b::7f00:2", True), ("64:ff9b::7f00:1", False)])
def test_translated_addresses_are_checked_by_their_target(monkeypatch, set_resolved_addresses, requested, is_allowed):
    dialed = []

    async def dial(addresses):
        dialed.extend(addresses)
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))

    monkeypatch.setattr("sandbox.workspace.clone.socks_proxy._dial_any", dial)
    relay = SocksProxy(
        HostPort("git.example", 443),
        upstream_proxy=None,
        dial_policy=DialPolicy(lambda address: str(address) == PUBLIC, True),
    )

    set_resolved_addresses(requested, PUBLIC)
    assert connect(relay, "git.example", 443)[0] == REFUSED
    assert [address.host for address in dialed] == ([requested] if is_allowed else []) + [PUBLIC]


def test_ports_not_in_the_clone_url_are_reachable_only_if_redirects_are_followed(banner_server):
    strict, lenient = (
        SocksProxy(HostPort("localhost", 1), upstream_proxy=None, dial_policy=policy)
        for policy in (WITHOUT_REDIRECTS, WITH_REDIRECTS)
    )

    assert connect(strict, "localhost", banner_server)[0] == FORBIDDEN
    assert connect(lenient, "localhost", banner_server) == (SOCKS_SUCCEEDED, b"hello")


def test_names_of_refused_connections_are_not_resolved(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    strict, lenient = (
        SocksProxy(HostPort("git.example", 1), upstream_proxy=None, dial_policy=policy)
        for policy in (WITHOUT_REDIRECTS, WITH_REDIRECTS)
    )

    assert connect(strict, "c2VjcmV0.evil.example", 443)[0] == FORBIDDEN
    assert connect(lenient, "c2VjcmV0.evil.example", 53)[0] == FORBIDDEN


def test_git_receives_the_connection_error(banner_server):
    relay = SocksProxy(HostPort("no-such-host.invalid", 80), upstream_proxy=None, dial_policy=WITHOUT_REDIRECTS)
    assert connect(relay, "no-such-host.invalid", 80)[0] == UNKNOWN_NAME
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        relay = SocksProxy(HostPort("127.0.0.1", port), upstream_proxy=None, dial_policy=WITHOUT_REDIRECTS)
        assert connect(relay, "127.0.0.1", port)[0] == REFUSED


def test_git_receives_a_connect_timeout(monkeypatch):
    async def hang(_addresses):
        await asyncio.sleep(60)

    monkeypatch.setattr("sandbox.workspace.clone.socks_proxy._dial_any", hang)
    monkeypatch.setattr("sandbox.workspace.clone.socks_proxy.CLONE_CONNECT_TIMEOUT_SECONDS", 0.1)
    relay = SocksProxy(HostPort("localhost", 80), upstream_proxy=None, dial_policy=WITHOUT_REDIRECTS)

    assert connect(relay, "localhost", 80) == (UNREACHABLE, b"")


async def test_idle_proxy_client_is_disconnected(monkeypatch):
    monkeypatch.setattr("sandbox.workspace.clone.socks_proxy.CLONE_CONNECT_TIMEOUT_SECONDS", 0.1)
    relay = SocksProxy(HostPort("localhost", 80), upstream_proxy=None, dial_policy=WITHOUT_REDIRECTS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with relay.serving(listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_proxy_of_the_user_of_the_server_is_used(harness, host):
    with GitHttpServer(harness.upstream.bare.parent).serving() as proxy:
        port = proxy.url.rstrip("/").rpartition(":")[2]
        harness.configure(f"[http]\n\tproxy = http://{host}:{port}")

        harness.stage("http://only-behind-the-proxy.invalid/demo.git")

        assert proxy.requests[0].startswith("GET http://only-behind-the-proxy.invalid/demo.git/info/refs")
    assert (harness.workspace / "README.md").exists()


def test_maximum_number_of_certificates_is_accepted(harness):
    certificates = harness.root / "certificates"
    certificates.mkdir()
    for number in range(SETTINGS_FILES_MAX):
        (certificates / f"{number:08x}.0").write_bytes(b"certificate")
    harness.configure(f"[http]\n\tsslCAPath = {certificates}")

    harness.stage()

    assert (harness.workspace / "README.md").exists()


def test_clone_receives_no_token_of_another_host(harness):
    """Git passes all of its settings to the programs that it starts."""
    other = "Authorization: Basic b3RoZXItaG9zdHMtdG9rZW4="
    harness.configure(f'[http "https://other.example/"]\n\textraHeader = {other}')
    harness.configure(f'[http "{harness.server.url}"]\n\textraHeader = X-Own: of-this-host')
    harness.configure('[url "https://me:hunter2hunter2@third.example/"]\n\tinsteadOf = third:')

    environments = []
    confine = harness.confine

    async def record_command(confinement, command):
        environments.append(dict(command.environment))
        return await type(confinement).run(confinement, command)

    @asynccontextmanager
    async def recording_confine(directories, read_only_directories):
        async with confine(directories, read_only_directories) as confinement:
            confinement.run = lambda command: record_command(confinement, command)
            yield confinement

    harness.confine = recording_confine
    harness.stage()

    rendered = repr(environments)
    assert "of-this-host" in rendered
    assert "b3RoZXI" not in rendered
    assert "hunter2" not in rendered


def test_links_in_a_compromised_clone_are_not_followed(harness, tmp_path):
    """A compromised git may leave links at paths that the host reads or writes afterwards."""
    base = harness.stage()
    repository, secret = harness.attempt_dir / "repository.git", tmp_path / "secret"
    secret.write_text(f"{base} refs/heads/main\n")
    for name in ("HEAD", "info/attributes", "packed-refs"):
        (repository / name).unlink()
        (repository / name).symlink_to(secret)
    (repository / "objects" / "pack" / "pack-x.pack").symlink_to(secret)

    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        read_branch_commit(repository, "main")
    neutralize_attributes(repository)
    workspace, source = tmp_path / "other", Repository(url="https://git.example/demo.git", branch="main")
    workspace.mkdir()
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        write_git_directory(workspace, repository, source, base, StopFlag())

    assert secret.read_text() == f"{base} refs/heads/main\n"
    assert not (repository / "HEAD").is_symlink()


def test_netrc_file_of_the_user_is_used(harness):
    harness.server.credentials = "me:let-me-in"
    home = harness.root / "home"
    home.mkdir()
    netrc = home / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password let-me-in\nmachine other.example login x password y\n")
    netrc.chmod(0o600)

    harness.stage()

    assert (harness.workspace / "README.md").exists()


def test_missing_credentials_are_reported(harness):
    harness.server.credentials = "me:let-me-in"

    with pytest.raises(AttemptError, match="needs credentials"):
        harness.stage()
