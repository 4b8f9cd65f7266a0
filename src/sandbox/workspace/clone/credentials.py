"""Credentials for a clone over HTTP: git's requests for credentials, and the lookup of credentials.

They come from the git configuration of this process's user. On a host of a cluster, those of the server follow.
"""

import asyncio
import itertools
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import msgspec

from sandbox.interfaces.git_credentials import (
    CREDENTIAL_ANSWER_SECONDS,
    CREDENTIAL_BYTES_MAX,
    CREDENTIAL_MESSAGE_BYTES_MAX,
    CREDENTIAL_REQUESTS_MAX,
    CredentialAnswer,
    CredentialQuery,
    CredentialRequest,
    Credentials,
    FindCredentials,
    NoCredentialsError,
)
from sandbox.interfaces.runtime import FIRST_EXTRA_DESCRIPTOR
from sandbox.model.errors import DECODE_ERRORS
from sandbox.primitives.concurrency import running_in_background
from sandbox.workspace.cancellable_thread import run_in_thread
from sandbox.workspace.clone.remote_settings import apply_instead_of, read_user_config, user_environment
from sandbox.workspace.git.command import Git, GitError, GitSetting
from sandbox.workspace.git.pipes import pipe

_REQUEST_BYTES_MAX = 16 * 1024

_HELPER_COMMAND = '!f() {{ test "$1" != get || {{ {{ cat; echo; }} >{requests}; sed "/^$/q" <{responses}; }}; }}; f'
"""Credential helper of git. It forwards lookups and their results; nothing is stored or erased."""

CONFINED_HELPER_COMMAND = _HELPER_COMMAND.format(
    requests=f"&{FIRST_EXTRA_DESCRIPTOR}", responses=f"&{FIRST_EXTRA_DESCRIPTOR + 1}"
)
"""Uses the numbers that a confinement gives to descriptors."""

_HELPER_KEY = re.compile(r"credential\.(.+\.)?helper", re.DOTALL)


class UserCredentials:
    """Looks up the credentials for a URL in the git configuration of this process's user."""

    def __init__(self, url: str, settings: Sequence[GitSetting], variables: Mapping[str, str], path: str) -> None:
        self._url = urlsplit(url)
        self._home = Path(variables.get("HOME", "/nonexistent"))
        self._git = Git(path, [("credential.interactive", "false"), *settings], variables)

    async def find(self, query: CredentialQuery) -> Credentials:
        """Return the credentials. The path and the user name come from the URL. Raises NoCredentialsError."""
        lines = f"protocol={query.protocol}\nhost={query.host}\npath={self._url.path.lstrip('/')}\n"
        lines += f"username={self._url.username}\n" if self._url.username else ""
        with pipe() as (reader, writer):
            writer.write(lines.encode())
            writer.close()
            try:
                output = await self._git.run("credential", "fill", directory=Path("/"), stdin=reader)
            except (GitError, OSError):
                return await run_in_thread(lambda _: self._look_up_netrc(query.host.partition(":")[0]))
        found = dict(line.partition(b"=")[::2] for line in output.splitlines())
        return Credentials(found.get(b"username", b""), found.get(b"password", b""))

    def _look_up_netrc(self, host: str) -> Credentials:
        """Look the host up in ~/.netrc, as curl does, if no credential helper has credentials."""
        from netrc import NetrcParseError, netrc  # most clones need no password

        try:
            known = netrc(self._home / ".netrc").authenticators(host)
        except (OSError, NetrcParseError, UnicodeError):
            known = None
        if not known or not known[0] or not known[2]:
            raise NoCredentialsError(f"There are no credentials for {host}.")
        return Credentials(known[0].encode(), known[2].encode())


async def find_credentials_for_worker(url: str, query: CredentialQuery, environment: Mapping[str, str]) -> Credentials:
    """Find the credentials for a clone of `url` that runs on another host, which sent `query` and is not trusted.

    They are looked up with the git configuration of this process's user. Raises NoCredentialsError, also if the query
    is not for the protocol and the host of the URL, after the user's `insteadOf` was applied; GitError, OSError.
    """
    path = environment.get("PATH", os.defpath)
    settings = await read_user_config(environment, path)
    url = apply_instead_of(url, settings)
    if (query.protocol, query.host.lower()) != _origin(url):
        raise NoCredentialsError("The server refused a request for credentials of another host or protocol.")
    # `lower` maps some non-ASCII characters to ASCII, so pass on the host from the URL, not the one from the query.
    own_query = CredentialQuery(query.protocol, _host(url))
    try:
        found = await UserCredentials(url, settings, user_environment(environment), path).find(own_query)
    except NoCredentialsError as error:
        raise NoCredentialsError(f"The server has no credentials for {query.protocol}://{query.host}.") from error
    if max(len(found.username), len(found.password)) > CREDENTIAL_BYTES_MAX:
        raise NoCredentialsError(f"The server's credentials have more than {CREDENTIAL_BYTES_MAX} bytes.")
    return found


class ServerCredentials:
    """Asks the server for the credentials of an attempt's clone. connection: to the worker of this host."""

    def __init__(self, connection: socket.socket, attempt_id: str) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._attempt_id = attempt_id
        self._numbers = itertools.count(int.from_bytes(os.urandom(4)))

    async def find(self, query: CredentialQuery) -> Credentials:
        """Return the server's credentials. Raises NoCredentialsError."""
        request = CredentialRequest(next(self._numbers), self._attempt_id, query.protocol, query.host)
        try:
            async with asyncio.timeout(CREDENTIAL_ANSWER_SECONDS):
                await asyncio.get_running_loop().sock_sendall(self._connection, msgspec.msgpack.encode(request))
                answer = await self._read_answer(request.number)
        except (OSError, *DECODE_ERRORS) as error:  # includes TimeoutError
            raise NoCredentialsError("The server did not send the credentials in time.", is_transient=True) from error
        if answer.credentials is None:
            raise NoCredentialsError(answer.reason, is_transient=answer.is_transient)
        return answer.credentials

    async def _read_answer(self, number: int) -> CredentialAnswer:
        """Return the answer to a request. An answer to an earlier runner on this host may precede it."""
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._connection, CREDENTIAL_MESSAGE_BYTES_MAX):
            answer = msgspec.msgpack.decode(data, type=CredentialAnswer)
            if answer.number == number:
                return answer
        raise ConnectionError("the worker closed the connection")


class CredentialHelper:
    """Answers git's requests for the credentials of the host of `url`, and of no other host.

    secrets: the passwords returned so far. credential_problem: why the server had no credentials; None if it was not
    asked or had some.
    """

    def __init__(self, url: str, find: FindCredentials, find_on_server: FindCredentials | None) -> None:
        self.secrets: set[str] = set()
        self.credential_problem: NoCredentialsError | None = None
        self._url = url
        self._find = find
        self._find_on_server = find_on_server

    async def serve(self, requests: IO[bytes], responses: IO[bytes]) -> None:
        """Serve requests until their pipe is closed or the limit is reached. Closes both pipes.

        Through a socket, the confined git could pass file descriptors, and closing these could block this process.
        """
        reader = asyncio.StreamReader(limit=_REQUEST_BYTES_MAX)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), requests
        )
        os.set_blocking(responses.fileno(), False)
        try:
            for _ in range(CREDENTIAL_REQUESTS_MAX):
                request = await reader.readuntil(b"\n\n")
                os.write(responses.fileno(), await self._answer(request) + b"\n")
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass
        finally:
            transport.close()
            responses.close()

    async def _answer(self, request: bytes) -> bytes:
        fields = dict(line.partition("=")[::2] for line in request.decode(errors="replace").splitlines())
        query = CredentialQuery(fields.get("protocol", ""), fields.get("host", ""))
        if not self._is_for_url(query):
            return b""
        if (found := await self._find_anywhere(query)) is None:
            return b""
        if found.password:
            self.secrets.add(found.password.decode(errors="replace"))
        return b"username=" + found.username + b"\npassword=" + found.password + b"\n"

    async def _find_anywhere(self, query: CredentialQuery) -> Credentials | None:
        """Find the credentials on this host, otherwise on the server."""
        try:
            return await self._find(query)
        except NoCredentialsError:
            if self._find_on_server is None:
                return None
        try:
            return await self._find_on_server(query)
        except NoCredentialsError as error:
            self.credential_problem = error
            return None

    def _is_for_url(self, query: CredentialQuery) -> bool:
        """Return whether the query is for the URL's host and port, or for that host with HTTPS (after a redirect)."""
        scheme, host = _origin(self._url)
        return (query.protocol, query.host.lower()) in {(scheme, host), ("https", host.partition(":")[0])}


@asynccontextmanager
async def serve_credentials(helper: CredentialHelper) -> AsyncIterator[Sequence[int]]:
    """Serve git's credential requests; yield the descriptors to which git writes and from which it reads."""
    with pipe() as (requests, to_requests), pipe() as (from_responses, responses):
        async with running_in_background(helper.serve(requests, responses)):
            yield to_requests.fileno(), from_responses.fileno()


def unconfined_helper_settings(user_settings: Sequence[GitSetting], descriptors: Sequence[int]) -> Sequence[GitSetting]:
    """Return settings that make an unconfined git request credentials only through the descriptors.

    A helper of the user would store the server's credentials on this host. A shell cannot redirect to a descriptor with
    two digits, so the command opens the pipes again.
    """
    requests, responses = (f"/dev/fd/{descriptor}" for descriptor in descriptors)
    others = [(key, value) for key, value in user_settings if not _HELPER_KEY.fullmatch(key)]
    return [*others, ("credential.helper", _HELPER_COMMAND.format(requests=requests, responses=responses))]


def _origin(url: str) -> tuple[str, str]:
    """Return the protocol of a URL, and its host with the port, in lower case."""
    return urlsplit(url).scheme, _host(url).lower()


def _host(url: str) -> str:
    """Return the host of a URL with the port."""
    return urlsplit(url).netloc.rpartition("@")[2]
