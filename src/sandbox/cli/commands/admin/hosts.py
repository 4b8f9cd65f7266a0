"""The `sandbox admin hosts` command."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.options import common_options, current_options
from sandbox.cli.output.console import print_json, stdout_console
from sandbox.cli.output.formatting import format_age
from sandbox.cli.output.table import cell, print_table
from sandbox.model.display_text import format_size

if TYPE_CHECKING:
    from rich.text import Text

    from sandbox.client.response_types import Host

_COLUMNS = ("NAME", "STATE", "CPUS", "MEMORY", "TASKS", "CONTACT", "VERSION", "REASON")


@command(epilog=help_examples("sandbox admin hosts", "sandbox admin hosts -f json"))
@common_options
def hosts() -> None:
    """List the hosts that run tasks.

    Without a cluster, the list contains only the server's machine. With a cluster, the list contains the hosts of the
    cluster engine and the hosts on which workers have run. TASKS is the number of tasks that run on the host. CONTACT
    is the time since a worker on the host last sent a message. No further tasks start on a host that is drained
    (sandbox admin drain --host).
    """
    options = current_options()
    with options.connect() as client:
        response = client.hosts()
    if options.format == "json":
        print_json(response)
    elif response["hosts"]:
        now = datetime.now(UTC)
        print_table(
            stdout_console(has_color=options.has_color),
            _COLUMNS,
            [_row(host, now) for host in response["hosts"]],
            has_border=options.format == "table",
            omittable=("REASON", "VERSION", "MEMORY", "CPUS"),
        )
    else:
        click.echo("No hosts yet. The engine has not listed its hosts, and no worker has started.", err=True)


def _row(host: Host, now: datetime) -> list[Text]:
    cpus, memory_bytes, last_contact_at = host["cpus"], host["memory_bytes"], host["last_contact_at"]
    return [
        cell(text)
        for text in (
            host["name"],
            host["state"].replace("_", " ") + (", drained" if host.get("draining_since") else ""),
            "" if cpus is None else str(cpus),
            "" if memory_bytes is None else format_size(memory_bytes),
            str(host["running"]),
            format_age(last_contact_at, now) if last_contact_at else "",
            host["version"] or "",
            host["reason"],
        )
    ]
