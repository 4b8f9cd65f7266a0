"""Translates git's errors into messages that say what to do.

git's stderr contains data from the remote, and may quote settings of the server's user.
"""

import re
from collections.abc import Collection

from sandbox.model.manifest.schema import Repository
from sandbox.model.printable import replace_unprintable

_LINE_CHARACTERS_MAX = 300
_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_CREDENTIALS_HINT = (
    "give the server's user access (credential.helper or http.<url>.extraHeader in its git configuration, or an ssh "
    "key), and check that this access covers the repository"
)
SILENT_INDEX_PACK_ERROR = "fatal: fetch-pack: invalid index-pack output"
"""git's only message if a signal kills its index-pack, for example at the file size limit."""

DISK_FULL_MESSAGE = "not enough disk space; raise vm.disk, or free space in the server's data directory"
# The scheme is matched once per word and limited in length, because the remote may send a megabyte of letters.
_URL = re.compile(r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{0,31}://[^\s']+", re.IGNORECASE)
_EXPLANATIONS = (
    # This entry must be first: if a program of git runs out of memory, git also reports a broken connection.
    (
        r"out of memory",
        "it contains objects that are too large for git's memory; raise vm.memory (to 4G at most)",
    ),
    (r"remote branch .* not found", "it has no branch '{branch}'; check repository.branch"),
    (
        r"could not read (username|password)|authentication failed|returned error: 40[13]|permission denied"
        r"|terminal prompts disabled|unable to get password",
        f"it does not exist or needs credentials; check repository.url, or {_CREDENTIALS_HINT}",
    ),
    (
        r"host key verification failed",
        "the host's ssh key is not known; add it to the known_hosts of the server's user",
    ),
    (
        r"repository '.*' not found|not valid: is this a git repository|returned error: 404"
        r"|does not appear to be a git repository|repository not found",
        f"there is no repository, or it needs credentials; check repository.url, or {_CREDENTIALS_HINT}",
    ),
    (
        r"could not resolve (host|hostname|proxy)|name or service not known|SOCKS5 connection to .* \(4\)",
        "the name of its host cannot be resolved; check repository.url and the server's network",
    ),
    (
        r"failed to connect|could(n't| not) connect|connection refused|no route to host|network is unreachable"
        r"|SOCKS5 connection to .* \([35]\)",
        "its host does not accept the connection; check repository.url and the server's network",
    ),
    (
        r"timed out|operation too slow|connection reset|unexpected disconnect|early eof|empty reply|recv failure",
        "the connection broke; try again",
    ),
    (
        r"transport '.*' not allowed|protocol .* (not supported|disabled)|unsupported protocol",
        "only https, http and ssh are allowed; check repository.url and url.<base>.insteadOf of the server's user",
    ),
    (r"ssl|certificate|tls", "the TLS connection failed; check the certificate of its host"),
    (
        r"unable to update url base from redirection|redirect|returned error: 30\d|SOCKS5 connection to .* \(2\)",
        "it redirects to another URL; use the final one",
    ),
    (r"returned error: 5\d\d", "its host responds with a server error; try again later"),
    (r"no space left on device|disk quota", DISK_FULL_MESSAGE),
    (r"file too large|died of signal 25", "it is larger than the size limit for clones; raise vm.disk (up to 32G)"),
    (r"fsck error|invalid path|badtree|refusing to create", "it contains malformed objects"),
    (
        r"failed to execute (git|prlimit)|setpriv is not installed",
        "the server lacks git or setpriv; install git and util-linux",
    ),
    (r"(?<![\w/.-])ssh: (command )?not found", "the server lacks ssh; install openssh-client"),
    (
        rf"\A\s*{SILENT_INDEX_PACK_ERROR}\s*\Z",
        "it is probably larger than the size limit for clones; raise vm.disk (up to 32G)",
    ),
)
_TRANSIENT = re.compile(
    r"timed out|operation too slow|connection reset|unexpected disconnect|early eof|empty reply|recv failure"
    r"|returned error: (429|5\d\d)",
    re.IGNORECASE,
)
"""Errors of a connection that was established and then broke, and failures that the host reports as its own.

If a name or an address does not respond at all, an error in the manifest is just as likely.
"""


def is_transient(stderr: str) -> bool:
    """Return whether a retry may succeed."""
    is_memory = "out of memory" in stderr.lower()
    return _TRANSIENT.search(stderr) is not None and not is_memory


def explain_clone_failure(stderr: str, repository: Repository, secrets: Collection[str]) -> str:
    """Explain why cloning failed. At most one line of git's output is shown, without the secrets."""
    # Words in a URL, for example openssl, say nothing about the failure.
    lines = _URL.sub("", stderr.replace(repository.url, "")).split("\n")
    searched = "\n".join(line[:_LINE_CHARACTERS_MAX] for line in lines)
    for pattern, explanation in _EXPLANATIONS:
        if re.search(pattern, searched, re.IGNORECASE):
            return f"Cannot clone {repository.url}: {explanation.format(branch=repository.branch)}."
    line = last_error_line(redact_credentials(stderr, secrets)) or "nothing"
    return f"Cannot clone {repository.url}: git reported: {line}"


def redact_credentials(text: str, secrets: Collection[str]) -> str:
    """Replace the secrets, and any credentials in URLs, with asterisks."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _CREDENTIALS_IN_URL.sub("***@", text)


def last_error_line(stderr: str) -> str:
    """Return the last line that starts with `fatal:` or `error:`, otherwise the last line; printable and truncated."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    error_lines = [line for line in lines if line.startswith(("fatal:", "error:"))] or lines
    return replace_unprintable(error_lines[-1], lambda _: "?")[:_LINE_CHARACTERS_MAX] if error_lines else ""
