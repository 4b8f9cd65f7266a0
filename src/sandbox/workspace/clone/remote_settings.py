"""Resolves the remote of a confined clone, and reads the settings of the server user's git that the clone needs.

Settings for other hosts are not passed into the confinement: a repository that exploits git could read the tokens in
them.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import msgspec

from sandbox.interfaces.gateway import PROXY_PORT
from sandbox.interfaces.runtime import CERTIFICATE_DIRECTORIES
from sandbox.workspace.clone.socks_proxy import HostPort, canonical_host
from sandbox.workspace.git.command import Git, GitSetting

FILES_DIRECTORY = "/etc/clone"
"""Directory of the files that settings name; also the HOME of a confined clone."""

SETTINGS_FILES_MAX = 64
"""Maximum number of files per clone. Each needs a descriptor, and a confinement accepts 90 for one command."""

_USED_KEYS = re.compile(r"(credential|url|http|ssh)\..+|core\.sshcommand|remote\.origin\.proxy(authmethod)?", re.DOTALL)
_USER_VARIABLES = ("HOME", "XDG_CONFIG_HOME", "SSH_AUTH_SOCK")
_SECRET_CHARACTERS_MIN = 8
_PORTS = {"http": 80, "https": 443}
_HTTP_SETTING = re.compile(r"http\.(?:(?P<url>.+)\.)?(?P<name>[a-z]+)", re.DOTALL)
_FILE_SETTINGS = frozenset(
    {"sslcainfo", "sslcert", "sslkey", "cookiefile", "proxysslcert", "proxysslkey", "proxysslcainfo"}
)
_HASHED_CERTIFICATE_NAME = re.compile(r"[0-9a-f]{8}\.r?[0-9]+")
"""Names under which OpenSSL looks for certificates in a directory. Other files are mostly duplicates of these."""

_IGNORED_SETTINGS = frozenset({"proxy", "savecookies", "curloptresolve"})
_TOO_MANY_FILES = (
    "http.{name} of the server's user is {value}, which contains too many files for a confined git; put the "
    "certificates into one file and set http.sslCAInfo"
)
_REMOTE_DNS_SCHEMES = {"socks5": "socks5h", "socks4": "socks4a"}
"""Replacements for proxy schemes. The proxy must resolve names, because the confinement cannot."""


class CloneRemote(msgspec.Struct, frozen=True):
    """The remote of a clone.

    url: the URL after the user's `insteadOf` rules. address: the host and port to dial; None if the URL is not HTTP or
    HTTPS. upstream_proxy: the proxy of the server's user. settings, files: passed to git in the confinement.
    """

    url: str
    address: HostPort | None
    upstream_proxy: HostPort | None = None
    settings: Sequence[GitSetting] = ()
    files: Mapping[str, bytes] = {}

    def __repr__(self) -> str:
        """Omit the content of the files."""
        return f"{type(self).__name__}({self.url!r})"


def apply_instead_of(url: str, settings: Sequence[GitSetting]) -> str:
    """Rewrite the URL as git does, using the longest `insteadOf` that is a prefix of the URL."""
    rules = [(value, key[len("url.") : -len(".insteadof")]) for key, value in settings if _is_instead_of(key)]
    prefix, base = max(((value, base) for value, base in rules if url.startswith(value)), key=_length, default=("", ""))
    return base + url[len(prefix) :] if prefix else url


def resolve_remote(url: str, settings: Sequence[GitSetting], proxy: str, home: Path) -> CloneRemote:
    """Resolve a URL that `apply_instead_of` returned. proxy: the user's proxy for the URL, or empty.

    Raises ValueError for an invalid URL, and OSError if a setting names a file that cannot be read.
    """
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or parts.hostname is None:
        return CloneRemote(url, None)
    address = HostPort(canonical_host(parts.hostname), parts.port or _PORTS[parts.scheme])
    git_settings: list[GitSetting] = []
    files: dict[str, bytes] = {}
    for key, value in settings:
        match = _HTTP_SETTING.fullmatch(key)
        if match is None or match["name"] in _IGNORED_SETTINGS or not _applies_to_host(match["url"], address.host):
            continue
        file_path = f"{FILES_DIRECTORY}/{len(files)}"
        staged = _stage_setting_file(match["name"], value, home, file_path)
        files.update(staged or {})
        git_settings.append((key, value if staged is None else file_path if staged else ""))
        if len(files) > SETTINGS_FILES_MAX:
            raise OSError(_TOO_MANY_FILES.format(name=match["name"], value=value))
    if not proxy:
        return CloneRemote(
            url, address, None, [*git_settings, ("http.proxy", f"socks5h://127.0.0.1:{PROXY_PORT}")], files
        )
    git_settings += [(key, value) for key, value in settings if key == "remote.origin.proxyauthmethod"]
    return CloneRemote(url, address, *_route_through_proxy(proxy, git_settings, files))


def _stage_setting_file(name: str, value: str, home: Path, path_inside: str) -> Mapping[str, bytes] | None:
    """Return the files to stage for a setting (may be empty), or None if its value is used unchanged."""
    if name == "sslcapath":
        is_visible = any(Path(value).is_relative_to(one) for one in ("/usr", *CERTIFICATE_DIRECTORIES))
        return None if is_visible else _read_directory(name, value, home, path_inside)
    if name in _FILE_SETTINGS or (name == "pinnedpubkey" and not value.startswith("sha256//")):
        content = _read_setting_file(name, value, home)
        return {} if content is None else {path_inside: content}
    return None


def _read_directory(name: str, value: str, home: Path, path_inside: str) -> Mapping[str, bytes]:
    if not value:
        return {}
    path = home / value.removeprefix("~/")
    try:
        names = sorted(one.name for one in path.iterdir() if one.is_file())
        if len(names) > SETTINGS_FILES_MAX:
            names = [one for one in names if _HASHED_CERTIFICATE_NAME.fullmatch(one)] or names
        contents = {f"{path_inside}/{one}": (path / one).read_bytes() for one in names[: SETTINGS_FILES_MAX + 1]}
    except OSError as error:
        raise _unreadable(name, path, error) from error
    if not contents:
        raise OSError(f"http.{name} of the server's user is {path}, which contains no certificate")
    return contents


def _unreadable(name: str, path: Path, error: OSError) -> OSError:
    return OSError(f"http.{name} of the server's user is {path}, which cannot be read: {error.strerror}")


def _read_setting_file(name: str, value: str, home: Path) -> bytes | None:
    """Read the file that a setting names. Raises OSError with the setting's name.

    Returns None for an empty value and for a cookie file that does not exist yet.
    """
    path = home / value.removeprefix("~/")
    try:
        return path.read_bytes() if value else None
    except OSError as error:
        if name == "cookiefile" and isinstance(error, FileNotFoundError):
            return None
        raise _unreadable(name, path, error) from error


def _route_through_proxy(
    proxy: str, settings: list[GitSetting], files: dict[str, bytes]
) -> tuple[HostPort, list[GitSetting], dict[str, bytes]]:
    """Route git through the user's proxy. In the confinement, the proxy's name refers to the proxy listener."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host = parts.hostname or ""
    proxy_address = HostPort(host, parts.port or (443 if parts.scheme == "https" else 1080))
    user, at, _ = parts.netloc.rpartition("@")
    is_name = not re.fullmatch(r"[0-9.]+|.*:.*", host)
    inside = host if is_name else "127.0.0.1"
    scheme = _REMOTE_DNS_SCHEMES.get(parts.scheme, parts.scheme)
    proxy_url = urlunsplit(parts._replace(scheme=scheme, netloc=f"{user}{at}{inside}:{PROXY_PORT}"))
    names = {"/etc/hosts": f"127.0.0.1 localhost {host}\n".encode()} if is_name else {}
    return proxy_address, [*settings, ("http.proxy", proxy_url)], {**files, **names}


def _applies_to_host(url: str | None, host: str) -> bool:
    """Return whether settings of this URL may apply to the host. As in git, an invalid URL's settings never apply."""
    try:
        return url is None or fnmatchcase(host, canonical_host(urlsplit(url).hostname or ""))
    except ValueError:
        return False


def _is_instead_of(key: str) -> bool:
    return key.startswith("url.") and key.endswith(".insteadof")


def _length(rule: tuple[str, str]) -> int:
    return len(rule[0])


async def read_user_config(environment: Mapping[str, str], path: str) -> Sequence[GitSetting]:
    """Return the settings in git's order. Raises GitError if the configuration is not readable."""
    # An unset GIT_CONFIG_GLOBAL means the files in XDG_CONFIG_HOME and in HOME; `--global` would read only one.
    global_config = {"GIT_CONFIG_GLOBAL": environment.get("GIT_CONFIG_GLOBAL")}
    reader = Git(path, variables={**user_environment(environment), **global_config})
    # /dev/null is not a git directory, so only the user's files are read, whatever the working directory is.
    listing = await reader.run("--git-dir=/dev/null", "config", "--includes", "--list", "-z", directory=Path("/"))
    return parse_settings(listing)


async def find_proxy(url: str, settings: Sequence[GitSetting], path: str) -> str:
    """Return the proxy for this URL, as git resolves it; empty for none. Raises GitError."""
    values = [value for key, value in settings if key == "remote.origin.proxy"]
    if values:
        return values[-1]
    if not any(key.startswith("http.") and key.endswith(".proxy") for key, _ in settings):
        return ""
    arguments = ("--git-dir=/dev/null", "config", "--get-urlmatch", "http.proxy", url)
    output = await Git(path, settings).run(*arguments, directory=Path("/"), ok_exit_codes=(0, 1))
    return output.decode(errors="surrogateescape").strip()


def user_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that credential helpers and ssh need to find the user's files and keys."""
    return {name: environment[name] for name in _USER_VARIABLES if name in environment}


def parse_settings(listing: bytes) -> Sequence[GitSetting]:
    """Parse `git config --list -z` and return the settings in `_USED_KEYS`. A key without a value means true."""
    settings = []
    for item in listing.decode(errors="surrogateescape").split("\0"):
        key, has_value, value = item.partition("\n")
        if _USED_KEYS.fullmatch(key):
            settings.append((key, value if has_value else "true"))
    return settings


def find_values_to_redact(settings: Sequence[GitSetting]) -> frozenset[str]:
    """Return the values that no message may show, and the words in these values (`Authorization: Basic …`)."""
    values = [value for key, value in settings if key.startswith(("credential.", "http."))]
    words = [word for value in values for word in (value, *value.split())]
    return frozenset(word for word in words if len(word) >= _SECRET_CHARACTERS_MIN)
