"""The `sandbox task list` command."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.options import common_options, current_options, parse_past_time_option
from sandbox.cli.output.console import print_json, stdout_console
from sandbox.cli.output.event_printer import STATE_STYLES
from sandbox.cli.output.formatting import (
    failure_text,
    format_age,
    format_changes,
    name_text,
    pluralize,
    shorten_ids,
    state_text,
    task_duration,
)
from sandbox.cli.output.table import cell, print_table
from sandbox.cli.task_arguments import find_task_id
from sandbox.model.display_text import format_cost
from sandbox.model.errors import closest_name, with_suggestion
from sandbox.model.repository_urls import short_repository
from sandbox.model.task_state import OUTCOMES, TaskState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console
    from rich.text import Text

    from sandbox.cli.options import CliOptions
    from sandbox.client import Client
    from sandbox.client.response_types import TaskPage, TaskSummary

PAGE_TASKS_MAX = 1000
_COLUMNS = ("ID", "STATE", "AGE", "NAME", "REPOSITORY", "CHANGES", "DURATION", "COST", "LABELS", "REASON")
_OMITTABLE_COLUMNS = ("LABELS", "DURATION", "REASON", "REPOSITORY", "CHANGES", "COST", "AGE", "NAME")
SORTS = ("created_at", "started_at", "state_changed_at", "name", "cost")


def _parse_labels(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    labels: dict[str, str] = {}
    for key, equals, value in pairs:
        if not key or not equals:
            raise click.BadParameter("must be KEY=VALUE, such as team=platform")
        if labels.setdefault(key, value) != value:
            raise click.BadParameter(f"{key} can have only one value; give it once")
    return labels


def _parse_states(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[str]:
    states = [state.strip() for value in values for state in value.split(",")]
    for state in states:
        if state not in set(TaskState):
            raise click.BadParameter(_unknown_value(state, "state", list(TaskState)))
    return list(dict.fromkeys(states))


def _parse_outcomes(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[str]:
    outcomes = [outcome.strip() for value in values for outcome in value.split(",")]
    for outcome in outcomes:
        if outcome not in OUTCOMES:
            raise click.BadParameter(_unknown_value(outcome, "outcome", list(OUTCOMES)))
    return outcomes


def _suggest_search(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Reject `--query`, the name of the API's parameter, with a suggestion."""
    if value is not None:
        raise click.NoSuchOption("--query", "No such option '--query'. Did you mean '--search'?", ctx=ctx)


def _unknown_value(value: str, kind: str, known: Sequence[str]) -> str:
    suggestion = closest_name(value, known)
    message = f"unknown {kind} {value!r}"
    return with_suggestion(message, suggestion) if suggestion else f"{message}; the {kind}s are {', '.join(known)}"


@command(
    "list",
    epilog=help_examples(
        "sandbox task list --state running,pending",
        'sandbox task list -q "flaky login" --repo org/app --since 7d',
        "sandbox task list --label team=platform --sort cost --totals",
    ),
    context_settings={"allow_extra_args": True},
)
@click.option(
    "--state",
    "states",
    metavar="STATE",
    multiple=True,
    callback=_parse_states,
    help=f"Only tasks in these states ({', '.join(TaskState)}), separated by commas; may be repeated. failed includes "
    "failed_preserved.",
)
@click.option(
    "--outcome",
    "outcomes",
    metavar="OUTCOME",
    multiple=True,
    callback=_parse_outcomes,
    help=f"Only tasks with these outcomes ({', '.join(OUTCOMES)}), separated by commas; may be repeated.",
)
@click.option(
    "--label",
    "labels",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_parse_labels,
    help="Only tasks with this label; may be repeated.",
)
@click.option(
    "--search",
    "-q",
    metavar="WORDS",
    help="Only tasks with all of these words in their name, id, prompt or repository. The start of a word is enough.",
)
@click.option("--query", expose_value=False, hidden=True, is_flag=False, flag_value="", callback=_suggest_search)
@click.option(
    "--repo",
    "--repository",
    "repository",
    metavar="REPOSITORY",
    help="Only tasks of this repository: URL, OWNER/NAME or NAME.",
)
@click.option("--parent", metavar="TASK_ID", help="Only tasks that continue this task.")
@click.option("--rerun-of", metavar="TASK_ID", help="Only reruns of this task.")
@click.option(
    "--since",
    "created_after",
    metavar="TIME",
    callback=parse_past_time_option,
    help="Only tasks submitted since this time (RFC 3339), or within this duration, such as 2h.",
)
@click.option(
    "--until",
    "created_before",
    metavar="TIME",
    callback=parse_past_time_option,
    help="Only tasks submitted before this time, or longer ago than this duration.",
)
@click.option("--limit", type=click.IntRange(1, PAGE_TASKS_MAX), help="Maximum number of tasks [default: 100]")
@click.option("--all", "lists_all", is_flag=True, help="List all matching tasks.")
@click.option(
    "--sort",
    type=click.Choice(SORTS),
    help="Sort key. Times: latest first; names: from A to Z; cost: most expensive first.",
)
@click.option("--totals", "has_totals", is_flag=True, help="Also show the number and the cost of all matching tasks.")
@click.option("--no-trunc", "shows_full_ids", is_flag=True, help="Show full ids on a terminal.")
@common_options
def list_tasks(
    limit: int | None, lists_all: bool, sort: str | None, has_totals: bool, shows_full_ids: bool, **filters: Any
) -> None:
    """List tasks, newest first.

    On a terminal, generated ids are shortened, ↻ marks a rerun, and ↳ marks a task that continues another task. The
    mark is followed by the beginning of the prompt, unless the prompt begins with the task's name. If the window is too
    narrow for the REASON column, the cause of a failure is printed below the task. Commands accept the shortened ids.

    If the output is piped, ids are complete, and the REASON column contains the error code. With --format json, ids are
    complete.
    """
    if lists_all and limit is not None:
        raise click.UsageError("--limit cannot be combined with --all.")
    if filters["states"] and filters["outcomes"]:
        raise click.UsageError("--state cannot be combined with --outcome.")
    if words := click.get_current_context().args:
        raise click.UsageError(f"Search for words with -q: sandbox task list -q {shlex.quote(' '.join(words))}")
    options = current_options()
    for relation in ("parent", "rerun_of"):
        if filters[relation]:
            filters[relation] = find_task_id(options.connect, filters[relation])
    query = {**filters, "sort": sort, "order": "asc" if sort == "name" else None}
    with options.connect() as client:
        first_page = client.tasks(limit=PAGE_TASKS_MAX if lists_all else limit, totals=has_totals, **query)
        page = _all_pages(client, first_page, query) if lists_all else first_page
    if options.format == "json":
        print_json(page)
        return
    if page["tasks"]:
        _print_tasks(page["tasks"], options, shows_full_ids=shows_full_ids)
    _print_omitted_count(page, is_filtered=any(filters.values()))
    if totals := page.get("totals"):
        click.echo(f"Total: {pluralize(totals['tasks'], 'task')}, {format_cost(totals['cost_usd'])}", err=True)


def _print_tasks(tasks: Sequence[TaskSummary], options: CliOptions, *, shows_full_ids: bool) -> None:
    console = stdout_console(has_color=options.has_color)
    on_terminal, has_border = console.is_terminal, options.format == "table"
    columns: Sequence[str] = _COLUMNS
    ids = shorten_ids(task["id"] for task in tasks) if on_terminal and not shows_full_ids else {}
    rows = [_cells(task, ids.get(task["id"], task["id"]), on_terminal=on_terminal) for task in tasks]
    if on_terminal and (repository := _common_repository(tasks)):
        columns = [name for name in columns if name != "REPOSITORY"]
        console.print(cell(f"Repository: {repository}", "dim"), soft_wrap=True)
    reasons: list[str] = []
    if on_terminal and not has_border and not _fits(console, columns, rows):
        columns = [name for name in columns if name != "REASON"]
        reasons = [row["REASON"].plain for row in rows]
    print_table(
        console,
        columns,
        [[row[name] for name in columns] for row in rows],
        has_border=has_border,
        omittable=_OMITTABLE_COLUMNS,
        never_truncated=("AGE",),
        notes=reasons,
    )


def _common_repository(tasks: Sequence[TaskSummary]) -> str:
    """Return the short name of the repository that all tasks share; empty if the names differ."""
    names = {_short_repository(task) for task in tasks}
    return names.pop() if len(names) == 1 else ""


def _fits(console: Console, columns: Sequence[str], rows: Sequence[Mapping[str, Text]]) -> bool:
    """Return whether the table fits without truncating a column."""
    # Columns without any value are not printed.
    widths = [max(row[name].cell_len for row in rows) for name in columns]
    printed = [max(width, len(name)) for name, width in zip(columns, widths, strict=True) if width]
    return sum(printed) + 2 * (len(printed) - 1) <= console.width


def _all_pages(client: Client, first_page: TaskPage, query: dict[str, Any]) -> TaskPage:
    page, tasks, cursor = first_page, [*first_page["tasks"]], first_page["next_cursor"]
    while cursor is not None:
        page = client.tasks(limit=PAGE_TASKS_MAX, cursor=cursor, **query)
        tasks += page["tasks"]
        cursor = page["next_cursor"] if page["tasks"] else None
    return {**first_page, "tasks": tasks, "limit": len(tasks), "offset": 0, "has_more": False, "next_cursor": None}


def _cells(task: TaskSummary, shown_id: str, *, on_terminal: bool) -> dict[str, Text]:
    """Return the cells of a task, keyed by column."""
    return {
        "ID": cell(shown_id),
        "STATE": cell(state_text(task, on_terminal=on_terminal), STATE_STYLES.get(task["state"], "")),
        "AGE": cell(format_age(task["created_at"], datetime.now(UTC))),
        "NAME": cell(name_text(task, on_terminal=on_terminal)),
        "REPOSITORY": cell(_short_repository(task)),
        "CHANGES": cell(format_changes(task)),
        "DURATION": cell(task_duration(task)),
        "COST": cell(_cost(task)),
        "LABELS": cell(",".join(f"{key}={value}" for key, value in task["labels"].items())),
        "REASON": cell(failure_text(task, on_terminal=on_terminal)),
    }


def _short_repository(task: TaskSummary) -> str:
    """Return the short name of the repository; empty if the server does not send the URL."""
    return short_repository(task.get("repository", ""))


def _cost(task: TaskSummary) -> str:
    cost_usd = task["progress"]["cost_usd"]
    return format_cost(cost_usd) if cost_usd else ""


def _print_omitted_count(page: TaskPage, *, is_filtered: bool) -> None:
    shown_count, total = len(page["tasks"]), page["total_count"]
    if not total:
        click.echo("No such tasks." if is_filtered else "No tasks yet.", err=True)
    elif shown_count < total:
        click.echo(f"{shown_count:,} of {pluralize(total, 'task')}; see more with --limit, or --all.", err=True)
