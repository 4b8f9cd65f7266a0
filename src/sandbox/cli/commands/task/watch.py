"""The `sandbox task watch` command."""

from __future__ import annotations

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.options import common_options, current_options
from sandbox.cli.output.console import print_json_lines, stdout_console
from sandbox.cli.output.event_lines import TimedLinePrinter


@command(
    epilog=help_examples(
        "sandbox task watch",
        "sandbox task watch --format json",
    )
)
@click.option("--after", metavar="POSITION", help="Continue after the event that had this position in the JSON output.")
@common_options
def watch(after: str | None) -> None:
    """Print state changes of all tasks until interrupted.

    The command uses one connection for all tasks. With --format json, each line is an event, and the field position
    contains its position, which --after accepts.
    """
    options = current_options()
    with options.connect() as client:
        changes = client.follow_states(after=after)
        if options.format == "json":
            print_json_lines({**event, "position": position} for position, event in changes)
            return
        printer = TimedLinePrinter(stdout_console(has_color=options.has_color))
        for _, event in changes:
            if event["type"] == "state_change":
                printer.print_state(event, event["new_state"], f"{event['task_id']}  {event['state_message']}")
