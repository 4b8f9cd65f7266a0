"""The help for each command ends with a short list of the global options."""

import re

import click
import pytest

from sandbox.cli import main
from sandbox.cli.click_extensions import GlobalOption

HEADING = "\nGlobal options (see sandbox --help):\n"


def commands(command=main.root, name="sandbox"):
    yield name, command
    if isinstance(command, click.Group):
        for child in command.list_commands(click.Context(command)):
            yield from commands(command.get_command(click.Context(command), child), f"{name} {child}")


COMMANDS = dict(commands())


def listed(help_text):
    """Return the lines that list the global options."""
    return re.split(r"\n\n", help_text.partition(HEADING)[2])[0].splitlines()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "sandbox"])
def test_global_options_are_listed_in_at_most_two_lines(name):
    command = COMMANDS[name]
    context = click.Context(command, info_name=name)
    help_text = command.get_help(context)
    accepted = [each for each in command.get_params(context) if isinstance(each, GlobalOption) and not each.hidden]
    assert len(listed(help_text)) <= 2
    words = " ".join(listed(help_text)).split()
    assert [each for each in accepted if each.opts[0] not in words] == []
    options = help_text.partition(HEADING)[0].partition("\nOptions:\n")[2]
    assert [each.opts[0] for each in accepted if re.search(rf"^  .*{each.opts[0]}\b", options, re.MULTILINE)] == []


def test_root_help_describes_the_global_options():
    help_text = main.root.get_help(click.Context(main.root, info_name="sandbox"))
    assert HEADING not in help_text
    for name in ("--server URL", "--token TOKEN", "--context NAME", "-f, --format [text|json|table]", "--no-color"):
        assert f"  {name} " in help_text


def test_values_of_the_format_option_are_listed():
    text = COMMANDS["sandbox task logs"].get_help(click.Context(COMMANDS["sandbox task logs"]))
    assert "--format text|json" in "\n".join(listed(text))
    assert "table" not in "\n".join(listed(text))
    assert "-f, --follow" in text


def test_narrow_list_does_not_break_an_option():
    context = click.Context(COMMANDS["sandbox task status"], terminal_width=40)
    lines = listed(COMMANDS["sandbox task status"].get_help(context))
    assert "  -f, --format text|json|table" in lines
    assert max(map(len, lines)) <= 40


def test_help_of_logs_explains_how_to_print_readable_text_in_a_pipe():
    text = " ".join(COMMANDS["sandbox task logs"].get_help(click.Context(COMMANDS["sandbox task logs"])).split())
    assert "If the output is piped, the lines are printed as the agent wrote them" in text
    assert "use --pretty for readable text" in text


@pytest.mark.parametrize(
    ("entries", "sections"),
    [(main.ROOT_ENTRIES, main.ROOT_SECTIONS), (main.TASK_ENTRIES, main.TASK_SECTIONS)],
    ids=["sandbox", "sandbox task"],
)
def test_each_command_is_in_one_section(entries, sections):
    assert sorted(name for names in sections.values() for name in names) == sorted(entries)


def test_command_names_are_aligned_across_all_sections():
    text = COMMANDS["sandbox task"].get_help(click.Context(COMMANDS["sandbox task"], info_name="sandbox task"))
    commands_text = text.partition("\nSubmit:\n")[2].partition("\nGlobal options")[0]
    names = re.findall(r"^  [a-z]+ +(?=[A-Z])", commands_text, re.MULTILINE)
    assert len(names) == len(main.TASK_ENTRIES)
    assert len({len(name) for name in names}) == 1
