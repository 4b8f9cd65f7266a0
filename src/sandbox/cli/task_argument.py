"""The argument TASK_ID, which shells complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sandbox.cli.options import chosen
from sandbox.cli.visible import visible

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

SERVER_SECONDS = 2.0
"""Who pressed a key does not wait longer for an answer."""

OFFERED_MAX = 100


def _latest(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from sandbox.client import Client, ClientError

    options = chosen(ctx)
    try:
        with Client(options.server, options.token, timeout_seconds=SERVER_SECONDS) as client:
            tasks = client.tasks(limit=OFFERED_MAX)["tasks"]
    except ClientError:
        return []  # a completion has nowhere to complain
    described = {task["id"]: f"{task['state']}  {task['name']}" for task in tasks}
    # An id that would not show as it is must not come into a command line either.
    offered = [task_id for task_id in described if task_id.startswith(incomplete) and visible(task_id) == task_id]
    return [CompletionItem(task_id, help=visible(described[task_id])) for task_id in offered]


task_argument = click.argument("task_id", metavar="TASK_ID", shell_complete=_latest)
"""The decorator that adds it."""
