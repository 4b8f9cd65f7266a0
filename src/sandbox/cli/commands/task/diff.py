"""The `sandbox task diff` command."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from sandbox.cli.checkout.patch_application import read_changed_files
from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.options import allow_secrets_option, common_options, current_options
from sandbox.cli.output.console import escape_text, print_json, stdout_console
from sandbox.cli.patches import (
    CHAIN_HELP,
    colorize,
    fetch_patch,
    patch_lines,
    print_changed_files,
    show_paged,
    summarize_binary_files,
)
from sandbox.cli.task_arguments import task_argument


@command(
    epilog=help_examples(
        "sandbox task diff 5e173eb5",
        "sandbox task diff 5e173eb5 --chain",
        "sandbox task diff 5e173eb5 --stat",
        note="Apply the patch to a checkout with: sandbox task apply TASK_ID",
    )
)
@task_argument
@click.option("--chain", "includes_chain", is_flag=True, help=CHAIN_HELP)
@click.option("--stat", is_flag=True, help="Print only the changed files and their numbers of changed lines.")
@allow_secrets_option
@common_options
def diff(task_id: str, includes_chain: bool, stat: bool, allows_secrets: bool) -> None:
    """Show a task's changes as a patch.

    On a terminal, the patch is colored and shown in git's pager, with one line for each binary file. If the output is
    piped, the patch is printed unchanged, so that git apply can read it.
    """
    options = current_options()
    with TemporaryDirectory() as directory:
        patch = Path(directory) / "patch"
        with options.connect() as client:
            is_chain = includes_chain and client.status(task_id).get("parent") is not None
            fetch_patch(client, task_id, patch, allows_secrets=allows_secrets, is_chain=is_chain)
        if options.format == "json":
            print_json({"task_id": task_id, "patch": patch.read_bytes().decode(errors="replace")})
        elif not patch.stat().st_size:
            click.echo(f"Task {escape_text(task_id)} changed nothing.", err=True)
        elif stat:
            print_changed_files(read_changed_files(patch), stdout_console(has_color=options.has_color), has_total=True)
        elif sys.stdout.isatty():
            show_paged(colorize(summarize_binary_files(patch_lines(patch)), has_color=options.has_color))
        else:
            with patch.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
