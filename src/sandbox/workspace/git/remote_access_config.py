"""Reads the settings in the server user's git configuration that are needed to access repositories."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sandbox.workspace.git.command import Git, GitSetting

_USED_KEYS = re.compile(r"(credential|url|http|ssh)\..+|core\.sshcommand|remote\.origin\.proxy(authmethod)?", re.DOTALL)
_USER_VARIABLES = ("HOME", "XDG_CONFIG_HOME", "SSH_AUTH_SOCK")
_SECRET_CHARACTERS_MIN = 8


async def read_user_config(environment: Mapping[str, str], path: str) -> Sequence[GitSetting]:
    """Return the settings in git's order. Raises GitError if the configuration is not readable."""
    # An unset GIT_CONFIG_GLOBAL means the files in XDG_CONFIG_HOME and in HOME; `--global` would read only one.
    global_config = {"GIT_CONFIG_GLOBAL": environment.get("GIT_CONFIG_GLOBAL")}
    reader = Git(path, variables={**user_environment(environment), **global_config})
    # Not a git directory: only the user's files are read, independent of the working directory.
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
    """Parse `git config --list -z` and return the used settings. A key without a value means true."""
    settings = []
    for item in listing.decode(errors="surrogateescape").split("\0"):
        key, has_value, value = item.partition("\n")
        if _USED_KEYS.fullmatch(key):
            settings.append((key, value if has_value else "true"))
    return settings


def find_secrets(settings: Sequence[GitSetting]) -> frozenset[str]:
    """Return the values that no message may show, and the words in these values (`Authorization: Basic …`)."""
    values = [value for key, value in settings if key.startswith(("credential.", "http."))]
    words = [word for value in values for word in (value, *value.split())]
    return frozenset(word for word in words if len(word) >= _SECRET_CHARACTERS_MIN)
