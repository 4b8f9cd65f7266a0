"""Clones with a confined git. Credentials, ssh and network access are provided from outside, for one remote only."""

import os
import re
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote

import msgspec

from sandbox.interfaces.runtime import FIRST_EXTRA_DESCRIPTOR, ConfinedCommand, Confinement
from sandbox.interfaces.workspace import FindCredentials, NoCredentialsError
from sandbox.primitives.concurrency import running_in_background
from sandbox.workspace.clone.remote_access import (
    CONFINED_HELPER_COMMAND,
    CONFINED_HOME,
    CloneRemote,
    CredentialHelper,
    UserCredentials,
    apply_instead_of,
    find_proxy,
    resolve_remote,
    serve_credentials,
    user_environment,
)
from sandbox.workspace.clone.socks_proxy import DialPolicy, SocksProxy
from sandbox.workspace.git_command import Git, GitError, GitSetting, capture_output, pipe
from sandbox.workspace.no_confinement import NoConfinement

STUB_SSH_COMMAND = f"f() {{ cat <&{FIRST_EXTRA_DESCRIPTOR + 1} & exec cat >&{FIRST_EXTRA_DESCRIPTOR}; }}; f"
"""Replaces ssh in the confinement. It forwards git's data to the remote and the remote's data to git.

`exec` is needed: a remaining shell would keep the pipe open, and git would wait for a remote that has disconnected.
"""

DEFAULT_SSH_COMMAND = "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=20"
_SSH_URL = re.compile(
    r"ssh://(?:(?P<user>[^@/]+)@)?(?P<host>\[[^\]]+\]|[^:/]+)(?::(?P<port>[0-9]+))?(?P<path>/.*)", re.DOTALL
)
_SCP = re.compile(r"(?:(?P<user>[^@/:]+)@)?(?P<host>\[[^\]]+\]|[^:/]+):(?P<port>)(?P<path>(?!//|:).+)", re.DOTALL)

_UNSAFE_CHARACTERS = re.compile(r"[\x00-\x20\x7f'\"`$;&<>|(){}]")
"""Characters that no user or host contains, but that a shell would interpret if the user's ssh command starts one."""

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")


class SshRemote(msgspec.Struct, frozen=True):
    """The remote of an ssh URL. port: as text; empty for ssh's default."""

    host: str
    port: str
    path: str


def parse_ssh_url(url: str) -> SshRemote | None:
    """Parse an ssh URL. Returns None for other URLs, and for a URL with parts that ssh or a shell could interpret."""
    is_scp = "://" not in url
    match = (_SCP if is_scp else _SSH_URL).fullmatch(url)
    if match is None:
        return None
    # Unquote after splitting: an escaped slash or @ is not a separator.
    raw = (match["user"] or "", match["host"].strip("[]"), match["path"])
    user, host, path = raw if is_scp else (unquote(part, errors="surrogateescape") for part in raw)
    if (user or host).startswith("-") or _UNSAFE_CHARACTERS.search(user + host) or _CONTROL_CHARACTERS.search(path):
        return None
    path = path.removeprefix("/") if path.startswith("/~") else path
    return SshRemote(f"{user}@{host}" if user else host, match["port"] or "", path)


async def run_ssh(
    remote: SshRemote,
    settings: Sequence[GitSetting],
    environment: Mapping[str, str],
    standard_streams: tuple[int, int],
    stderr: int,
) -> None:
    """Run ssh until it ends. standard_streams: its stdin and stdout. Raises OSError."""
    values = dict(settings)
    command = values.get("core.sshcommand", DEFAULT_SSH_COMMAND)
    is_openssh = values.get("ssh.variant", "ssh") in ("ssh", "auto")
    options = ["-o", "SendEnv=GIT_PROTOCOL"] if is_openssh else []
    if remote.port:
        options += ["-p" if is_openssh else "-P", remote.port]
    words = [*options, remote.host, f"git-upload-pack {_shell_quote(remote.path)}"]
    # Use a shell, as git does: the command is the user's and may contain shell syntax.
    argv = ["sh", "-c", f'{command} "$@"', command, *words]
    variables = {**environment, "GIT_PROTOCOL": "version=2", "LC_ALL": "C"}
    await NoConfinement().run(ConfinedCommand(argv, variables, Path("/"), *standard_streams, stderr))


def _shell_quote(path: str) -> str:
    escaped = path.replace("'", "'\\''").replace("!", "'\\!'")
    return f"'{escaped}'"


class RemoteAccess(NamedTuple):
    """How clones reach their remotes.

    dial_policy: which addresses they may connect to. find_credentials_on_server: used if this host has no credentials;
        None if the server runs on this host.
    """

    dial_policy: DialPolicy
    find_credentials_on_server: FindCredentials | None = None


_STDERR_BYTES_MAX = 64 * 1024


def redirect_settings(dial_policy: DialPolicy) -> Sequence[GitSetting]:
    """Return git's settings for the redirects that the policy allows."""
    return () if dial_policy.follows_redirects else (("http.followRedirects", "false"),)


class ConfinedClone:
    """A clone of one URL.

    user_settings: the settings of this process's user that apply. secrets: the passwords that git received.
    credential_problem: why the server had no credentials; see `CredentialHelper`.
    """

    def __init__(
        self,
        url: str,
        user_settings: Sequence[GitSetting],
        environment: Mapping[str, str],
        access: RemoteAccess,
    ) -> None:
        self.credential_problem: NoCredentialsError | None = None
        self._redirect_settings = redirect_settings(access.dial_policy)
        self.secrets: set[str] = set()
        self._manifest_url = url
        self._url = apply_instead_of(url, user_settings)
        self._user_settings = user_settings
        self._variables = {"PATH": environment.get("PATH", os.defpath), **user_environment(environment)}
        self._home = Path(environment.get("HOME", "/"))
        self._access = access

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
                {"HOME": CONFINED_HOME},
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
        user_credentials = UserCredentials(self._url, self._user_settings, self._variables, self._variables["PATH"])
        credentials = CredentialHelper(self._url, user_credentials.find, self._access.find_credentials_on_server)
        relay = SocksProxy(remote.address, upstream_proxy=remote.upstream_proxy, dial_policy=self._access.dial_policy)
        settings = [*remote.settings, ("credential.helper", CONFINED_HELPER_COMMAND)]
        async with relay.serving(confinement.proxy_listener), serve_credentials(credentials) as descriptors:
            try:
                yield settings, remote.files, descriptors
            finally:
                self.secrets |= credentials.secrets
                self.credential_problem = credentials.credential_problem

    @asynccontextmanager
    async def _over_ssh(self, remote: SshRemote) -> AsyncIterator["GitInputs"]:
        """Run ssh outside the confinement, connected to git by pipes. ssh's errors are prepended to git's errors."""
        try:
            async with capture_output() as (stderr, read_stderr):
                with stderr, pipe() as (to_read, to_write), pipe() as (from_read, from_write):
                    streams = (to_read.fileno(), from_write.fileno())
                    running = run_ssh(remote, self._user_settings, self._variables, streams, stderr.fileno())
                    async with running_in_background(_close_when_done(running, to_read, from_write, stderr)):
                        settings = [("core.sshCommand", STUB_SSH_COMMAND), ("ssh.variant", "ssh")]
                        yield settings, {}, (to_write.fileno(), from_read.fileno())
        except GitError as error:
            raise GitError(error.returncode, read_stderr()[-_STDERR_BYTES_MAX:] + error.stderr.encode()) from None


GitInputs = tuple[Sequence[GitSetting], Mapping[str, bytes], Sequence[int]]


async def _close_when_done(work: Coroutine[Any, Any, None], *files: IO[bytes]) -> None:
    """Close the files when `work` ends, so that the other ends of the pipes receive EOF."""
    try:
        await work
    finally:
        for file in files:
            file.close()
