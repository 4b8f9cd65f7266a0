"""Every help text ends with examples, and the command line accepts each of them."""

import shlex
from collections.abc import Iterator
from contextlib import ExitStack

import click
import pytest

from sandbox.cli import main

COLUMNS_MAX = 84


def commands(command: click.Command = main.root, name: str = "sandbox") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for child in command.list_commands(click.Context(command)):
            yield from commands(command.get_command(click.Context(command), child), f"{name} {child}")


COMMANDS = dict(commands())


def examples(command: click.Command) -> list[str]:
    """Return the lines of the `Examples` section in the help."""
    help_text = command.get_help(click.Context(command))
    return [line.strip() for line in help_text.partition("\n  Examples:\n")[2].splitlines()]


def arguments(example: str) -> list[str]:
    """Return the arguments of `sandbox` in a shell command, without redirections, pipes or other commands."""
    lexer = shlex.shlex(example, posix=True, punctuation_chars="|<>")
    lexer.whitespace_split = True
    words = list(lexer)
    end = next((index for index, word in enumerate(words) if word in {"|", "<", ">"}), len(words))
    start = words.index("sandbox", words.index("--") if words[0] != "sandbox" else 0)
    return words[start + 1 : end]


def parse(words: list[str]) -> str:
    """Parse a command line as click does before it runs the command, and return the full name of the command."""
    with ExitStack() as stack:
        ctx = main.root.make_context("sandbox", words)
        names = ["sandbox"]
        while isinstance(ctx.command, click.Group):
            name, command, rest = ctx.command.resolve_command(ctx, [*ctx._protected_args, *ctx.args])
            ctx = command.make_context(name, rest, parent=ctx)
            stack.callback(ctx.close)
            names.append(name)
        assert ctx.args == []
        return " ".join(names)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Change to a directory with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    for name in ("task.yaml", "my-tools.tar", "sandbox.tar"):
        (tmp_path / name).touch()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("checkout")
def test_examples_in_the_help_are_accepted(name):
    lines = examples(COMMANDS[name])
    assert 1 <= len(lines) <= 3
    for line in lines:
        assert len(f"    {line}") <= COLUMNS_MAX
        path = parse(arguments(line))
        assert path == name or path.startswith(f"{name} ")


@pytest.mark.parametrize(
    "example",
    [
        "sandbox task lst",
        "sandbox task list --stat running",
        "sandbox task list --state walking",
        "sandbox task status",
        "sandbox task status a b",
        "sandbox task submit missing.yaml",
        "claude mcp add sandbox -- sandbox mcp --contxt prod",
    ],
)
@pytest.mark.usefixtures("checkout")
def test_wrong_example_is_detected(example):
    with pytest.raises(click.UsageError):
        parse(arguments(example))


def test_shell_operators_are_not_arguments():
    assert arguments('sandbox run "a | b" --apply <c.md') == ["run", "a | b", "--apply"]
    assert arguments("sandbox task diff 5e17 | git apply") == ["task", "diff", "5e17"]
