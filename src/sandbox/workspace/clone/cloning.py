"""A clone by a confined git: what it may not have itself is done for it outside, for the one remote and no other."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from sandbox.interfaces.runtime import FIRST_DESCRIPTOR, Confinement
from sandbox.workspace.cancellable_thread import run_in_thread
from sandbox.workspace.clone.relay import Reach, Relay
from sandbox.workspace.clone.remote import COMMAND, FILES, Far, Remote, describe_remote, find_far, rewrite, run_ssh
from sandbox.workspace.git.command import Git, GitError, Setting, pipe, reading
from sandbox.workspace.git.user_config import find_proxy, variables_of_user

HELPER = (
    f'!f() {{ test "$1" != get || {{ {{ cat; echo; }} >&{FIRST_DESCRIPTOR}; sed "/^$/q" <&{FIRST_DESCRIPTOR}; }}; }}; f'
)
"""What git asks inside; it passes the question on, and the answer back. Answers are neither stored nor erased."""

CREDENTIALS_ASKED_MAX = 8
"""Of one clone; further questions have no answer."""

_QUESTION_BYTES_MAX = 16 * 1024


class Credentials:
    """Answers for the host of `url`, whatever inside asks for. secrets: values that were given away."""

    def __init__(self, url: str, settings: Sequence[Setting], variables: Mapping[str, str], path: str) -> None:
        self.secrets: set[str] = set()
        self._url = urlsplit(url)
        self._home = Path(variables.get("HOME", "/nonexistent"))
        self._git = Git(path, [("credential.interactive", "false"), *settings], variables)

    async def answer(self, inside: socket.socket) -> None:
        """Until nobody can ask any more, or has asked too often."""
        reader, writer = await asyncio.open_connection(sock=inside, limit=_QUESTION_BYTES_MAX)
        try:
            for _ in range(CREDENTIALS_ASKED_MAX):
                question = await reader.readuntil(b"\n\n")
                writer.write(await self._look_up(question) + b"\n")
                await writer.drain()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def _look_up(self, question: bytes) -> bytes:
        asked = dict(line.partition("=")[::2] for line in question.decode(errors="replace").splitlines())
        if not self._is_ours(asked.get("protocol", ""), asked.get("host", "")):
            return b""
        told = f"protocol={asked['protocol']}\nhost={asked['host']}\npath={self._url.path.lstrip('/')}\n"
        told += f"username={self._url.username}\n" if self._url.username else ""
        with pipe() as (reading, writing):
            writing.write(told.encode())
            writing.close()
            try:
                found = await self._git.run("credential", "fill", directory=Path("/"), stdin=reading)
            except (GitError, OSError):
                found = await run_in_thread(lambda _: self._look_into_netrc(asked["host"].partition(":")[0]))
        lines = [line for line in found.splitlines() if line.startswith((b"username=", b"password="))]
        passwords = (line.removeprefix(b"password=") for line in lines if line.startswith(b"password="))
        self.secrets.update(password.decode(errors="replace") for password in passwords if password)
        return b"".join(line + b"\n" for line in lines)

    def _look_into_netrc(self, host: str) -> bytes:
        """As curl would, where no helper knows any."""
        from netrc import NetrcParseError, netrc  # most clones ask for no password

        try:
            known = netrc(self._home / ".netrc").authenticators(host)
        except (OSError, NetrcParseError, UnicodeError):
            return b""
        return f"username={known[0]}\npassword={known[2]}\n".encode() if known and known[0] and known[2] else b""

    def _is_ours(self, protocol: str, host: str) -> bool:
        """The URL's own place, or the same host by TLS, where its requests may have been sent on to."""
        own = self._url.netloc.rpartition("@")[2].lower()
        return (protocol, host.lower()) in {(self._url.scheme, own), ("https", own.partition(":")[0])}


NO_REDIRECTS: Setting = ("http.followRedirects", "false")
_COMPLAINT_BYTES_MAX = 64 * 1024


class Cloning:
    """Of one URL. user_settings: all that are taken of the server's user. secrets: what was given away of them."""

    def __init__(
        self,
        url: str,
        user_settings: Sequence[Setting],
        environment: Mapping[str, str],
        *,
        reach: Reach,
    ) -> None:
        self._redirects: Sequence[Setting] = () if reach.follows_redirects else (NO_REDIRECTS,)
        self.secrets: set[str] = set()
        self._asked_url = url
        self._url = rewrite(url, user_settings)
        self._user_settings = user_settings
        self._variables = {"PATH": environment.get("PATH", os.defpath), **variables_of_user(environment)}
        self._home = Path(environment.get("HOME", "/"))
        self._reach = reach

    async def run(
        self,
        confinement: Confinement,
        settings: Sequence[Setting],
        arguments: Sequence[str],
        directory: Path,
        *,
        file_bytes_max: int,
    ) -> None:
        """Raises GitError, OSError."""
        own = (f"url.{self._url}.insteadOf", self._asked_url)
        far = find_far(self._url)
        serving = self._by_ssh(far) if far is not None else self._by_http(confinement, await self._find_remote())
        async with serving as (more, files, descriptors):
            git = Git(
                self._variables["PATH"],
                [*settings, *more, own, *self._redirects],
                {"HOME": FILES},
                confinement,
                files=files,
                descriptors=descriptors,
            )
            await git.run(*arguments, directory=directory, file_bytes_max=file_bytes_max)

    async def _find_remote(self) -> Remote:
        proxy = await find_proxy(self._url, self._user_settings, self._variables["PATH"])
        try:
            return describe_remote(self._url, self._user_settings, proxy, self._home)
        except ValueError as error:
            raise GitError(128, f"fatal: unsupported protocol: {error}".encode()) from error

    @asynccontextmanager
    async def _by_http(self, confinement: Confinement, remote: Remote) -> AsyncIterator["Given"]:
        """With a door to its host, and answers to its questions."""
        if remote.address is None or confinement.door is None:
            # Git itself says that it takes no such protocol.
            yield (), {}, ()
            return
        credentials = Credentials(self._url, self._user_settings, self._variables, self._variables["PATH"])
        relay = Relay(remote.address, via=remote.via, reach=self._reach)
        outside, inside = socket.socketpair()
        settings = [*remote.settings, ("credential.helper", HELPER)]
        with inside:
            async with relay.serving(confinement.door), _beside(credentials.answer(outside)):
                try:
                    yield settings, remote.files, (inside.fileno(),)
                finally:
                    self.secrets |= credentials.secrets

    @asynccontextmanager
    async def _by_ssh(self, far: Far) -> AsyncIterator["Given"]:
        """With the two ends of an ssh that runs outside; what that complains of is put before what git does."""
        try:
            async with reading() as (said, complaints):
                with said, pipe() as (to_read, to_write), pipe() as (from_read, from_write):
                    ends = (to_read.fileno(), from_write.fileno())
                    running = run_ssh(far, self._user_settings, self._variables, ends, said.fileno())
                    async with _beside(_closing(running, to_read, from_write, said)):
                        settings = [("core.sshCommand", COMMAND), ("ssh.variant", "ssh")]
                        yield settings, {}, (to_write.fileno(), from_read.fileno())
        except GitError as error:
            raise GitError(error.returncode, complaints()[-_COMPLAINT_BYTES_MAX:] + error.complaint.encode()) from None


Given = tuple[Sequence[Setting], Mapping[str, bytes], Sequence[int]]


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do it until the block ends."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _closing(work: Coroutine[Any, Any, None], *files: IO[bytes]) -> None:
    """Close them at its end, so that whoever is at the other ends sees it."""
    try:
        await work
    finally:
        for file in files:
            file.close()
