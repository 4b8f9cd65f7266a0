"""Credentials for clones: git's requests, the lookup on this host, and the server as the second source."""

import asyncio
import os
import socket
from contextlib import contextmanager, suppress

import msgspec
import pytest

from doubles.sandbox_lifecycle import new_attempt_id
from sandbox.interfaces.workspace import (
    CREDENTIAL_REQUESTS_MAX,
    CredentialAnswer,
    CredentialQuery,
    CredentialRequest,
    Credentials,
    NoCredentialsError,
)
from sandbox.model.failure import AttemptError
from sandbox.workspace.clone import remote_access as credentials_module
from sandbox.workspace.clone.remote_access import (
    CredentialHelper,
    ServerCredentials,
    UserCredentials,
    find_credentials_for_worker,
)
from sandbox.workspace.git_command import pipe

CREDENTIAL_RESPONSE = b"username=me\npassword=let-me-in\n"
FOUND = Credentials(b"me", b"let-me-in")
REQUEST = b"protocol=https\nhost=git.example\n\n"


@pytest.fixture
def credential_helper(tmp_path):
    """A credential helper that logs its requests and has a password for every host."""
    program, log = tmp_path / "helper", tmp_path / "requests.log"
    program.write_text(f"#!/bin/sh\ncat >> {log}\necho username=me\necho password=let-me-in\n")
    program.chmod(0o755)
    log.touch()
    return program, log


def user_credentials(url, credential_helper):
    return UserCredentials(url, [("credential.helper", str(credential_helper))], {}, os.environ["PATH"])


def request_credentials(url, credential_helper, *requests, secrets=None):
    """Send credential requests as git would; return the responses. secrets: receives the returned passwords."""
    credentials = CredentialHelper(url, user_credentials(url, credential_helper).find, None)
    credentials.secrets = set() if secrets is None else secrets
    return send_requests(credentials, *requests)


def send_requests(credentials, *requests):
    async def scenario():
        responses = []
        with pipe() as (to_helper, requests_inside), pipe() as (responses_inside, from_helper):
            serving = asyncio.create_task(credentials.serve(to_helper, from_helper))
            reader = asyncio.StreamReader()
            await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), responses_inside
            )
            for credential_request in requests:
                with suppress(OSError):
                    requests_inside.write(credential_request)
                    responses.append(await asyncio.wait_for(read_response(reader), 20))
            requests_inside.close()
            await asyncio.wait_for(serving, 20)
        return responses

    return asyncio.run(scenario())


async def read_response(reader):
    """Read a response without the empty line that ends it. Return None at the end of the stream."""
    lines = []
    while line := await reader.readline():
        if line == b"\n":
            return b"".join(lines)
        lines.append(line)
    return None


def test_helper_is_called_for_the_clone_host(credential_helper):
    program, log = credential_helper

    responses = request_credentials("https://git.example/demo.git", program, b"protocol=https\nhost=git.example\n\n")

    assert responses == [CREDENTIAL_RESPONSE]
    assert "host=git.example\n" in log.read_text()


@pytest.mark.parametrize(
    "credential_request",
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
def test_helper_is_called_only_for_the_origin_of_the_clone_url(credential_helper, credential_request):
    program, log = credential_helper

    assert request_credentials("https://git.example/demo.git", program, credential_request) == [b""]
    assert log.read_text() == ""


@pytest.mark.parametrize(("password", "secrets_found"), [("", set()), ("let-me-in", {"let-me-in"})])
def test_empty_password_is_not_a_secret(credential_helper, password, secrets_found):
    program, _ = credential_helper
    program.write_text(f"#!/bin/sh\necho username=me\necho password={password}\n")
    secrets = set()

    responses = request_credentials(
        "https://git.example/a", program, b"protocol=https\nhost=git.example\n\n", secrets=secrets
    )

    assert responses == [f"username=me\npassword={password}\n".encode()]
    assert secrets == secrets_found


def test_username_in_a_credential_request_is_not_passed_to_the_helper(credential_helper):
    program, log = credential_helper

    request_credentials(
        "https://git.example/demo.git", program, b"protocol=https\nhost=git.example\npath=x\nusername=root\n\n"
    )

    assert "root" not in log.read_text()


def test_number_of_credential_requests_is_limited(credential_helper):
    program, _ = credential_helper
    credential_request = b"protocol=https\nhost=git.example\n\n"

    responses = request_credentials(
        "https://git.example/demo.git", program, *[credential_request] * (CREDENTIAL_REQUESTS_MAX + 1)
    )

    assert [response for response in responses if response] == [CREDENTIAL_RESPONSE] * CREDENTIAL_REQUESTS_MAX


# The server as the second source.


class FakeServer:
    """Stores the queries, and answers them with credentials or an error."""

    def __init__(self, answer=FOUND):
        self.answer, self.queries = answer, []

    async def find(self, query):
        self.queries.append(query)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def find_nothing(query):
    raise NoCredentialsError("There are none.")


def test_server_is_queried_if_the_host_has_no_credentials():
    server = FakeServer()
    helper = CredentialHelper("https://git.example/demo.git", find_nothing, server.find)

    assert send_requests(helper, REQUEST) == [CREDENTIAL_RESPONSE]
    assert server.queries == [CredentialQuery("https", "git.example")]
    assert helper.secrets == {"let-me-in"}
    assert helper.credential_problem is None


def test_server_is_not_queried_if_the_host_has_credentials(credential_helper):
    program, _ = credential_helper
    url, server = "https://git.example/demo.git", FakeServer(Credentials(b"other", b"other"))
    helper = CredentialHelper(url, user_credentials(url, program).find, server.find)

    assert send_requests(helper, REQUEST) == [CREDENTIAL_RESPONSE]
    assert server.queries == []


def test_server_is_not_queried_for_another_host():
    server = FakeServer()
    helper = CredentialHelper("https://git.example/demo.git", find_nothing, server.find)

    assert send_requests(helper, b"protocol=https\nhost=github.com\n\n") == [b""]
    assert server.queries == []


def test_reason_from_the_server_is_kept():
    server = FakeServer(NoCredentialsError("The server has none."))
    helper = CredentialHelper("https://git.example/demo.git", find_nothing, server.find)

    assert send_requests(helper, REQUEST) == [b""]
    assert str(helper.credential_problem) == "The server has none."


# The lookup for another host.


@pytest.fixture
def lookup(tmp_path, credential_helper):
    """A function that looks credentials up as the server does. The server's git configuration has a helper."""
    config = tmp_path / "config"
    config.write_text(
        f"[credential]\n\thelper = {credential_helper[0]}\n\tuseHttpPath = true\n"
        '[url "https://mirror.example/"]\n\tinsteadOf = https://mirrored.example/\n'
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": str(config)}
    return lambda url, *query: asyncio.run(find_credentials_for_worker(url, CredentialQuery(*query), environment))


def test_credentials_for_another_host_come_from_the_configuration_of_the_server_user(lookup, credential_helper):
    assert lookup("https://me@git.example/team/demo.git", "https", "git.example") == FOUND
    log = credential_helper[1].read_text()
    assert {"protocol=https", "host=git.example", "path=team/demo.git", "username=me"} <= set(log.splitlines())


@pytest.mark.parametrize(
    ("url", "query"),
    [
        ("https://git.example/demo.git", ("https", "github.com")),
        ("https://git.example/demo.git", ("https", "git.example.evil")),
        ("https://git.example/demo.git", ("http", "git.example")),
        ("http://git.example/demo.git", ("https", "git.example")),
        ("https://git.example/demo.git", ("https", "git.example:444")),
        ("https://git.example:444/demo.git", ("https", "git.example")),
        ("https://git.example/demo.git", ("https", "git.example\nhost=github.com")),
        ("https://mirrored.example/demo.git", ("https", "mirrored.example")),
        ("ssh://git@git.example/demo.git", ("https", "git.example")),
        ("git@git.example:demo.git", ("https", "git.example")),
    ],
)
def test_another_host_gets_credentials_only_for_the_origin_of_the_url(lookup, credential_helper, url, query):
    with pytest.raises(NoCredentialsError, match="another host or protocol"):
        lookup(url, *query)
    assert credential_helper[1].read_text() == ""


def test_insteadof_setting_of_the_server_user_determines_the_host(lookup, credential_helper):
    assert lookup("https://mirrored.example/demo.git", "https", "mirror.example") == FOUND
    assert "path=demo.git\n" in credential_helper[1].read_text()


def test_helper_gets_the_host_name_as_written_in_the_url(lookup, credential_helper):
    kelvin_sign = "\N{KELVIN SIGN}"  # its lower case is the letter k
    assert lookup("https://Kiln.example/demo.git", "https", f"{kelvin_sign}iln.example") == FOUND
    assert "host=Kiln.example\n" in credential_helper[1].read_text()


def test_missing_credentials_are_reported_with_the_host(tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with pytest.raises(NoCredentialsError, match=r"The server has no credentials for https://git\.example\."):
        asyncio.run(
            find_credentials_for_worker("https://git.example/a", CredentialQuery("https", "git.example"), environment)
        )


def test_netrc_of_the_server_user_is_read(tmp_path):
    (tmp_path / ".netrc").write_text("machine git.example login me password let-me-in\n")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    query = CredentialQuery("https", "git.example")
    assert asyncio.run(find_credentials_for_worker("https://git.example/a", query, environment)) == FOUND


def test_password_that_is_too_long_is_not_sent(lookup, credential_helper):
    credential_helper[0].write_text(f"#!/bin/sh\necho username=me\necho password={'x' * 20_000}\n")
    with pytest.raises(NoCredentialsError, match="more than 16384 bytes"):
        lookup("https://git.example/demo.git", "https", "git.example")


def test_representation_has_no_password():
    assert "let-me-in" not in repr(CredentialAnswer(1, FOUND))


# The connection to the worker.


@contextmanager
def connection_to_worker():
    runner, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with runner, worker:
        worker.setblocking(False)
        yield runner, worker


async def read_request(worker):
    data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(worker, 65536), 20)
    return msgspec.msgpack.decode(data, type=CredentialRequest)


async def test_runner_queries_its_worker():
    attempt_id = new_attempt_id()
    with connection_to_worker() as (runner, worker):
        finding = asyncio.create_task(
            ServerCredentials(runner, attempt_id).find(CredentialQuery("https", "git.example"))
        )
        request = await read_request(worker)
        assert (request.attempt_id, request.protocol, request.host) == (attempt_id, "https", "git.example")
        # An answer that an earlier runner did not read must not be used.
        worker.send(msgspec.msgpack.encode(CredentialAnswer(request.number - 1, Credentials(b"me", b"stale"))))
        worker.send(msgspec.msgpack.encode(CredentialAnswer(request.number, FOUND)))
        assert await asyncio.wait_for(finding, 20) == FOUND


@pytest.mark.parametrize("is_transient", [False, True])
async def test_runner_gets_the_reason_from_the_server(is_transient):
    with connection_to_worker() as (runner, worker):
        finding = asyncio.create_task(
            ServerCredentials(runner, new_attempt_id()).find(CredentialQuery("https", "git.example"))
        )
        request = await read_request(worker)
        answer = CredentialAnswer(request.number, reason="There are none.", is_transient=is_transient)
        worker.send(msgspec.msgpack.encode(answer))
        with pytest.raises(NoCredentialsError, match=r"There are none\.") as raised:
            await asyncio.wait_for(finding, 20)
        assert raised.value.is_transient is is_transient


@pytest.mark.parametrize("answer", [None, b"\xc1"])
async def test_missing_or_damaged_answer_is_transient(monkeypatch, answer):
    monkeypatch.setattr(credentials_module, "CREDENTIAL_ANSWER_SECONDS", 0.2)
    with connection_to_worker() as (runner, worker):
        if answer is not None:
            worker.send(answer)
        with pytest.raises(NoCredentialsError, match="did not send the credentials") as raised:
            await ServerCredentials(runner, new_attempt_id()).find(CredentialQuery("https", "git.example"))
        assert raised.value.is_transient


async def test_wait_ends_when_the_worker_disconnects():
    with connection_to_worker() as (runner, worker):
        worker.close()
        with pytest.raises(NoCredentialsError):
            await asyncio.wait_for(
                ServerCredentials(runner, new_attempt_id()).find(CredentialQuery("https", "git.example")), 20
            )


# Clones on a host without credentials.


@pytest.fixture(params=[True, False], ids=["confined", "unconfined"])
def private_harness(request, harness):
    harness.confined = request.param
    harness.server.credentials = "me:let-me-in"
    harness.credentials_server = FakeServer()
    return harness


def test_private_repository_is_cloned_with_the_credentials_of_the_server(private_harness):
    private_harness.stage()
    assert (private_harness.workspace / "README.md").exists()
    assert len(private_harness.credentials_server.queries) == 1


def test_public_repository_is_cloned_without_a_lookup(private_harness):
    private_harness.server.credentials = None
    private_harness.stage()
    assert private_harness.credentials_server.queries == []


def test_helper_of_the_host_comes_first_and_gets_nothing_to_store(private_harness):
    """Git offers accepted credentials to all helpers, and a helper of the host would write them to its disk."""
    program, log = private_harness.root / "store", private_harness.root / "calls"
    program.write_text(f'#!/bin/sh\necho "$1" >> {log}\ncat >> {log}\n')
    program.chmod(0o755)
    private_harness.configure(f"[credential]\n\thelper = {program}\n")
    private_harness.configure(f'[credential "{private_harness.server.url}"]\n\thelper = {program}\n')
    private_harness.stage()
    assert set(log.read_text().splitlines()) & {"get", "store", "erase"} == {"get"}
    assert "let-me-in" not in log.read_text()
    assert len(private_harness.credentials_server.queries) == 1


def test_failure_has_the_reason_from_the_server_and_no_password(private_harness):
    private_harness.credentials_server.answer = Credentials(b"me", b"wrong-password")
    with pytest.raises(AttemptError, match="needs credentials") as raised:
        private_harness.stage()
    assert "wrong-password" not in str(raised.value)

    private_harness.credentials_server.answer = NoCredentialsError("The server has none.", is_transient=True)
    with pytest.raises(AttemptError, match=r"needs credentials.*\. The server has none\.") as raised:
        private_harness.stage()
    assert raised.value.failure.is_transient
