"""The `sandbox login` command."""

from __future__ import annotations

import os
import re
import sys

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.contexts import Context, ContextFile, Contexts, ServerSelection, check_name, default_file
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import current_options, server_option, token_option
from sandbox.cli.output.console import print_message
from sandbox.model.default_server_address import DEFAULT_SERVER

TOKEN_BYTES_MAX = 16 * 1024
NAME_CHARACTERS_MAX = 64
_TOKEN_ADVICE = "\n  Create one on the server's machine: sandbox token create --role operator"


@command(
    epilog=help_examples(
        "sandbox login https://sandbox.example.com --context prod",
        "sandbox login https://sandbox.example.com <token.txt",
        note="Select a context with --context NAME, SANDBOX_CONTEXT, or sandbox context use NAME.",
    )
)
@click.argument("address", metavar="[SERVER]", required=False)
@click.option(
    "--context", "name", metavar="NAME", help="The name of the context [default: the host name of the server]."
)
@server_option
@token_option(hidden=True)
def login(address: str | None, name: str | None) -> None:
    """Log in to a server and store it as a context.

    SERVER is the URL of the server, such as https://sandbox.example.com. If the server needs a token, the command
    prompts for the token, or reads it from stdin if stdin is not a terminal. The token is stored only after the server
    has accepted it.
    """
    from sandbox.client.requests import validate_base_url

    selected = current_options().selection
    if selected.token:
        raise click.UsageError("Enter the token at the prompt, or send it to stdin; other users can see arguments.")
    file = ContextFile(default_file())
    contexts, name = file.load(), name or selected.context
    server = validate_base_url(_find_address(address, selected, contexts, name))
    name = check_name(name or _name_from_url(server))
    token = _read_token(server) if _is_token_needed(server) else ""
    with file.locked():
        file.save(file.load().add(name, Context(server, token)))
    print_message(f"Logged in to {server}. The current context is now {name}.")
    print_overriding_variables()


def print_overriding_variables() -> None:
    """Print which environment variables override the current context."""
    for variable in ("SANDBOX_SERVER", "SANDBOX_CONTEXT", "SANDBOX_TOKEN"):
        if os.environ.get(variable):
            print_message(f"{variable} is set and overrides the current context.")


def _find_address(address: str | None, selected: ServerSelection, contexts: Contexts, name: str | None) -> str:
    if address and selected.server:
        raise click.UsageError("Give SERVER or --server, but not both.")
    known = contexts.by_name.get(name or "")
    known_server = known.server if known else None
    return address or selected.server or known_server or os.environ.get("SANDBOX_SERVER") or DEFAULT_SERVER


def _name_from_url(url: str) -> str:
    host = url.partition("://")[2].partition("/")[0]
    return re.sub(r"[^A-Za-z0-9]+\Z", "", re.sub(r"\A[^A-Za-z0-9]+", "", host.replace(":", "-"))[:NAME_CHARACTERS_MAX])


def _is_token_needed(server: str) -> bool:
    """Send a request without a token. Raises ClientError if the server does not respond as expected."""
    from sandbox.client import Client, UnauthorizedError

    try:
        with Client(server, "") as client:
            client.tasks(limit=1)
    except UnauthorizedError:
        return True
    return False


def _read_token(server: str) -> str:
    """Read the token and check that the server accepts it."""
    from sandbox.client import Client, UnauthorizedError
    from sandbox.client.requests import is_loopback_url

    if server.startswith("http:") and not is_loopback_url(server):
        print_message(f"Warning: The connection to {server} is not encrypted; others may read the token.")
    if sys.stdin.isatty():
        token = click.prompt(f"Token for {server}", hide_input=True, err=True).strip()
    else:
        token = sys.stdin.buffer.read(TOKEN_BYTES_MAX).decode(errors="replace").strip()
    if not token:
        fail(f"Error: {server} needs a token, and stdin has none.{_TOKEN_ADVICE}", ExitCode.REFUSED)
    try:
        with Client(server, token) as client:
            client.tasks(limit=1)
    except UnauthorizedError:
        fail(f"Error: {server} rejected the token: it is unknown, revoked or expired.{_TOKEN_ADVICE}", ExitCode.REFUSED)
    return token
