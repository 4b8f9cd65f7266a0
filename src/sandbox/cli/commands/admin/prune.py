"""The `sandbox admin prune` command."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import click

from sandbox.cli.click_extensions import command, confirm, help_examples, require_terminal_for_prompt
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import current_options, output_options, server_options
from sandbox.cli.output.console import escape_name, escape_text, print_json
from sandbox.cli.output.formatting import pluralize, state_text
from sandbox.cli.settings_options import data_dir_options, load_configuration
from sandbox.model.display_text import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandbox.client.response_types import Pruned, PrunedTask


def _parse_age_option(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    from sandbox.bootstrap.settings.schema import AGE, UNLIMITED, parse_age

    return None if value is None else parse_age(_check_limit(value, AGE.find_error(value), UNLIMITED))


def _parse_size_option(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    from sandbox.bootstrap.settings.schema import DISK_SIZE, UNLIMITED, parse_disk_size

    return None if value is None else parse_disk_size(_check_limit(value, DISK_SIZE.find_error(value), UNLIMITED))


def _check_limit(value: str, error: str | None, unlimited: str) -> str:
    """Reject `unlimited`: to set no limit, users omit the option."""
    if error is not None or value == unlimited:
        raise click.BadParameter((error or "omit the option for no limit").removesuffix(f", or {unlimited}"))
    return value


@command(
    epilog=help_examples(
        "sandbox admin prune --older-than 30d --dry-run",
        "sandbox admin prune --keep 1000",
    )
)
@click.option(
    "--older-than",
    metavar="AGE",
    callback=_parse_age_option,
    help="Remove tasks that ended longer ago than this, such as 30d.",
)
@click.option(
    "--keep", type=click.IntRange(min=1), help="Number of finished tasks to keep; the oldest tasks are removed."
)
@click.option(
    "--max-bytes",
    metavar="SIZE",
    callback=_parse_size_option,
    help="Maximum disk space for all finished tasks, such as 20G.",
)
@click.option("--dry-run", is_flag=True, help="Only list the tasks that would be removed.")
@click.option("--offline", is_flag=True, help="Work directly on the data directory; fails if a server is using it.")
@click.option("--yes", "-y", is_flag=True, help="Do not prompt.")
@data_dir_options
@server_options
@output_options("text", "json")
def prune(
    *,
    older_than: int | None,
    keep: int | None,
    max_bytes: int | None,
    dry_run: bool,
    offline: bool,
    yes: bool,
    **options: Any,
) -> None:
    """Remove finished tasks and all their data.

    The oldest tasks are removed first. Unfinished tasks and tasks with a preserved sandbox are never removed. Without
    --older-than, --keep and --max-bytes, the limits in the [retention] section of sandbox.toml apply, which a running
    server also applies periodically. By default, the running server removes the tasks. With --offline, the command
    removes them itself. The command prompts for confirmation before it removes tasks. Without a terminal, --yes is
    required.
    """
    if not yes and not dry_run:
        require_terminal_for_prompt("Remove the tasks")
    if not offline and any(value is not None for value in options.values()):
        message = "--data-dir and --config require --offline; add --offline, or set a server with --server."
        raise click.UsageError(message)
    limits = {"older_than_seconds": older_than, "keep": keep, "max_bytes": max_bytes}
    remove = partial(_prune_offline, limits, options) if offline else partial(_prune_on_server, limits)
    if not yes and not dry_run:
        _confirm(remove(dry_run=True))
    result = remove(dry_run=dry_run)
    if current_options().format == "json":
        print_json(result)
    else:
        _print_result(result, dry_run=dry_run, is_limited=any(limit is not None for limit in limits.values()))


def _confirm(expected: Pruned) -> None:
    """Ask whether to remove these tasks; exit if the user declines. Does nothing without a task."""
    count = expected["total_count"]
    if not count:
        return
    subject = f"{pluralize(count, 'task')} and {'its' if count == 1 else 'their'} data"
    size = format_size(expected["total_size_bytes"])
    if not confirm(f"Remove {subject} ({size})?", default=False):
        fail("No task was removed.", ExitCode.INTERRUPTED)


def _prune_on_server(limits: Mapping[str, int | None], *, dry_run: bool) -> Pruned:
    with current_options().connect() as client:
        older_than, keep, max_bytes = limits["older_than_seconds"], limits["keep"], limits["max_bytes"]
        return client.prune(older_than_seconds=older_than, keep=keep, max_bytes=max_bytes, dry_run=dry_run)


def _print_result(result: Pruned, *, dry_run: bool, is_limited: bool) -> None:
    for task in result["tasks"]:
        size = format_size(task["size_bytes"])
        # A task is never removed while its sandbox is preserved, so the sandbox was released or has expired.
        state = state_text({**task, "sandbox_kept": False}, on_terminal=sys.stdout.isatty())
        texts = [escape_text(text) for text in (task["id"], state, task["finished_at"], size)]
        name = task.get("name")  # older servers do not send it
        click.echo("  ".join([*texts, escape_name(name)] if name else texts))
    verb, size = "Would remove" if dry_run else "Removed", format_size(result["total_size_bytes"])
    advice = "" if result["total_count"] or is_limited else " Choose tasks with --older-than, --keep or --max-bytes."
    click.echo(f"{verb} {pluralize(result['total_count'], 'task')}, {size}.{advice}", err=True)
    if unexamined := result.get("unexamined"):  # older servers do not send them
        lines = [f"  {escape_text(task['id'])}: {escape_text(task['reason'])}" for task in unexamined]
        noun = pluralize(len(lines), "task")
        click.echo("\n".join([f"Would keep {noun}, because the data cannot be examined:", *lines]), err=True)


def _prune_offline(limits: Mapping[str, int | None], options: Mapping[str, Any], *, dry_run: bool) -> Pruned:
    settings = load_configuration(options).settings
    from sandbox.bootstrap.data_dir_maintenance import prune_data_dir
    from sandbox.interfaces.server_services import Retention
    from sandbox.model.display_text import format_timestamp

    is_limited = any(limit is not None for limit in limits.values())
    retention = Retention(**limits) if is_limited else settings.retention.retention
    result = prune_data_dir(settings.server.data_dir.absolute(), retention, dry_run=dry_run)
    tasks = [
        cast("PrunedTask", {**asdict(one), "finished_at": format_timestamp(one.finished_at)}) for one in result.tasks
    ]
    return {
        "dry_run": dry_run,
        "tasks": tasks,
        "total_count": len(tasks),
        "total_size_bytes": sum(one.size_bytes for one in result.tasks),
        "unexamined": [{"id": task_id, "reason": reason} for task_id, reason in result.unexamined.items()],
    }
