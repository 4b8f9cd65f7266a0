"""ssh for a confined clone: it runs outside with the server user's keys, and the confined git has its two ends only.

What is run at the far end is made of the URL here; nothing of it comes from inside.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

import msgspec

from sandbox.contracts.confinement import FIRST_DESCRIPTOR, ConfinedCommand
from sandbox.workspace.git import Setting
from sandbox.workspace.unconfined import Unconfined

COMMAND = f"f() {{ cat <&{FIRST_DESCRIPTOR + 1} & exec cat >&{FIRST_DESCRIPTOR}; }}; f"
"""What git takes for ssh inside: it passes on what goes to the far end, and what comes from there.

`exec`: a shell that stayed would hold git's end open, and git would wait for a far end that is gone.
"""

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=20"
_URL = re.compile(
    r"ssh://(?:(?P<user>[^@/]+)@)?(?P<host>\[[^\]]+\]|[^:/]+)(?::(?P<port>[0-9]+))?(?P<path>/.*)", re.DOTALL
)
_SCP = re.compile(r"(?:(?P<user>[^@/:]+)@)?(?P<host>\[[^\]]+\]|[^:/]+):(?P<port>)(?P<path>(?!//|:).+)", re.DOTALL)

_UNFIT = re.compile(r"[\x00-\x20\x7f'\"`$;&<>|(){}]")
"""What no user and no host is made of, but what a shell would take for its own where the user's ssh starts one."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Far(msgspec.Struct, frozen=True):
    """The far end of an ssh URL. port: as text, empty for ssh's own choice."""

    host: str
    port: str
    path: str


def find_far(url: str) -> Far | None:
    """None for what is no ssh URL, and for what ssh or a shell of the user's would take for an option or more."""
    is_scp = "://" not in url
    match = (_SCP if is_scp else _URL).fullmatch(url)
    if match is None:
        return None
    # Each part by itself: a slash or an @ that was escaped ends none.
    raw = (match["user"] or "", match["host"].strip("[]"), match["path"])
    user, host, path = raw if is_scp else (unquote(part, errors="surrogateescape") for part in raw)
    if (user or host).startswith("-") or _UNFIT.search(user + host) or _CONTROL.search(path):
        return None
    path = path.removeprefix("/") if path.startswith("/~") else path
    return Far(f"{user}@{host}" if user else host, match["port"] or "", path)


async def run_ssh(
    far: Far, settings: Sequence[Setting], environment: Mapping[str, str], ends: tuple[int, int], complaints: int
) -> None:
    """Until it ends. ends: its input and output. Raises OSError."""
    chosen = dict(settings)
    command = chosen.get("core.sshcommand", SSH)
    is_openssh = chosen.get("ssh.variant", "ssh") in ("ssh", "auto")
    options = ["-o", "SendEnv=GIT_PROTOCOL"] if is_openssh else []
    if far.port:
        options += ["-p" if is_openssh else "-P", far.port]
    words = [*options, far.host, f"git-upload-pack {_quote(far.path)}"]
    # As git runs it: the command is the user's, and may use what a shell knows.
    argv = ["sh", "-c", f'{command} "$@"', command, *words]
    variables = {**environment, "GIT_PROTOCOL": "version=2", "LC_ALL": "C"}
    await Unconfined().run(ConfinedCommand(argv, variables, Path("/"), *ends, complaints))


def _quote(path: str) -> str:
    escaped = path.replace("'", "'\\''").replace("!", "'\\!'")
    return f"'{escaped}'"
