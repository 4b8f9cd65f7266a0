"""The `sandbox task validate` command."""

from __future__ import annotations

import sys
from typing import BinaryIO

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import current_options, output_options
from sandbox.cli.output.console import escape_text, print_json, terminal_width, wrap_text
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.submission import ManifestFile, field_error_details, field_error_lines


@command(epilog=help_examples("sandbox task validate task.yaml"))
@click.argument("file", type=click.File("rb"))
@output_options("text", "json")
def validate(file: BinaryIO) -> None:
    """Validate a manifest without a server.

    FILE is YAML or JSON; '-' means stdin. Prints every error with its line and column. Exit code: 0 if the manifest is
    valid, otherwise 9.
    """
    from sandbox.model.errors import InvalidManifestError
    from sandbox.model.manifest.parser import SHIPPED_PROFILES

    manifest = ManifestFile.read(file)
    field_errors = []
    profile = ""
    try:
        profile = manifest.parse().vm.profile
    except InvalidManifestError as error:
        field_errors = field_error_details(error.errors)
    if current_options().format == "json":
        print_json({"valid": not field_errors, "details": field_errors})
    for line in field_error_lines(manifest.name, field_errors) if current_options().format != "json" else ():
        click.echo("\n".join(wrap_text(line, terminal_width(sys.stdout), "  ")))
    if field_errors:
        fail(
            f"Error: {escape_text(manifest.name)} has {pluralize(len(field_errors), 'error')}.",
            ExitCode.INVALID_MANIFEST,
        )
    click.echo(f"{escape_text(manifest.name)} is a valid manifest.", err=True)
    if profile not in SHIPPED_PROFILES:
        click.echo(f"Only the server can check whether the profile {escape_text(profile)} exists.", err=True)
