"""Clones over ssh: parses ssh URLs, and runs ssh outside the confinement."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

import msgspec

from sandbox.interfaces.runtime import FIRST_EXTRA_DESCRIPTOR, ConfinedCommand
from sandbox.workspace.git.command import GitSetting
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
