"""The TASK_ID arguments of commands, and a request for each of these tasks.

An argument is the id of a task or the beginning of a generated id. An id that a user chose must be complete: `fix-1`
must not become `fix-10` after the task `fix-1` has been removed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import click

from sandbox.cli.errors import ExitCode, fail, print_error
from sandbox.cli.options import current_options
from sandbox.cli.output.console import escape_name, escape_text, print_json, terminal_width
from sandbox.cli.output.formatting import pluralize, state_text
from sandbox.model.task_names_and_ids import is_generated_id, is_generated_id_prefix, is_task_id

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from sandbox.cli.options import CliOptions
    from sandbox.client import Client, ClientError, TaskNotFoundError
    from sandbox.client.response_types import TaskSummary


_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])

COMPLETION_TIMEOUT_SECONDS = 2.0
"""Time limit for one shell completion, and for the search for a similar id."""

COMPLETIONS_MAX = 100

PREFIX_CHARACTERS_MIN = 4
CANDIDATES_MAX = 10
"""Maximum number of tasks to list for an ambiguous prefix."""

SUGGESTIONS_MAX = 3
"""Maximum number of ids to suggest for the beginning of an id that a user chose."""

_PAGE_TASKS = 200
_PAGES_MAX = 10
_NAME_CELLS_MAX = 60


def task_argument(command: _Decorated) -> _Decorated:
    """Add the TASK_ID argument. The command gets the task's full id, even if only its beginning is given."""

    @wraps(command)
    def run_command(*, task_id: str, **parameters: Any) -> Any:
        from sandbox.client import TaskNotFoundError

        try:
            return command(task_id=find_task_id(current_options().connect, task_id), **parameters)
        except TaskNotFoundError as error:
            if "/" in task_id:  # not the id of any task
                raise
            _fail_not_found(error, task_id)

    argument = click.argument("task_id", metavar="TASK_ID", shell_complete=_complete_task_id)
    return argument(cast("_Decorated", run_command))


def task_arguments(command: _Decorated) -> _Decorated:
    """Add the argument TASK_ID, which accepts several ids. The command gets the full ids, without duplicates."""

    @wraps(command)
    def run_command(*, task_ids: Sequence[str], **parameters: Any) -> Any:
        from sandbox.client import TaskNotFoundError

        found = list(dict.fromkeys(find_task_id(current_options().connect, task_id) for task_id in task_ids))
        try:
            return command(task_ids=found, **parameters)
        except TaskNotFoundError as error:
            if len(task_ids) > 1 or "/" in task_ids[0]:
                raise
            _fail_not_found(error, task_ids[0])

    argument = click.argument(
        "task_ids", metavar="TASK_ID...", nargs=-1, required=True, shell_complete=_complete_task_id
    )
    return argument(cast("_Decorated", run_command))


def find_task_id(connect: Callable[[], Client], text: str) -> str:
    """Return `text` if it is the id of a task, otherwise the only generated id that begins with `text`.

    Returns `text` itself if there is no such task: the server then reports the error. Exits with an error if several
    ids begin with `text`, or if `text` is too short to search for. Raises ClientError.
    """
    if not is_generated_id_prefix(text):
        return text
    from sandbox.client import InvalidRequestError, TaskNotFoundError

    with connect() as client:
        try:
            client.status(text)  # ignore the id in the response: commands use ids as file names
        except TaskNotFoundError:
            if len(text) < PREFIX_CHARACTERS_MIN:
                advice = f"Give at least {PREFIX_CHARACTERS_MIN} characters of a generated id."
                fail(f"Error: There is no such task. {advice}", ExitCode.NOT_FOUND)
            with suppress(InvalidRequestError):  # an older server cannot search
                return _find_by_prefix(client, text)
    return text


def _fail_not_found(error: TaskNotFoundError, task_id: str) -> NoReturn:
    """Exit with the error, the latest tasks with similar ids, and the command that lists all tasks."""
    similar = _similar_ids(task_id, [task["id"] for task in _latest_tasks(current_options())])
    question = f" Did you mean {' or '.join(map(escape_text, similar))}?" if similar else ""
    sentence = error.message.partition("; list the tasks")[0].removesuffix(".")
    message = f"Error: {escape_text(sentence)}.{question}\n  List the tasks: sandbox task list"
    fail(message, ExitCode.NOT_FOUND)


def _similar_ids(text: str, task_ids: Sequence[str]) -> list[str]:
    """Return the first ids that begin with the text, otherwise the most similar id."""
    from difflib import get_close_matches

    beginning = [task_id for task_id in task_ids if task_id.startswith(text)]
    return beginning[:SUGGESTIONS_MAX] or get_close_matches(text, task_ids, n=1)


def _latest_tasks(options: CliOptions) -> Sequence[TaskSummary]:
    """Return the latest tasks; empty if the server does not respond quickly."""
    from sandbox.client import Client
    from sandbox.model.errors import SandboxError

    try:
        with Client(options.server, options.token, timeout_seconds=COMPLETION_TIMEOUT_SECONDS) as client:
            return client.tasks(limit=COMPLETIONS_MAX)["tasks"]
    except (SandboxError, OSError):
        return ()


def _find_by_prefix(client: Client, prefix: str) -> str:
    """Search for the words in the prefix, because the API searches by word.

    Other tasks' prompts may contain these words.
    """
    found: list[TaskSummary] = []
    cursor = None
    for _ in range(_PAGES_MAX):
        page = client.tasks(search=prefix, limit=_PAGE_TASKS, cursor=cursor)
        found += [task for task in page["tasks"] if _begins_with(task["id"], prefix)]
        cursor = page["next_cursor"]
        if cursor is None or len(found) > CANDIDATES_MAX:
            break
    if len(found) > 1:
        _fail_ambiguous(prefix, found, is_complete=cursor is None)
    if cursor is not None:
        message = f"Error: Too many tasks match {prefix!r} to find the ids that begin with it. Give the full id."
        fail(message, ExitCode.USAGE)
    return found[0]["id"] if found else prefix


def _begins_with(task_id: str, prefix: str) -> bool:
    return task_id.startswith(prefix) and is_generated_id(task_id)


def _fail_ambiguous(prefix: str, found: Sequence[TaskSummary], *, is_complete: bool) -> NoReturn:
    shown = found[:CANDIDATES_MAX]
    count = f"{len(found)} tasks" if is_complete else f"At least {len(found)} tasks"
    states = [state_text(task, on_terminal=sys.stderr.isatty()) for task in shown]
    id_width, state_width = max(len(task["id"]) for task in shown), max(map(len, states))
    lines = [f"Error: {count} have an id that begins with {prefix!r}. Give more characters of the id:"]
    for task, state in zip(shown, states, strict=True):
        start = f"  {escape_text(task['id']):<{id_width}}  {escape_text(state):<{state_width}}  "
        width = max((terminal_width(sys.stderr) or sys.maxsize) - len(start), 0)
        lines.append(start + _shorten(escape_name(task["name"]), min(width, _NAME_CELLS_MAX)))
    if omitted := len(found) - len(shown):
        lines.append(f"  … and {pluralize(omitted, 'more task')}" if is_complete else "  …")
    fail("\n".join(line.rstrip() for line in lines), ExitCode.USAGE)


def _shorten(text: str, cells_max: int) -> str:
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= cells_max else set_cell_size(text, max(cells_max - 1, 0)) + "…"


def _complete_task_id(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    # A shell completion cannot report errors.
    described = {task["id"]: f"{task['state']}  {task['name']}" for task in _latest_tasks(current_options(ctx))}
    # Offer only valid ids: a shell would execute other text if the server is untrusted.
    candidates = [task_id for task_id in described if task_id.startswith(incomplete) and is_task_id(task_id)]
    return [CompletionItem(task_id, help=escape_text(described[task_id])) for task_id in candidates]


def for_each_task(
    task_ids: Sequence[str],
    request: Callable[[str], Mapping[str, Any]],
    advise: Callable[[ClientError, str], str] = lambda error, task_id: "",
) -> None:
    """Send a request for each task and print the response. Continues even if the server refuses a request.

    Prints the server's message, or with `--format json` the response. Exits with the code of the last error. Raises the
    error if there is only one task. advise: returns a line to print below the error for a task; empty for none.
    """
    from sandbox.client import ClientError, UnreachableError

    code = ExitCode.SUCCESS
    for task_id in task_ids:
        try:
            response = request(task_id)
        except ClientError as error:
            advice = advise(error, task_id)
            if isinstance(error, UnreachableError) or (len(task_ids) == 1 and not advice):
                raise
            code = print_error(error)
            if advice:
                click.echo(advice, err=True)
            continue
        if current_options().format == "json":
            print_json(response)
        else:
            message = escape_text(response["message"])
            is_named = len(task_ids) == 1 or escape_text(task_id) in message
            click.echo(message if is_named else f"{escape_text(task_id)}: {message}", err=True)
    if code is not ExitCode.SUCCESS:
        raise click.exceptions.Exit(code)
