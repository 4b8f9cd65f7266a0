"""Commands and groups (help, suggestions for unknown commands, lazy imports), and prompts for confirmation."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_name, escape_text

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from sandbox.client.response_types import Task


Entries = Mapping[str, tuple[str, str]]
"""Maps the name of a command to its location (`module:attribute`) and its short help."""


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Exclude all objects created in the context from garbage collection, permanently.

    Modules live until the process ends, and scanning them takes a quarter of the CPU time of a server's startup and
    shutdown.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class GlobalOption(click.Option):
    """An option that many commands have. The root group's help describes it; other commands only list it."""

    @property
    def usage(self) -> str:
        """The option's names and its value, such as `-f, --format text|json`."""
        names = ", ".join(sorted(self.opts, key=len))
        value = "|".join(self.type.choices) if isinstance(self.type, click.Choice) else self.metavar
        return names if self.is_flag else f"{names} {value}"

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the entry that describes the option; None if the command only lists it."""
        describes = getattr(ctx.command, "describes_global_options", True)
        return super().get_help_record(ctx) if describes else None


_EXAMPLES = "Examples:"


class CommandWithGlobalOptionsHelp(click.Command):
    """A command whose help ends with one list of the global options that it accepts."""

    describes_global_options = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. An error about a missing argument has an example."""
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            if isinstance(error.param, click.Argument) and (example := self._first_example()):
                raise click.MissingParameter(f"For example: {example}", error.ctx, error.param) from None
            raise

    def _first_example(self) -> str:
        """Return the first example of the help; empty if there is none."""
        _, _, examples = (self.epilog or "").partition(_EXAMPLES)
        return examples.strip().partition("\n")[0]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add the list of global options to the help, then the examples."""
        options = [each for each in self.get_params(ctx) if isinstance(each, GlobalOption) and not each.hidden]
        if options and not self.describes_global_options:
            with formatter.section("Global options (see sandbox --help)"):
                for line in _fill([option.usage for option in options], formatter.width - formatter.current_indent):
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        super().format_epilog(ctx, formatter)


def _fill(parts: Sequence[str], width: int) -> Iterator[str]:
    """Join parts into lines of at most this width, without breaking a part."""
    line = ""
    for part in parts:
        if line and len(line) + 2 + len(part) > width:
            yield line
            line = ""
        line = f"{line}  {part}" if line else part
    yield line


def command(*arguments: Any, **attributes: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Declare a `CommandWithGlobalOptionsHelp`, with the arguments of `click.command`."""
    return click.command(*arguments, cls=CommandWithGlobalOptionsHelp, **attributes)


def help_examples(*lines: str, note: str = "") -> str:
    """Return the end of a command's help: a note, followed by examples, which are not wrapped."""
    block = "\n".join(("\b", _EXAMPLES, *(f"  {line}" for line in lines)))
    return f"{note}\n\n{block}" if note else block


class SuggestingGroup(click.Group, CommandWithGlobalOptionsHelp):
    """A group that suggests similar commands for an unknown one."""

    command_class = CommandWithGlobalOptionsHelp

    def has_command(self, ctx: click.Context, name: str) -> bool:
        """Return whether there is a command with this name."""
        return name in self.list_commands(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command. For an unknown name, fail and suggest the full command lines of similar commands."""
        name = args[0]
        if not self.has_command(ctx, name) and not ctx.resilient_parsing and not name.startswith("-"):
            paths = _suggest(name, ctx)
            message = f"No such command {name!r}" + (f"; did you mean {paths[0]}?" if len(paths) == 1 else ".")
            ctx.fail("\n  ".join((f"{message} Similar commands:", *paths)) if len(paths) > 1 else message)
        return super().resolve_command(ctx, args)


class LazyGroup(SuggestingGroup):
    """A group that lists its commands without importing them, which keeps `--help` fast.

    sections: the headings of the help and the names of the commands under each; by default, one list of all commands.
    hidden_commands: commands that are not listed, because other programs run them; maps each name to its location.
    """

    def __init__(
        self,
        *arguments: Any,
        entries: Entries,
        sections: Mapping[str, Sequence[str]] | None = None,
        hidden_commands: Mapping[str, str] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self._entries = entries
        self._sections = sections or {"Commands": tuple(entries)}
        self._hidden_commands = hidden_commands or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order in which they were declared."""
        return list(self._entries)

    def has_command(self, ctx: click.Context, name: str) -> bool:
        """Return whether there is a command with this name, listed or not."""
        return name in self._entries or name in self._hidden_commands

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        location = self._entries[cmd_name][0] if cmd_name in self._entries else self._hidden_commands.get(cmd_name)
        if location is None:
            return None
        module, attribute = location.split(":")
        with gc_frozen():
            command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands and options without importing commands."""
        from click.shell_completion import CompletionItem

        names = [name for name in self._entries if name.startswith(incomplete)]
        commands = [CompletionItem(name, help=self._entries[name][1]) for name in names]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add the lists of commands to the help. The column of names has the same width in all lists."""
        width = max(map(len, self._entries))
        for heading, names in self._sections.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{name:<{width}}", self._entries[name][1]) for name in names])


_SYNONYMS = {
    **dict.fromkeys(("ls", "ps"), ("list",)),
    **dict.fromkeys(("delete", "rm"), ("delete", "remove", "revoke")),
    **dict.fromkeys(("kill", "stop"), ("cancel",)),
    **dict.fromkeys(("describe", "get", "inspect", "show", "view"), ("status", "show")),
    **dict.fromkeys(("create", "start"), ("submit", "create")),
}
"""Maps command names from similar programs to the names used here."""

_ROOT_SYNONYMS = {
    **dict.fromkeys(("kill", "stop"), "task cancel"),
    "start": "run",
    "rm": "task delete",
    "ls": "task list",
    "ps": "top",
}
"""Maps names that users type without a group to commands. The names come from similar programs and from the shell."""

_COMMANDS_BY_TOPIC = {
    **dict.fromkeys(("cost", "costs", "spend", "usage"), ("task status TASK_ID", "task list --sort cost --totals")),
}
"""Maps topics that are not commands, such as `cost`, to the command lines that show them."""

_SIMILARITY_MIN = 0.7
"""Minimum similarity of a suggestion. With difflib's default, 0.6, unrelated commands would be suggested."""


def _suggest(name: str, ctx: click.Context) -> list[str]:
    """Return the paths of the commands that the user probably means; those in the same group come first."""
    root = ctx.find_root()
    paths = list(_paths(root.command, root.command_path))
    synonym = f"{root.command_path} {_ROOT_SYNONYMS.get(name)}"
    if ctx is root and synonym in paths:
        return [synonym]
    if ctx is root or ctx.info_name == "task":
        topics = [f"{root.command_path} {line}" for line in _COMMANDS_BY_TOPIC.get(name, ())]
        if topics:
            return topics
    inner = [path for path in paths if path.rpartition(" ")[0] == ctx.command_path]
    return (
        [path for path in inner if _last_word(path) in _SYNONYMS.get(name, ())]
        or [path for path in paths if _last_word(path) == name]
        or _similar(name, inner)
        or _similar(name, paths)
    )


def _similar(name: str, paths: list[str]) -> list[str]:
    from difflib import get_close_matches

    closest = get_close_matches(name, {_last_word(path): None for path in paths}, n=1, cutoff=_SIMILARITY_MIN)
    return [path for path in paths if _last_word(path) in closest]


def _last_word(path: str) -> str:
    return path.rpartition(" ")[2]


def _paths(command: click.Command | None, path: str) -> Iterator[str]:
    """Yield the command lines of all commands in a group and in its subgroups."""
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            yield f"{path} {name}"
            yield from _paths(command.get_command(ctx, name), f"{path} {name}")


def confirm(question: str, *, default: bool | None = None, show_details: Callable[[], None] | None = None) -> bool:
    """Ask on stderr until the answer is yes or no.

    default: the answer for an empty line; None to ask again. show_details: called for the answer `d`.
    """
    hint = {None: "y/n", True: "Y/n", False: "y/N"}[default] + ("/d" if show_details else "")
    while True:
        answer = click.prompt(f"{question} [{hint}]", default="", show_default=False, err=True).strip().lower()
        if answer in {"y", "yes"}:
            return True
        if answer in {"n", "no"}:
            return False
        if not answer and default is not None:
            return default
        if answer == "d" and show_details is not None:
            show_details()
        else:
            click.echo("Type y or n." if show_details is None else "Type y, n or d.", err=True)


def require_terminal_for_prompt(action: str) -> None:
    """Exit with an error if the command cannot prompt. action: what `--yes` does, such as `Delete the task`."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        message = "Error: This command prompts for confirmation and needs a terminal."
        fail(f"{message}\n  {action} without a prompt: add --yes", ExitCode.USAGE)


def confirm_for_tasks(tasks: Sequence[Task], *, one: tuple[str, str], several: tuple[str, str]) -> None:
    """Ask once about all tasks. Exits if the user declines; does nothing without a task.

    one, several: the question, and the text to print if the user declines. `{}` in the question stands for the task's
    id and name, or for the number of tasks.
    """
    if not tasks:
        return
    shown = [f"{escape_text(task['id'])} ({escape_name(task['name'])})" for task in tasks]
    if len(shown) == 1:
        (question, refusal), subject = one, shown[0]
    else:
        click.echo("\n".join(f"  {text}" for text in shown), err=True)
        (question, refusal), subject = several, str(len(shown))
    if not confirm(question.format(subject), default=False):
        fail(refusal, ExitCode.INTERRUPTED)
