"""The `sandbox task diff` command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from sandbox.cli.checkout.downloaded_patch import CHAIN_HELP, fetch_patch
from sandbox.cli.checkout.patch_output import colorize, patch_lines, print_changed_files, summarize_binary_files
from sandbox.cli.checkout.user_checkout import count_lines
from sandbox.cli.command_groups import command, help_examples
from sandbox.cli.options import allow_secrets_option, common_options, current_options
from sandbox.cli.output.console import stdout_console
from sandbox.cli.output.json_output import print_json
from sandbox.cli.output.terminal_text import escape_text
from sandbox.cli.task_arguments import task_argument

GIT_TIMEOUT_SECONDS = 10.0
_TRUE_VALUES = {"", "true", "yes", "on", "1"}
_FALSE_VALUES = {"false", "no", "off", "0"}


def show_paged(lines: Iterable[str]) -> None:
    """Show lines on the terminal with git's pager for diffs: GIT_PAGER, pager.diff, core.pager, PAGER, or `less`."""
    pager = find_pager()
    if pager is None:
        for line in lines:
            click.echo(line, color=True)
        return
    # git's default options for less: show colors, and exit if the text fits on one screen
    environment = {"LESS": "FRX", "LV": "-c", **os.environ}
    # Use a shell, as git does: `diff-so-fancy | less` is a common value. This is safe, because only the user can set
    # the pager.
    paging = subprocess.Popen(["/bin/sh", "-c", pager], stdin=subprocess.PIPE, env=environment)
    try:
        assert paging.stdin is not None
        with suppress(BrokenPipeError), paging.stdin as stdin:  # the user may quit the pager early
            for line in lines:
                stdin.write(line.encode(errors="replace") + b"\n")
    finally:
        _wait_for_pager(paging)


def find_pager() -> str | None:
    """Return the pager's command line; None if git would not use a pager."""
    configured = _git_output("config", "--get", "pager.diff")
    if configured is not None and configured.lower() in _FALSE_VALUES:
        return None
    is_command = configured is not None and configured.lower() not in _TRUE_VALUES
    pager = configured if is_command and "GIT_PAGER" not in os.environ else _git_output("var", "GIT_PAGER")
    return None if pager in {None, "", "cat"} else pager


def _git_output(*arguments: str) -> str | None:
    """Return git's output; None if git fails or is not installed."""
    try:
        completed = subprocess.run(
            ["git", *arguments],  # noqa: S607
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.decode(errors="replace").strip() if completed.returncode == 0 else None


def _wait_for_pager(paging: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            paging.wait()  # until the user quits it
        except KeyboardInterrupt:
            continue  # the pager, which shares the terminal, handles ^C
        return


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
            print_changed_files(count_lines(patch), stdout_console(has_color=options.has_color), has_total=True)
        elif sys.stdout.isatty():
            show_paged(colorize(summarize_binary_files(patch_lines(patch)), has_color=options.has_color))
        else:
            with patch.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
