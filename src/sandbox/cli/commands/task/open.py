"""The `sandbox task open` command."""

from __future__ import annotations

import os
import sys

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.options import common_options, current_options
from sandbox.cli.output.console import escape_text, print_json
from sandbox.cli.task_arguments import task_argument


@command("open", epilog=help_examples("sandbox task open 5e173eb5"))
@task_argument
@click.option("--no-browser", "prints_only", is_flag=True, help="Print the URL, but do not open it.")
@common_options
def open_task(task_id: str, prints_only: bool) -> None:
    """Open a task's dashboard page in the browser.

    Prints the URL on stdout. Without a graphical display, the command only prints the URL, unless BROWSER is set.
    """
    from sandbox.client.requests import task_page_url

    options = current_options()
    with options.connect() as client:
        task = client.status(task_id)
    url = task_page_url(options.server, task["id"])
    if options.format == "json":
        print_json({"task_id": task["id"], "url": url})
    else:
        click.echo(escape_text(url))
    sys.stdout.flush()
    if not prints_only and _has_browser() and not _open(url):
        click.echo("The browser could not be started; open the URL above.", err=True)


def _has_browser() -> bool:
    """Return whether a browser can open without taking over the terminal, as a text browser would."""
    has_display = sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return has_display or bool(os.environ.get("BROWSER"))


def _open(url: str) -> bool:
    import webbrowser

    try:
        return webbrowser.open(url)
    except webbrowser.Error:
        return False
