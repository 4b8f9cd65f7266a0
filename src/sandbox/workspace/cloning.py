"""A clone by a confined git: what it may not have itself is done for it outside, for the one remote and no other."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

from sandbox.contracts.confinement import Confinement
from sandbox.workspace.credentials import HELPER, Credentials
from sandbox.workspace.git import Git, GitError, Setting, reading
from sandbox.workspace.pipes import pipe
from sandbox.workspace.relay import Reach, Relay
from sandbox.workspace.remote import FILES, Remote, describe_remote, rewrite
from sandbox.workspace.ssh import COMMAND, Far, find_far, run_ssh
from sandbox.workspace.user_settings import find_proxy, variables_of_user

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
