"""`sandbox task validate`"""

from __future__ import annotations

import sys
from typing import BinaryIO

import click

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.manifest_file import ManifestFile, details, mistake_lines
from sandbox.cli.options import chosen, output_options
from sandbox.cli.output.formatting import counted
from sandbox.cli.output.json_output import print_json
from sandbox.cli.output.text import visible, window_cells, wrapped


@click.command()
@click.argument("file", type=click.File("rb"))
@output_options("text", "json")
def validate(file: BinaryIO) -> None:
    """Check a manifest without a server.

    FILE is YAML or JSON; '-' stands for stdin. Prints every mistake with its place.
    Exit code: 0 without mistakes, 9 with some.
    """
    from sandbox.model.manifest.errors import InvalidManifestError
    from sandbox.model.manifest.parser import OFFERED_PROFILES

    manifest = ManifestFile.read(file)
    mistakes = []
    profile = ""
    try:
        profile = manifest.parse().vm.profile
    except InvalidManifestError as error:
        mistakes = details(error.mistakes)
    if chosen().format == "json":
        print_json({"valid": not mistakes, "details": mistakes})
    for line in mistake_lines(manifest.name, mistakes) if chosen().format != "json" else ():
        click.echo("\n".join(wrapped(line, window_cells(sys.stdout), "  ")))
    if mistakes:
        fail(f"Error: {visible(manifest.name)} has {counted(len(mistakes), 'mistake')}.", ExitCode.INVALID_MANIFEST)
    click.echo(f"{visible(manifest.name)} is a valid manifest.", err=True)
    if profile not in OFFERED_PROFILES:
        click.echo(f"Only the server can say whether it offers the profile {visible(profile)}.", err=True)
