"""Clones with a confined git. Credentials, ssh and network access are provided from outside, for one remote only."""

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from sandbox.interfaces.runtime import FIRST_EXTRA_DESCRIPTOR, Confinement
from sandbox.workspace.cancellable_thread import run_in_thread
from sandbox.workspace.clone.relay import DialPolicy, SocksProxy
from sandbox.workspace.clone.remote_settings import (
    FILES_DIRECTORY,
    STUB_SSH_COMMAND,
    CloneRemote,
    SshRemote,
    apply_instead_of,
    find_proxy,
    parse_ssh_url,
    resolve_remote,
    run_ssh,
    user_environment,
)
from sandbox.workspace.git.command import Git, GitError, GitSetting, capture_output, pipe

HELPER_COMMAND = (
    f'!f() {{ test "$1" != get || {{ {{ cat; echo; }} >&{FIRST_EXTRA_DESCRIPTOR}; '
    f'sed "/^$/q" <&{FIRST_EXTRA_DESCRIPTOR + 1}; }}; }}; f'
)
"""Credential helper of the confined git. It forwards lookups and their results; nothing is stored or erased."""

CREDENTIAL_REQUESTS_MAX = 8
"""Maximum number of requests per clone. Additional requests get no response."""

_REQUEST_BYTES_MAX = 16 * 1024


class CredentialHelper:
    """Looks up credentials for the host of `url` only. secrets: the passwords returned so far."""

    def __init__(self, url: str, settings: Sequence[GitSetting], variables: Mapping[str, str], path: str) -> None:
        self.secrets: set[str] = set()
        self._url = urlsplit(url)
        self._home = Path(variables.get("HOME", "/nonexistent"))
        self._git = Git(path, [("credential.interactive", "false"), *settings], variables)

    async def serve(self, requests: IO[bytes], responses: IO[bytes]) -> None:
        """Serve requests until their pipe is closed or the limit is reached. Closes both pipes.

        A socket would let the confined git pass files, and closing these files could block this process.
        """
        reader = asyncio.StreamReader(limit=_REQUEST_BYTES_MAX)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), requests
        )
        os.set_blocking(responses.fileno(), False)
        try:
            for _ in range(CREDENTIAL_REQUESTS_MAX):
                request = await reader.readuntil(b"\n\n")
                os.write(responses.fileno(), await self._lookup(request) + b"\n")
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass
        finally:
            transport.close()
            responses.close()

    async def _lookup(self, request: bytes) -> bytes:
        fields = dict(line.partition("=")[::2] for line in request.decode(errors="replace").splitlines())
        if not self._matches_url(fields.get("protocol", ""), fields.get("host", "")):
            return b""
        query = f"protocol={fields['protocol']}\nhost={fields['host']}\npath={self._url.path.lstrip('/')}\n"
        query += f"username={self._url.username}\n" if self._url.username else ""
        with pipe() as (reader, writer):
            writer.write(query.encode())
            writer.close()
            try:
                result = await self._git.run("credential", "fill", directory=Path("/"), stdin=reader)
            except (GitError, OSError):
                result = await run_in_thread(lambda _: self._lookup_netrc(fields["host"].partition(":")[0]))
        lines = [line for line in result.splitlines() if line.startswith((b"username=", b"password="))]
        passwords = (line.removeprefix(b"password=") for line in lines if line.startswith(b"password="))
        self.secrets.update(password.decode(errors="replace") for password in passwords if password)
        return b"".join(line + b"\n" for line in lines)

    def _lookup_netrc(self, host: str) -> bytes:
        """Look the host up in ~/.netrc, as curl does, if no credential helper has credentials."""
        from netrc import NetrcParseError, netrc  # most clones need no password

        try:
            known = netrc(self._home / ".netrc").authenticators(host)
        except (OSError, NetrcParseError, UnicodeError):
            return b""
        return f"username={known[0]}\npassword={known[2]}\n".encode() if known and known[0] and known[2] else b""

    def _matches_url(self, protocol: str, host: str) -> bool:
        """Return whether the request is for the URL's host and port, or for that host with HTTPS (after a redirect)."""
        own = self._url.netloc.rpartition("@")[2].lower()
        return (protocol, host.lower()) in {(self._url.scheme, own), ("https", own.partition(":")[0])}


_STDERR_BYTES_MAX = 64 * 1024


def redirect_settings(dial_policy: DialPolicy) -> Sequence[GitSetting]:
    """Return git's settings for the redirects that the policy allows."""
    return () if dial_policy.follows_redirects else (("http.followRedirects", "false"),)


class ConfinedClone:
    """A clone of one URL.

    user_settings: the settings of the server's user that apply. secrets: the passwords that git received.
    """

    def __init__(
        self,
        url: str,
        user_settings: Sequence[GitSetting],
        environment: Mapping[str, str],
        *,
        dial_policy: DialPolicy,
    ) -> None:
        self._redirect_settings = redirect_settings(dial_policy)
        self.secrets: set[str] = set()
        self._manifest_url = url
        self._url = apply_instead_of(url, user_settings)
        self._user_settings = user_settings
        self._variables = {"PATH": environment.get("PATH", os.defpath), **user_environment(environment)}
        self._home = Path(environment.get("HOME", "/"))
        self._dial_policy = dial_policy

    async def run(
        self,
        confinement: Confinement,
        settings: Sequence[GitSetting],
        arguments: Sequence[str],
        directory: Path,
        *,
        file_bytes_max: int,
    ) -> None:
        """Clone. Raises GitError, OSError."""
        instead_of_setting = (f"url.{self._url}.insteadOf", self._manifest_url)
        ssh_url = parse_ssh_url(self._url)
        transport = (
            self._over_ssh(ssh_url) if ssh_url is not None else self._over_http(confinement, await self._find_remote())
        )
        async with transport as (transport_settings, files, descriptors):
            git = Git(
                self._variables["PATH"],
                [*settings, *transport_settings, instead_of_setting, *self._redirect_settings],
                {"HOME": FILES_DIRECTORY},
                confinement,
                files=files,
                descriptors=descriptors,
            )
            await git.run(*arguments, directory=directory, file_bytes_max=file_bytes_max)

    async def _find_remote(self) -> CloneRemote:
        proxy = await find_proxy(self._url, self._user_settings, self._variables["PATH"])
        try:
            return resolve_remote(self._url, self._user_settings, proxy, self._home)
        except ValueError as error:
            raise GitError(128, f"fatal: unsupported protocol: {error}".encode()) from error

    @asynccontextmanager
    async def _over_http(self, confinement: Confinement, remote: CloneRemote) -> AsyncIterator["GitInputs"]:
        """Provide a relay to the remote's host and a credential helper."""
        if remote.address is None or confinement.proxy_listener is None:
            # git itself reports the unsupported protocol.
            yield (), {}, ()
            return
        credentials = CredentialHelper(self._url, self._user_settings, self._variables, self._variables["PATH"])
        relay = SocksProxy(remote.address, upstream_proxy=remote.upstream_proxy, dial_policy=self._dial_policy)
        settings = [*remote.settings, ("credential.helper", HELPER_COMMAND)]
        with pipe() as (requests, to_requests), pipe() as (from_responses, responses):
            async with (
                relay.serving(confinement.proxy_listener),
                _running_in_background(credentials.serve(requests, responses)),
            ):
                try:
                    yield settings, remote.files, (to_requests.fileno(), from_responses.fileno())
                finally:
                    self.secrets |= credentials.secrets

    @asynccontextmanager
    async def _over_ssh(self, remote: SshRemote) -> AsyncIterator["GitInputs"]:
        """Run ssh outside the confinement, connected to git by pipes. ssh's errors are prepended to git's errors."""
        try:
            async with capture_output() as (stderr, read_stderr):
                with stderr, pipe() as (to_read, to_write), pipe() as (from_read, from_write):
                    streams = (to_read.fileno(), from_write.fileno())
                    running = run_ssh(remote, self._user_settings, self._variables, streams, stderr.fileno())
                    async with _running_in_background(_close_when_done(running, to_read, from_write, stderr)):
                        settings = [("core.sshCommand", STUB_SSH_COMMAND), ("ssh.variant", "ssh")]
                        yield settings, {}, (to_write.fileno(), from_read.fileno())
        except GitError as error:
            raise GitError(error.returncode, read_stderr()[-_STDERR_BYTES_MAX:] + error.stderr.encode()) from None


GitInputs = tuple[Sequence[GitSetting], Mapping[str, bytes], Sequence[int]]


@asynccontextmanager
async def _running_in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` in the background until the block ends."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _close_when_done(work: Coroutine[Any, Any, None], *files: IO[bytes]) -> None:
    """Close the files when `work` ends, so that the other ends of the pipes receive EOF."""
    try:
        await work
    finally:
        for file in files:
            file.close()
