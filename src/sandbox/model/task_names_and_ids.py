"""Names of tasks: the format of their ids, names and hints derived from their prompts, and names of branches."""

import re
import unicodedata
from textwrap import shorten

from sandbox.model.display_text import INVISIBLE

TASK_ID_PATTERN = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?"
_GENERATED_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ANY_GENERATED_ID = "00000000-0000-0000-0000-000000000000"


def is_generated_id(text: str) -> bool:
    """Return whether the text has the form of an id that the server generates."""
    return _GENERATED_ID.fullmatch(text) is not None


def is_generated_id_prefix(text: str) -> bool:
    """Return whether the text can be the beginning of a generated id and is not a complete id."""
    return 0 < len(text) < len(_ANY_GENERATED_ID) and is_generated_id(text + _ANY_GENERATED_ID[len(text) :])


def is_task_id(text: str) -> bool:
    """Return whether the text has the format of a task id, which is also a safe path component."""
    return re.fullmatch(TASK_ID_PATTERN, text) is not None and ".." not in text


NAME_CHARACTERS_MAX = 120
"""Maximum length of a name that is derived from a prompt."""

HINT_CHARACTERS_MAX = 120
"""Maximum length of a hint that is derived from a prompt."""

PROMPT_BEGINNING_BYTES = 500
"""Number of bytes at the beginning of a prompt that suffice for its hint."""

_LINE_CHARACTERS_MAX = 4 * HINT_CHARACTERS_MAX
"""Length to which a line is cut before its words are counted: a prompt can be a single long line."""

_LEADING_MARKS = re.compile(r"[#*>\-\s]*")
_TRAILING_MARKS = re.compile(r"[:\s]*")
"""Matches the marks at the end of a reversed line. A search for them at the end of the line takes quadratic time."""


def name_from_prompt(prompt: str) -> str:
    """Return the default name of a task: the prompt's first line, cut at a word. The dashboard's form does the same."""
    line = _first_line(prompt)
    if len(line) <= NAME_CHARACTERS_MAX:
        return line
    cut, space, _ = line[:NAME_CHARACTERS_MAX].rpartition(" ")
    return (cut if space else line[: NAME_CHARACTERS_MAX - 1]) + "…"


def is_name_from_prompt(name: str, prompt: str) -> bool:
    """Return whether the name is the prompt's first line, or the beginning of that line followed by an ellipsis."""
    line, beginning = _first_line(prompt), name.removesuffix("…")
    return name == line or (beginning not in {name, ""} and line.startswith(beginning))


_WORD = re.compile("[a-z0-9]+")
_SLUG_CHARACTERS_MAX = 40


def branch_name(task_id: str, name: str = "") -> str:
    """Return a name for a branch with the task's changes, such as `sandbox/fix-the-login-5e173eb5`.

    A generated id is shortened and appended to the words of the task's name. An id that the user chose is used without
    the name. git rejects branch names with a component that ends in `.lock`.
    """
    if not is_generated_id(task_id):
        return f"sandbox/{task_id.replace('.lock', '-lock')}"
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = "-".join(_WORD.findall(ascii_name.lower()))
    if len(slug) > _SLUG_CHARACTERS_MAX:
        slug = slug[: _SLUG_CHARACTERS_MAX + 1].rpartition("-")[0] or slug[:_SLUG_CHARACTERS_MAX]
    return f"sandbox/{slug}-{task_id[:8]}" if slug else f"sandbox/{task_id[:8]}"


def prompt_hint(prompt: str, name: str) -> str:
    """Return the beginning of the prompt's first line; empty if it only repeats the task's name."""
    line = prompt.strip().split("\n", 1)[0]
    is_repeated = line.startswith(name) or is_name_from_prompt(name, prompt)
    return "" if is_repeated else shorten_line(line)


def shorten_line(line: str) -> str:
    """Cut a line at a word to HINT_CHARACTERS_MAX."""
    return shorten(line[:_LINE_CHARACTERS_MAX], HINT_CHARACTERS_MAX, placeholder="…")


def _first_line(prompt: str) -> str:
    """Return the first line with text, without Markdown markup and with single spaces."""
    line = next((line for line in prompt.split("\n") if line.strip()), "")
    for marks in (_LEADING_MARKS, _TRAILING_MARKS):
        line = marks.sub("", line, count=1)[::-1]
    return " ".join(INVISIBLE.sub(" ", line).split())
