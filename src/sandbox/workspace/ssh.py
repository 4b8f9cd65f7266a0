"""ssh for a confined clone: it runs outside with the server user's keys, and the confined git has its two ends only.

What is run at the far end is made of the URL here; nothing of it comes from inside.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox.contracts.confinement import FIRST_DESCRIPTOR, ConfinedCommand
from sandbox.workspace.git import Setting
from sandbox.workspace.unconfined import Unconfined

COMMAND = f"f() {{ cat <&{FIRST_DESCRIPTOR + 1} & cat >&{FIRST_DESCRIPTOR}; }}; f"
"""What git takes for ssh inside: it passes on what goes to the far end, and what comes from there."""

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=20"
_URL = re.compile(r"ssh://(?P<user>[^@/]+@)?(?P<host>\[[^\]]+\]|[^:/]+)(?::(?P<port>[0-9]+))?(?P<path>/.*)", re.DOTALL)
_SCP = re.compile(r"(?P<user>[^@/:]+@)?(?P<host>\[[^\]]+\]|[^:/]+):(?P<port>)(?P<path>(?!//|:).+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Far:
    """The far end of an ssh URL. port: as text, empty for ssh's own choice."""

    host: str
    port: str
    path: str


def find_far(url: str) -> Far | None:
    """None for what is no ssh URL, and for hosts that ssh would take for an option."""
    match = _URL.fullmatch(url) or (None if "://" in url else _SCP.fullmatch(url))
    if match is None or (match["user"] or match["host"]).startswith("-"):
        return None
    path = match["path"].removeprefix("/") if match["path"].startswith("/~") else match["path"]
    return Far((match["user"] or "") + match["host"].strip("[]"), match["port"] or "", path)


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
