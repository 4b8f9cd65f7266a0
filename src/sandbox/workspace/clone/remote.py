"""Where a confined clone goes, and what of the server user's configuration it needs for that, and no more.

Settings for other hosts stay outside: a repository that takes git over would find their tokens.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import msgspec

from sandbox.interfaces.layout import PROXY_PORT
from sandbox.interfaces.runtime import CERTIFICATES, FIRST_DESCRIPTOR, ConfinedCommand
from sandbox.workspace.clone.relay import Address, canonical
from sandbox.workspace.git.command import Setting
from sandbox.workspace.git.host_process import Unconfined

FILES = "/etc/clone"
"""Where files that the settings name are laid; the home of a confined clone."""

SETTINGS_FILES_MAX = 64
"""Of one clone: each is a descriptor on its way in, of which a confinement takes 90 for one command."""

_PORTS = {"http": 80, "https": 443}
_HTTP = re.compile(r"http\.(?:(?P<url>.+)\.)?(?P<name>[a-z]+)", re.DOTALL)
_NAMES_FILE = frozenset(
    {"sslcainfo", "sslcert", "sslkey", "cookiefile", "proxysslcert", "proxysslkey", "proxysslcainfo"}
)
_HASHED = re.compile(r"[0-9a-f]{8}\.r?[0-9]+")
"""How OpenSSL finds a certificate in a directory; what has another name is mostly the same certificate again."""

_LEFT_OUT = frozenset({"proxy", "savecookies", "curloptresolve"})
_TOO_MANY = (
    "http.{name} of the server's user names {value}, and with it more files than a confined git is given; put them "
    "into one file and name that by http.sslCAInfo"
)
_RESOLVING = {"socks5": "socks5h", "socks4": "socks4a"}
"""No name can be resolved in the confinement, so that is left to the proxy."""


class Remote(msgspec.Struct, frozen=True):
    """url: after the user's `insteadOf`. address: what is dialled for it, None where that is not by HTTP.

    via: the proxy of the server's user. settings, files: for a git in the confinement.
    """

    url: str
    address: Address | None
    via: Address | None = None
    settings: Sequence[Setting] = ()
    files: Mapping[str, bytes] = {}

    def __repr__(self) -> str:
        """Without what is in the files."""
        return f"{type(self).__name__}({self.url!r})"


def rewrite(url: str, settings: Sequence[Setting]) -> str:
    """As git does: the longest `insteadOf` that the URL begins with."""
    rules = [(value, key[len("url.") : -len(".insteadof")]) for key, value in settings if _is_instead_of(key)]
    prefix, base = max(((value, base) for value, base in rules if url.startswith(value)), key=_length, default=("", ""))
    return base + url[len(prefix) :] if prefix else url


def describe_remote(url: str, settings: Sequence[Setting], proxy: str, home: Path) -> Remote:
    """Of a URL as `rewrite` gives it. proxy: what the user has for it, if anything.

    Raises ValueError, and OSError for a file that a setting names.
    """
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or parts.hostname is None:
        return Remote(url, None)
    address = Address(canonical(parts.hostname), parts.port or _PORTS[parts.scheme])
    taken: list[Setting] = []
    files: dict[str, bytes] = {}
    for key, value in settings:
        match = _HTTP.fullmatch(key)
        if match is None or match["name"] in _LEFT_OUT or not _is_of(match["url"], address.host):
            continue
        place = f"{FILES}/{len(files)}"
        laid = _lay(match["name"], value, home, place)
        files.update(laid or {})
        taken.append((key, value if laid is None else place if laid else ""))
        if len(files) > SETTINGS_FILES_MAX:
            raise OSError(_TOO_MANY.format(name=match["name"], value=value))
    if not proxy:
        return Remote(url, address, None, [*taken, ("http.proxy", f"socks5h://127.0.0.1:{PROXY_PORT}")], files)
    taken += [(key, value) for key, value in settings if key == "remote.origin.proxyauthmethod"]
    return Remote(url, address, *_behind(proxy, taken, files))


def _lay(name: str, value: str, home: Path, place: str) -> Mapping[str, bytes] | None:
    """What is laid at the place for a setting's value, empty for no file; None where the value itself counts."""
    if name == "sslcapath":
        is_in_sight = any(Path(value).is_relative_to(one) for one in ("/usr", *CERTIFICATES))
        return None if is_in_sight else _read_directory(name, value, home, place)
    if name in _NAMES_FILE or (name == "pinnedpubkey" and not value.startswith("sha256//")):
        content = _read(name, value, home)
        return {} if content is None else {place: content}
    return None


def _read_directory(name: str, value: str, home: Path, place: str) -> Mapping[str, bytes]:
    if not value:
        return {}
    path = home / value.removeprefix("~/")
    try:
        names = sorted(one.name for one in path.iterdir() if one.is_file())
        if len(names) > SETTINGS_FILES_MAX:
            names = [one for one in names if _HASHED.fullmatch(one)] or names
        found = {f"{place}/{one}": (path / one).read_bytes() for one in names[: SETTINGS_FILES_MAX + 1]}
    except OSError as error:
        raise _unreadable(name, path, error) from error
    if not found:
        raise OSError(f"http.{name} of the server's user names {path}, which holds no certificate")
    return found


def _unreadable(name: str, path: Path, error: OSError) -> OSError:
    return OSError(f"http.{name} of the server's user names {path}, which cannot be read: {error.strerror}")


def _read(name: str, value: str, home: Path) -> bytes | None:
    """None where a setting names no file, and for cookies that nobody has stored yet. Raises OSError that names it."""
    path = home / value.removeprefix("~/")
    try:
        return path.read_bytes() if value else None
    except OSError as error:
        if name == "cookiefile" and isinstance(error, FileNotFoundError):
            return None
        raise _unreadable(name, path, error) from error


def _behind(
    proxy: str, taken: list[Setting], files: dict[str, bytes]
) -> tuple[Address, list[Setting], dict[str, bytes]]:
    """The user's proxy, which is found at the confinement's door by its own name."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host = parts.hostname or ""
    via = Address(host, parts.port or (443 if parts.scheme == "https" else 1080))
    user, at, _ = parts.netloc.rpartition("@")
    is_name = not re.fullmatch(r"[0-9.]+|.*:.*", host)
    inside = host if is_name else "127.0.0.1"
    scheme = _RESOLVING.get(parts.scheme, parts.scheme)
    moved = urlunsplit(parts._replace(scheme=scheme, netloc=f"{user}{at}{inside}:{PROXY_PORT}"))
    names = {"/etc/hosts": f"127.0.0.1 localhost {host}\n".encode()} if is_name else {}
    return via, [*taken, ("http.proxy", moved)], {**files, **names}


def _is_of(url: str | None, host: str) -> bool:
    """Whether settings of this URL may be for the host; as with git, an address that cannot be is no host's."""
    try:
        return url is None or fnmatchcase(host, canonical(urlsplit(url).hostname or ""))
    except ValueError:
        return False


def _is_instead_of(key: str) -> bool:
    return key.startswith("url.") and key.endswith(".insteadof")


def _length(rule: tuple[str, str]) -> int:
    return len(rule[0])


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
