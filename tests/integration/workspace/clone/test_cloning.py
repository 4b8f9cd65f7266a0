"""What a confined clone is given of the outside: one host, that host's credentials, and the user's proxy."""

import asyncio
import errno
import os
import socket
import struct
import subprocess
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from doubles.git_http_server import GitHttpServer
from sandbox.gateway.egress.dialer import is_dialable
from sandbox.model.errors import AttemptError
from sandbox.model.manifest.schema import Repository
from sandbox.workspace.cancellable_thread import StopFlag
from sandbox.workspace.clone.cloning import CREDENTIAL_REQUESTS_MAX, CredentialHelper
from sandbox.workspace.clone.relay import DialPolicy, HostPort, SocksProxy
from sandbox.workspace.clone.remote import SETTINGS_FILES_MAX, resolve_remote
from sandbox.workspace.git.directory import neutralize_attributes, read_branch_commit, write_git_directory

KNOWN = b"username=me\npassword=let-me-in\n"
GRANTED, FORBIDDEN, UNREACHABLE, UNKNOWN_NAME, REFUSED = 0, 2, 3, 4, 5
STRICT, LENIENT = (DialPolicy(is_dialable, follows_redirects) for follows_redirects in (False, True))


@pytest.fixture
def helper(tmp_path):
    """A credential helper that notes what it is asked and knows a password for everything."""
    program, asked = tmp_path / "helper", tmp_path / "asked"
    program.write_text(f"#!/bin/sh\ncat >> {asked}\necho username=me\necho password=let-me-in\n")
    program.chmod(0o755)
    asked.touch()
    return program, asked


def ask(url, helper, *questions, secrets=None):
    """The answers to what a program inside may write, whatever git it is. secrets: gets what was given away."""

    async def story():
        outside, inside = socket.socketpair()
        credentials = CredentialHelper(url, [("credential.helper", str(helper))], {}, os.environ["PATH"])
        credentials.secrets = set() if secrets is None else secrets
        answering = asyncio.create_task(credentials.serve(outside))
        reader, writer = await asyncio.open_connection(sock=inside)
        answers = []
        for question in questions:
            writer.write(question)
            with suppress(OSError):
                answers.append(await asyncio.wait_for(read_answer(reader), 20))
        writer.close()
        await asyncio.wait_for(answering, 20)
        return answers

    return asyncio.run(story())


async def read_answer(reader):
    """Up to the empty line at its end, which is left out; None when nobody answers."""
    lines = []
    while line := await reader.readline():
        if line == b"\n":
            return b"".join(lines)
        lines.append(line)
    return None


def test_the_helper_is_asked_for_the_clones_own_host(helper):
    program, asked = helper

    answers = ask("https://git.example/demo.git", program, b"protocol=https\nhost=git.example\n\n")

    assert answers == [KNOWN]
    assert "host=git.example\n" in asked.read_text()


@pytest.mark.parametrize(
    "question",
    [
        b"protocol=https\nhost=github.com\n\n",
        b"protocol=https\nhost=git.example.evil\n\n",
        b"protocol=http\nhost=git.example\n\n",
        b"protocol=https\nhost=git.example:444\n\n",
        b"url=https://github.com/\n\n",
        b"host=git.example\nprotocol=https\nhost=github.com\n\n",
        b"\xff\n\n",
    ],
)
def test_for_nothing_else_it_is_asked(helper, question):
    program, asked = helper

    assert ask("https://git.example/demo.git", program, question) == [b""]
    assert asked.read_text() == ""


@pytest.mark.parametrize(("password", "known"), [("", set()), ("let-me-in", {"let-me-in"})])
def test_no_password_is_no_secret(helper, password, known):
    program, _ = helper
    program.write_text(f"#!/bin/sh\necho username=me\necho password={password}\n")
    secrets = set()

    answers = ask("https://git.example/a", program, b"protocol=https\nhost=git.example\n\n", secrets=secrets)

    assert answers == [f"username=me\npassword={password}\n".encode()]
    assert secrets == known


def test_what_is_asked_beside_the_host_does_not_count(helper):
    program, asked = helper

    ask("https://git.example/demo.git", program, b"protocol=https\nhost=git.example\npath=x\nusername=root\n\n")

    assert "root" not in asked.read_text()


def test_it_is_not_asked_without_end(helper):
    program, _ = helper
    question = b"protocol=https\nhost=git.example\n\n"

    answers = ask("https://git.example/demo.git", program, *[question] * (CREDENTIAL_REQUESTS_MAX + 1))

    assert [one for one in answers if one] == [KNOWN] * CREDENTIAL_REQUESTS_MAX


class ExhaustedDoor(socket.socket):
    """A door at which the first connection is not taken, as where no descriptor is left."""

    has_failed = False

    def accept(self):
        if not self.has_failed:
            self.has_failed = True
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_a_connection_that_could_not_be_taken_is_taken_a_little_later(greeter):
    relay = SocksProxy(HostPort("localhost", greeter), upstream_proxy=None, dial_policy=STRICT)

    async def story():
        with ExhaustedDoor() as door:
            door.bind(("127.0.0.1", 0))
            door.listen()
            async with relay.serving(door):
                reader, writer = await asyncio.open_connection(*door.getsockname())
                writer.write(b"\x05\x01\x00")
                assert await asyncio.wait_for(reader.readexactly(2), 20) == b"\x05\x00"
                writer.close()
            assert door.has_failed

    asyncio.run(story())


def connect(relay, host, port):
    """What a program at the door is answered (RFC 1928), and what comes through then."""

    async def story():
        with socket.create_server(("127.0.0.1", 0)) as door:
            async with relay.serving(door):
                reader, writer = await asyncio.open_connection(*door.getsockname())
                name = host.encode()
                writer.write(b"\x05\x01\x00\x05\x01\x00\x03" + bytes([len(name)]) + name + struct.pack("!H", port))
                assert await asyncio.wait_for(reader.readexactly(2), 20) == b"\x05\x00"
                answer = await asyncio.wait_for(reader.readexactly(10), 20)
                said = await asyncio.wait_for(reader.read(5), 20) if answer[1] == GRANTED else b""
                writer.close()
                return answer[1], said

    return asyncio.run(story())


@pytest.fixture
def greeter():
    """A host that says hello to whoever connects."""
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


def test_the_wanted_host_is_connected_to(greeter):
    relay = SocksProxy(HostPort("localhost", greeter), upstream_proxy=None, dial_policy=STRICT)

    assert connect(relay, "localhost", greeter) == (GRANTED, b"hello")


@pytest.mark.parametrize("asked", ["127.0.0.1", "127.1", "0x7f.1", "2130706433"])
def test_an_address_is_the_same_however_it_is_written(greeter, asked):
    remote = resolve_remote(f"http://127.1:{greeter}/demo.git", [], "", Path("/"))
    relay = SocksProxy(remote.address, upstream_proxy=None, dial_policy=STRICT)

    assert connect(relay, asked, greeter) == (GRANTED, b"hello")
    assert connect(relay, "127.2", greeter)[0] == FORBIDDEN


def test_a_git_that_was_taken_over_has_so_many_connections_and_no_more(greeter, monkeypatch):
    monkeypatch.setattr("sandbox.workspace.clone.relay.CLONE_CONNECTIONS_MAX", 2)
    relay = SocksProxy(HostPort("localhost", greeter), upstream_proxy=None, dial_policy=STRICT)

    async def greeted(door):
        reader, writer = await asyncio.open_connection(*door.getsockname())
        writer.write(b"\x05\x01\x00")
        return asyncio.create_task(reader.readexactly(2)), writer

    async def story():
        with socket.create_server(("127.0.0.1", 0)) as door:
            async with relay.serving(door):
                made = [await greeted(door) for _ in range(3)]
                (one, its_writer), (other, _), (third, _) = made
                assert await asyncio.wait_for(asyncio.gather(one, other), 20) == [b"\x05\x00"] * 2
                assert not (await asyncio.wait([third], timeout=0.5))[0]
                its_writer.close()
                assert await asyncio.wait_for(third, 20) == b"\x05\x00"
                for _, writer in made:
                    writer.close()

    asyncio.run(story())


PRIVATE = (
    *("127.0.0.1", "localhost", "::1", "0.0.0.0", "::ffff:127.0.0.1", "169.254.169.254", "168.63.129.16"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::7f00:1", "fec0::1"),
)
"""The latter lead to an IPv4 address of anybody's, where the machine's network translates, or to no public host."""


@pytest.mark.parametrize("reach", [LENIENT, STRICT])
@pytest.mark.parametrize("host", PRIVATE)
def test_no_private_address_is_connected_to_that_was_not_wanted(greeter, host, reach):
    relay = SocksProxy(HostPort("git.example", greeter), upstream_proxy=None, dial_policy=reach)

    assert connect(relay, host, greeter)[0] == FORBIDDEN
    assert connect(relay, host, 80)[0] == FORBIDDEN


PUBLIC, OWN = "127.0.0.2", "127.0.0.1"
"""The former stands for another host's public address: nobody listens there."""


@pytest.fixture
def resolve(monkeypatch):
    """Lets a name have these addresses from now on."""

    def become(*addresses):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    return become


@pytest.mark.parametrize("follows_redirects", [True, False])
def test_the_name_of_a_public_host_does_not_lead_to_the_machines_own_addresses(greeter, resolve, follows_redirects):
    reach = DialPolicy(lambda address: str(address) == PUBLIC, follows_redirects)
    relay = SocksProxy(HostPort("git.example", greeter), upstream_proxy=None, dial_policy=reach)

    resolve(PUBLIC, OWN)
    assert connect(relay, "git.example", greeter)[0] == REFUSED
    resolve(OWN)
    assert connect(relay, "git.example", greeter)[0] == FORBIDDEN


@pytest.mark.parametrize("addresses", [(PUBLIC, OWN), (OWN, PUBLIC)])
def test_a_host_with_a_public_and_a_private_address_is_dialled_at_the_public_one_alone(monkeypatch, resolve, addresses):
    """Even where only the private one would answer: whoever owns the name could add an address of this machine."""
    dialled = []

    async def dial(addresses):
        dialled.extend(addresses)
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))

    monkeypatch.setattr("sandbox.workspace.clone.relay._dial_any", dial)
    relay = SocksProxy(
        HostPort("git.example", 443),
        upstream_proxy=None,
        dial_policy=DialPolicy(lambda address: str(address) == PUBLIC, False),
    )

    resolve(*addresses)
    assert connect(relay, "git.example", 443)[0] == REFUSED
    assert [one.host for one in dialled] == [PUBLIC]


def test_a_name_of_the_machines_own_addresses_alone_is_a_host_like_any_other(greeter, resolve):
    relay = SocksProxy(
        HostPort("git.example", greeter),
        upstream_proxy=None,
        dial_policy=DialPolicy(lambda address: str(address) == PUBLIC, True),
    )

    resolve(OWN)
    assert connect(relay, "git.example", greeter) == (GRANTED, b"hello")


@pytest.mark.parametrize(("asked", "may"), [("64:ff9b::7f00:2", True), ("64:ff9b::7f00:1", False)])
def test_an_address_of_a_translating_network_is_judged_by_where_it_leads(monkeypatch, resolve, asked, may):
    dialled = []

    async def dial(addresses):
        dialled.extend(addresses)
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))

    monkeypatch.setattr("sandbox.workspace.clone.relay._dial_any", dial)
    relay = SocksProxy(
        HostPort("git.example", 443),
        upstream_proxy=None,
        dial_policy=DialPolicy(lambda address: str(address) == PUBLIC, True),
    )

    resolve(asked, PUBLIC)
    assert connect(relay, "git.example", 443)[0] == REFUSED
    assert [one.host for one in dialled] == ([asked] if may else []) + [PUBLIC]


def test_another_port_of_the_host_needs_redirects(greeter):
    strict, lenient = (
        SocksProxy(HostPort("localhost", 1), upstream_proxy=None, dial_policy=one) for one in (STRICT, LENIENT)
    )

    assert connect(strict, "localhost", greeter)[0] == FORBIDDEN
    assert connect(lenient, "localhost", greeter) == (GRANTED, b"hello")


def test_no_other_name_is_looked_up(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    strict, lenient = (
        SocksProxy(HostPort("git.example", 1), upstream_proxy=None, dial_policy=one) for one in (STRICT, LENIENT)
    )

    assert connect(strict, "c2VjcmV0.evil.example", 443)[0] == FORBIDDEN
    assert connect(lenient, "c2VjcmV0.evil.example", 53)[0] == FORBIDDEN


def test_git_is_told_why_it_is_not_connected(greeter):
    relay = SocksProxy(HostPort("no-such-host.invalid", 80), upstream_proxy=None, dial_policy=STRICT)
    assert connect(relay, "no-such-host.invalid", 80)[0] == UNKNOWN_NAME
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        relay = SocksProxy(HostPort("127.0.0.1", port), upstream_proxy=None, dial_policy=STRICT)
        assert connect(relay, "127.0.0.1", port)[0] == REFUSED


def test_git_is_told_that_nobody_answers(monkeypatch):
    async def hang(_addresses):
        await asyncio.sleep(60)

    monkeypatch.setattr("sandbox.workspace.clone.relay._dial_any", hang)
    monkeypatch.setattr("sandbox.workspace.clone.relay.CLONE_CONNECT_SECONDS", 0.1)
    relay = SocksProxy(HostPort("localhost", 80), upstream_proxy=None, dial_policy=STRICT)

    assert connect(relay, "localhost", 80) == (UNREACHABLE, b"")


def test_who_asks_for_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("sandbox.workspace.clone.relay.CLONE_CONNECT_SECONDS", 0.1)
    relay = SocksProxy(HostPort("localhost", 80), upstream_proxy=None, dial_policy=STRICT)

    async def story():
        with socket.create_server(("127.0.0.1", 0)) as door:
            async with relay.serving(door):
                reader, writer = await asyncio.open_connection(*door.getsockname())
                assert await asyncio.wait_for(reader.read(), 20) == b""
                writer.close()

    asyncio.run(story())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_of_the_servers_user_is_gone_through(house, host):
    with GitHttpServer(house.upstream.bare.parent).serving() as proxy:
        port = proxy.url.rstrip("/").rpartition(":")[2]
        house.configure(f"[http]\n\tproxy = http://{host}:{port}")

        house.stage("http://only-the-proxy-knows.invalid/demo.git")

        assert proxy.requests[0].startswith("GET http://only-the-proxy-knows.invalid/demo.git/info/refs")
    assert (house.workspace / "README.md").exists()


def test_as_many_certificates_go_in_as_may(house):
    certificates = house.root / "certificates"
    certificates.mkdir()
    for number in range(SETTINGS_FILES_MAX):
        (certificates / f"{number:08x}.0").write_bytes(b"certificate")
    house.configure(f"[http]\n\tsslCAPath = {certificates}")

    house.stage()

    assert (house.workspace / "README.md").exists()


def test_a_clone_gets_no_token_of_another_host(house):
    """By what git passes on to whatever it starts: all of its settings."""
    other = "Authorization: Basic b3RoZXItaG9zdHMtdG9rZW4="
    house.configure(f'[http "https://other.example/"]\n\textraHeader = {other}')
    house.configure(f'[http "{house.server.url}"]\n\textraHeader = X-Own: of-this-host')
    house.configure('[url "https://me:hunter2hunter2@third.example/"]\n\tinsteadOf = third:')

    seen = []
    confine = house.confine

    async def note(confinement, command):
        seen.append(dict(command.environment))
        return await type(confinement).run(confinement, command)

    @asynccontextmanager
    async def noting(directories, read_only):
        async with confine(directories, read_only) as confinement:
            confinement.run = lambda command: note(confinement, command)
            yield confinement

    house.confine = noting
    house.stage()

    told = repr(seen)
    assert "of-this-host" in told
    assert "b3RoZXI" not in told
    assert "hunter2" not in told


def test_what_stands_in_a_clone_is_never_followed(house, tmp_path):
    """A git that was taken over leaves links where the host reads and writes next."""
    base = house.stage()
    repository, secret = house.attempt / "repository.git", tmp_path / "secret"
    secret.write_text(f"{base} refs/heads/main\n")
    for name in ("HEAD", "info/attributes", "packed-refs"):
        (repository / name).unlink()
        (repository / name).symlink_to(secret)
    (repository / "objects" / "pack" / "pack-x.pack").symlink_to(secret)

    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        read_branch_commit(repository, "main")
    neutralize_attributes(repository)
    workspace, wanted = tmp_path / "other", Repository(url="https://git.example/demo.git", branch="main")
    workspace.mkdir()
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        write_git_directory(workspace, repository, wanted, base, StopFlag())

    assert secret.read_text() == f"{base} refs/heads/main\n"
    assert not (repository / "HEAD").is_symlink()


def test_the_users_netrc_is_looked_into_as_well(house):
    house.server.credentials = "me:let-me-in"
    home = house.root / "home"
    home.mkdir()
    netrc = home / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password let-me-in\nmachine other.example login x password y\n")
    netrc.chmod(0o600)

    house.stage()

    assert (house.workspace / "README.md").exists()


def test_a_repository_that_needs_credentials_says_so_without_any(house):
    house.server.credentials = "me:let-me-in"

    with pytest.raises(AttemptError, match="needs credentials"):
        house.stage()
