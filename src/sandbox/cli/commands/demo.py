"""The command `sandbox demo`."""

from __future__ import annotations

from importlib import import_module

import click

from sandbox.cli.help_examples import help_examples


@click.command(epilog=help_examples("sandbox demo"))
def demo() -> None:
    """Run an example task from manifest to patch.

    Starts a separate server on free ports and stops it at the end. Without a model key, a scripted model replaces the
    API.
    """
    # Import by name: the demo package belongs to a layer above the CLI, which therefore must not import it statically.
    code = import_module("sandbox.demo.walkthrough").run()
    raise click.exceptions.Exit(code or 0)
