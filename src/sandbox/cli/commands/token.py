"""The `sandbox token …` commands."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.click_extensions import SuggestingGroup, help_examples
from sandbox.cli.errors import ExitCode, fail, hint_if_output_fails
from sandbox.cli.options import UNIT_SECONDS, current_options, output_options
from sandbox.cli.output.console import escape_text, print_json, stdout_console
from sandbox.cli.settings_options import data_dir_options, load_configuration
from sandbox.interfaces.auth import Role

if TYPE_CHECKING:
    from sandbox.access_tokens.token_file import StoredToken, TokenFile
    from sandbox.bootstrap.settings.schema import ServerSettings


_NO_CLONE_HOST = """\
With tokens, repositories are cloned only from git.allowed_hosts, and the list is empty.
Set it, and restart the server:
  in sandbox.toml:    git.allowed_hosts = ["github.com"]
  or its environment: SANDBOX_GIT_ALLOWED_HOSTS=github.com"""


def _parse_lifetime(ctx: click.Context, parameter: click.Parameter, value: str | None) -> timedelta | None:
    if value is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,5}[smhd]", value, re.ASCII):
        raise click.BadParameter("must be 1 to 999999 with the unit s, m, h or d, such as 12h or 90d")
    return timedelta(seconds=int(value[:-1]) * UNIT_SECONDS[value[-1]])


@click.group(
    cls=SuggestingGroup,
    epilog=help_examples(
        "sandbox token create --role operator --name ci",
        "sandbox token list",
    ),
)
def token() -> None:
    """Manage access tokens.

    Without tokens, anyone who can reach the port is an operator, and the server listens on loopback only. Once a token
    exists, every request needs a token. A running server uses the changes immediately.
    """


@token.command(epilog=help_examples("sandbox token create --role operator --name ci --expires-in 90d"))
@click.option("--role", type=click.Choice([role.value for role in Role]), required=True, help="Role of the token.")
@click.option("--name", default="", help="Purpose of the token; shown in lists.")
@click.option(
    "--expires-in", "lifetime", metavar="DURATION", callback=_parse_lifetime, help="Lifetime, such as 12h or 90d."
)
@data_dir_options
@output_options("text", "json")
def create(*, role: str, name: str, lifetime: timedelta | None, **options: Any) -> None:
    """Create a token and print it. The token is shown only once."""
    from sandbox.access_tokens.token_file import InvalidTokenNameError

    expires_at = datetime.now(UTC) + lifetime if lifetime is not None else None
    settings = load_configuration(options).settings
    try:
        secret, record = _token_file(settings, makes_directory=True).create(Role(role), name, expires_at)
    except InvalidTokenNameError as error:
        fail(f"Error: {error.message}", ExitCode.USAGE)
    hint = f"Token {record.id} was created but not printed. Revoke it: sandbox token revoke {record.id}"
    with hint_if_output_fails(hint):
        if current_options().format == "json":
            print_json({**_token_json(record), "token": secret})
        else:
            click.echo(secret)
    if current_options().format != "json":
        click.echo(f"Token {record.id} ({role}) is shown only once; the server stores its hash.", err=True)
    if not settings.git.allowed_hosts:
        click.echo(_NO_CLONE_HOST, err=True)


@token.command("list", epilog=help_examples("sandbox token list"))
@data_dir_options
@output_options("text", "json", "table")
def list_tokens(**options: Any) -> None:
    """List the tokens."""
    file = _token_file(load_configuration(options).settings)
    records = file.list()
    if current_options().format == "json":
        print_json({"tokens": [_token_json(record) for record in records]})
    elif records:
        _print_tokens(records)
    elif file.has_tokens:
        click.echo(
            f"No token is left, so all requests are denied. Create one, or remove {escape_text(str(file.path))}.",
            err=True,
        )
    else:
        click.echo("There are no tokens. Create one with: sandbox token create --role operator", err=True)


@token.command(epilog=help_examples("sandbox token revoke abcdefgh"))
@click.argument("token_id", metavar="ID")
@data_dir_options
def revoke(token_id: str, **options: Any) -> None:
    """Revoke a token and end its sessions."""
    from sandbox.access_tokens.token_file import TokenNotFoundError
    from sandbox.bootstrap.private_directories import check_owner

    file = _token_file(load_configuration(options).settings)
    check_owner(file.path.parent)
    try:
        file.revoke(token_id)
    except TokenNotFoundError as error:
        fail(f"Error: {escape_text(error.message)}", ExitCode.NOT_FOUND)
    click.echo(f"Token {token_id} is revoked.", err=True)
    if not file.list():
        click.echo(
            f"It was the last token; all requests are denied now. To allow all local requests again, remove "
            f"{escape_text(str(file.path))}.",
            err=True,
        )


def _token_file(settings: ServerSettings, *, makes_directory: bool = False) -> TokenFile:
    from sandbox.access_tokens.token_file import TokenFile
    from sandbox.bootstrap.private_directories import make_data_dir

    data_dir = settings.server.data_dir.absolute()
    return TokenFile(make_data_dir(data_dir) if makes_directory else data_dir)


def _token_json(record: StoredToken) -> dict[str, Any]:
    from sandbox.model.display_text import format_timestamp

    return {
        "id": record.id,
        "role": record.role.value,
        "name": record.name,
        "created_at": format_timestamp(record.created_at),
        "expires_at": format_timestamp(record.expires_at) if record.expires_at is not None else None,
    }


def _print_tokens(records: Any) -> None:
    from sandbox.cli.output.table import cell, print_table

    now = datetime.now(UTC)
    rows = [[cell(text) for text in _cells(record, now)] for record in records]
    options = current_options()
    columns = ("ID", "ROLE", "NAME", "CREATED", "EXPIRES")
    console = stdout_console(has_color=options.has_color)
    print_table(console, columns, rows, has_border=options.format == "table", omittable=("NAME",))


def _cells(record: StoredToken, now: datetime) -> tuple[str, ...]:
    summary = _token_json(record)
    expires = summary["expires_at"] or "never"
    if not record.is_valid(now):
        expires = f"expired {expires}"
    return record.id, summary["role"], record.name, summary["created_at"], expires
