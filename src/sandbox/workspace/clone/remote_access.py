"""The remote of a clone: its URL, the settings of the server user's git that apply to it, and its credentials.

Settings for other hosts are not passed into the confinement: a repository that exploits git could read the tokens in
them.

Only clones over HTTP use credentials. They are looked up in the git configuration of this process's user and then, on a
host of a cluster, on the server.
"""

import asyncio
import itertools
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

import msgspec

from sandbox.interfaces.gateway import PROXY_PORT
from sandbox.interfaces.runtime import CERTIFICATE_DIRECTORIES, FIRST_EXTRA_DESCRIPTOR
from sandbox.interfaces.workspace import (
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
from sandbox.model.errors import DECODE_ERRORS
from sandbox.primitives.concurrency import run_in_thread, running_in_background
from sandbox.workspace.clone.socks_proxy import HostPort, canonical_host
from sandbox.workspace.git_command import Git, GitError, GitSetting, pipe

CONFINED_HOME = "/etc/clone"
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
        file_path = f"{CONFINED_HOME}/{len(files)}"
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


_REQUEST_BYTES_MAX = 16 * 1024

_HELPER_COMMAND = '!f() {{ test "$1" != get || {{ {{ cat; echo; }} >{requests}; sed "/^$/q" <{responses}; }}; }}; f'
"""Credential helper of git. It forwards lookups and their results; nothing is stored or erased."""

CONFINED_HELPER_COMMAND = _HELPER_COMMAND.format(
    requests=f"&{FIRST_EXTRA_DESCRIPTOR}", responses=f"&{FIRST_EXTRA_DESCRIPTOR + 1}"
)
"""Uses the numbers that a confinement gives to descriptors."""

_HELPER_KEY = re.compile(r"credential\.(.+\.)?helper", re.DOTALL)


class UserCredentials:
    """Looks up the credentials for a URL: with the git configuration of this process's user, then in ~/.netrc."""

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

    They are looked up with the git configuration of this process's user. Raises NoCredentialsError, even if the query
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
    """Requests the credentials for an attempt's clone from the server. connection: to the worker of this host."""

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

    secrets: the passwords returned so far. credential_problem: why the server had no credentials; None if it had
    some or was not contacted.
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
