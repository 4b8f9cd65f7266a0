"""Contexts: named servers and their tokens, stored in a private file. Selects the context that a command uses."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from sandbox.model.default_server_address import DEFAULT_SERVER
from sandbox.model.errors import SandboxError

DEFAULT_NAME = "default"
"""The name of the context that always exists: the default server, without a token."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
FILE_BYTES_MAX = 1024 * 1024
_VERSION = 1


class ContextError(SandboxError):
    """A context cannot be selected or changed; the message says what to do."""

    code = "invalid_context"


class ContextNotFoundError(ContextError):
    """No context has this name."""

    code = "context_not_found"


@dataclass(frozen=True)
class Context:
    """A server's URL and a token for it; an empty token if the server needs none."""

    server: str
    token: str = field(default="", repr=False)


DEFAULT_CONTEXT = Context(DEFAULT_SERVER)


@dataclass(frozen=True)
class Contexts:
    """All stored contexts, keyed by name, and the name of the current one."""

    by_name: Mapping[str, Context] = field(default_factory=dict)
    current: str = DEFAULT_NAME

    def find(self, name: str) -> Context:
        """Return the context with this name. Raises ContextNotFoundError."""
        if name == DEFAULT_NAME:
            return DEFAULT_CONTEXT
        if name not in self.by_name:
            from difflib import get_close_matches

            close = get_close_matches(name, [DEFAULT_NAME, *self.by_name], n=1)
            advice = f"did you mean {close[0]}?" if close else "list them with: sandbox context list"
            raise ContextNotFoundError(f"There is no context {name!r}; {advice}")
        return self.by_name[name]

    def use(self, name: str) -> Self:
        """Make a context the current one. Raises ContextNotFoundError."""
        self.find(name)
        return replace(self, current=name)

    def add(self, name: str, context: Context) -> Self:
        """Add a context, replacing any with the same name, and make it the current one."""
        return replace(self, by_name={**self.by_name, name: context}, current=name)

    def remove(self, name: str) -> Self:
        """Remove a context. If it is the current one, the default becomes current. Raises ContextError."""
        self.find(name)
        if name == DEFAULT_NAME:
            raise ContextError(f"The context {DEFAULT_NAME} cannot be removed.")
        rest = {known: context for known, context in self.by_name.items() if known != name}
        return replace(self, by_name=rest, current=DEFAULT_NAME if self.current == name else self.current)


def check_name(name: str) -> str:
    """Return the name if a context with this name can be stored. Raises ContextError."""
    if not NAME_PATTERN.fullmatch(name) or name == DEFAULT_NAME:
        allowed = f"at most 64 letters, digits and the characters . _ -, and not {DEFAULT_NAME}"
        raise ContextError(f"{name!r} cannot be the name of a context; use {allowed}.")
    return name


def default_file() -> Path:
    """Return `$XDG_CONFIG_HOME/sandbox/contexts.json`."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # The XDG Base Directory Specification requires that relative paths be ignored.
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "sandbox" / "contexts.json"


class ContextFile:
    """The file with the contexts. It contains tokens, so only its owner may have access to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Contexts:
        """Read the contexts. There are none if the file does not exist. Raises ContextError or OSError."""
        try:
            # O_NONBLOCK: a named pipe is rejected below, and opening it must not wait for a writer.
            with os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
                self._check_private(os.fstat(opened.fileno()))
                content = opened.read(FILE_BYTES_MAX + 1)
        except FileNotFoundError:
            return Contexts()
        try:
            return _decode(content)
        except (ValueError, RecursionError):
            raise ContextError(f"{self.path} is damaged; remove it, and run sandbox login again.") from None

    @contextmanager
    def locked(self) -> Iterator[ContextFile]:
        """Lock the file while the context is active, so that concurrent changes are not lost. Raises OSError."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield self
        finally:
            os.close(directory)

    def save(self, contexts: Contexts) -> None:
        """Replace the file atomically. Raises OSError."""
        from tempfile import mkstemp

        from sandbox.primitives.files import remove_on_failure, replace_durably

        target = Path(os.path.realpath(self.path))  # keep symbolic links, such as one into a dotfiles repository
        descriptor, name = mkstemp(prefix=".contexts-", dir=target.parent)  # with mode 0600
        new = Path(name)
        with remove_on_failure(new):
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(_encode(contexts))
            replace_durably(new, target)

    def _check_private(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise ContextError(f"{self.path} contains tokens, so the user who runs this command must own it.")
        if status.st_mode & 0o077:
            message = f"{self.path} contains tokens, but other users have access to it"
            raise ContextError(f"{message}; fix it with: chmod 600 {shlex.quote(str(self.path))}")


def _encode(contexts: Contexts) -> bytes:
    stored = {
        name: {"server": context.server} | ({"token": context.token} if context.token else {})
        for name, context in contexts.by_name.items()
    }
    document = {"version": _VERSION, "current": contexts.current, "contexts": stored}
    return json.dumps(document, indent=2).encode() + b"\n"


def _decode(content: bytes) -> Contexts:
    """Parse the file. Raises ValueError or RecursionError."""
    if len(content) > FILE_BYTES_MAX:
        raise ValueError
    match json.loads(content):
        case {"version": 1, "current": str(current), "contexts": dict(stored)}:
            by_name = {name: _decode_context(name, value) for name, value in stored.items()}
            return Contexts(by_name, current)
    raise ValueError


def _decode_context(name: str, value: Any) -> Context:
    if NAME_PATTERN.fullmatch(name):
        match value:
            case {"server": str(server), "token": str(token)}:
                return Context(server, token)
            case {"server": str(server)}:
                return Context(server)
    raise ValueError


@dataclass(frozen=True)
class ServerSelection:
    """The selection made on the command line and in the environment. An empty string is the same as None."""

    server: str | None = None
    token: str | None = None
    context: str | None = None


def select_context(options: ServerSelection, variables: ServerSelection, file: ContextFile) -> Context:
    """Return the server and the token to use.

    Options override variables, and variables override the current context. The token of a context is never sent to
    another server. Raises ContextError or OSError.
    """
    if options.server and options.context:
        raise ContextError("Give --server or --context, but not both.")
    if options.server:
        return Context(options.server, options.token or variables.token or _stored_token(options.server, file))
    if options.context:
        context = file.load().find(options.context)
        return replace(context, token=options.token or context.token)
    if variables.server and variables.context:
        raise ContextError("SANDBOX_SERVER and SANDBOX_CONTEXT are both set; unset one of them, or give --context.")
    token = options.token or variables.token or ""
    if variables.server:
        return Context(variables.server, token or _stored_token(variables.server, file))
    contexts = file.load()
    context = contexts.find(variables.context or contexts.current)
    return replace(context, token=token or context.token)


def _stored_token(server: str, file: ContextFile) -> str:
    """Return the server's token from the current context, otherwise its only stored token; empty if neither exists."""
    try:
        contexts = file.load()
    except (ContextError, OSError):
        return ""
    if not contexts.by_name:
        return ""
    from sandbox.client.errors import InvalidParameterError
    from sandbox.client.requests import validate_base_url

    try:
        url = validate_base_url(server)
    except InvalidParameterError:  # the client reports an invalid URL
        return ""
    # Compare with the normalized URL, because `sandbox login` stores normalized URLs.
    tokens = {name: context.token for name, context in contexts.by_name.items() if context.server == url}
    if contexts.current in tokens:
        return tokens[contexts.current]
    return tokens.popitem()[1] if len(set(tokens.values())) == 1 else ""
