"""Creates the commit message for a task's changes from the agent's final message, which is untrusted."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from sandbox.cli.output.terminal_text import escape_text

SUBJECT_CHARACTERS_MAX = 72
CLAUSE_CHARACTERS_MIN = 30
"""Minimum length to which a subject is cut at the end of a sentence or clause. Otherwise, it is cut at a word."""

BODY_CELLS_MAX = 72
"""Width of the body. Code, and words that exceed the width, are not wrapped."""

BODY_LINES_MAX = 60
BODY_CHARACTERS_MAX = 8000

CHAIN_TASK_CHARACTERS_MAX = 200
"""Maximum length of each task's line in the commit message for a chain of tasks."""

TRAILER = "Sandbox-Task"

_HEADING = re.compile(r"#{1,6}\s+")
_MARKERS = re.compile(r"\A(?:#{1,6}|[-*+>]|[0-9]{1,3}[.)])\s+")
_LIST_ITEM = re.compile(r"\s*(?:[-*+]|[0-9]{1,3}[.)])\s+")
_FENCES = ("```", "~~~")
_SENTENCE_END = re.compile(r"[.!?](?=\s)")
_CLAUSE_END = re.compile(r"(?=[,;:]\s|\s[–—(-])")
_DANGLING_WORDS = re.compile(
    r"( (a|an|and|as|at|because|but|by|for|from|in|of|on|or|so|that|the|to|too|very|when|which|with))+$"
)
"""Words that cannot end a subject."""

_INSTRUCTION_START = re.compile(
    r"(---|diff -|Index: |>?From |(From|Subject|Date|Cc):|\[PATCH\]|[\w-]+-by:)", re.IGNORECASE
)
"""Matches the start of a patch, of an email or header for `git am`, of a sign-off and of a `git send-email` recipient.

An indented line is plain text.
"""

_SCISSORS = re.compile(r"([<>])(?=[8%])|([8%])(?=[<>])")
"""Marks in a line of hyphens at which git and `git am` cut a message, even if the line is indented."""

_REBASE_INSTRUCTION = re.compile(r"\A((fixup|squash|amend)! ?)+")
"""Starts of subjects that `git rebase --autosquash` reads as an instruction to change another commit."""

_WORD = r"(?:[^\W_]|\.)++"
_NEXT_WORD = rf"[\s_-]++{_WORD}"
_CI_INSTRUCTION = re.compile(
    rf"\[\s*+((?:skip|no)(?:{_NEXT_WORD}){{1,3}}|{_WORD}(?:{_NEXT_WORD}){{0,2}}[\s_-]++skip)[\s_-]*+\]"
    r"|\*{3}(no_ci)\*{3}",
    re.IGNORECASE,
)
"""Texts, such as `[skip ci]`, that make CI services ignore a commit.

No character can be both part of a word and a separator. Otherwise, the search would take exponential time for some
messages.
"""

_CI_WORD = re.compile(r"(?<![a-z])(ci|cd|actions?|checks?|builds?|deploy|release|pipelines?)(?![a-z])", re.IGNORECASE)
"""Every instruction for a CI service contains one of these words. The text of a Markdown link rarely does."""


class CommittedTask(NamedTuple):
    """A task whose changes become one commit, alone or together with those of the other tasks of its chain."""

    id: str
    name: str
    final_message: str


def build_commit_message(task: CommittedTask) -> str:
    """Return a subject, a wrapped body and the `Sandbox-Task` trailer.

    The subject is the task's name, which says what was requested; the final message says what the agent claims. A name
    that is too long is cut, and the body starts with the whole name. The trailer is in a separate last paragraph, so
    that no line of the message is read as a trailer. No line is an instruction for git or for a CI service, and no line
    signs the commit off.
    """
    lines = [escape_text(line.rstrip()) for line in task.final_message[:BODY_CHARACTERS_MAX].splitlines()]
    is_cut = len(task.final_message) > BODY_CHARACTERS_MAX
    title, subject = _subject(_name_title(task) or "Apply the changes of a task")
    return _compose(subject, lines if subject == title else [title, "", *lines], task.id, is_cut=is_cut)


def _name_title(task: CommittedTask) -> str:
    """Return the task's name without Markdown, such as the marks of a heading."""
    return _plain(escape_text(task.name)).lstrip("# ")


def _subject(title: str) -> tuple[str, str]:
    """Return the title without a prefix such as `fixup!`, and the subject, which may be shorter."""
    title = _REBASE_INSTRUCTION.sub(lambda match: match[0].replace("!", ":"), title)
    return title, _shorten(title)


def _compose(subject: str, lines: Sequence[str], task_id: str, *, is_cut: bool = False) -> str:
    body = list(map(_escape_instruction, _squeeze(_wrap(lines))))
    if len(body) > BODY_LINES_MAX or is_cut:
        body = [*body[:BODY_LINES_MAX], "…"]
    paragraphs = [subject, "\n".join(body), f"{TRAILER}: {escape_text(task_id)}"]
    message = "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"
    return _CI_INSTRUCTION.sub(_escape_ci_instruction, message)


def build_chain_message(tasks: Sequence[CommittedTask]) -> str:
    """Return a commit message for a chain of tasks, given in the order in which they ran.

    The subject is the name of the first task. The body has one line for each task: the first line of its final message,
    or its name if it has no final message.
    """
    lines = [f"- {_title(task.final_message) or _plain(escape_text(task.name))}" for task in tasks]
    title, subject = _subject(_name_title(tasks[0]) or "Apply the changes of a chain of tasks")
    return _compose(subject, lines if subject == title else [title, "", *lines], tasks[-1].id)


def _title(message: str) -> str:
    lines = [escape_text(line.rstrip()) for line in message[:BODY_CHARACTERS_MAX].splitlines()]
    first = _find_title(lines)
    return "" if first is None else textwrap.shorten(_plain(lines[first]), CHAIN_TASK_CHARACTERS_MAX, placeholder=" …")


def _find_title(lines: Sequence[str]) -> int | None:
    """Return the index of the first line that is neither empty nor a heading."""
    return next((at for at, line in enumerate(lines) if line.strip() and not _HEADING.match(line)), None)


def _escape_instruction(line: str) -> str:
    if "-" in line:
        line = _SCISSORS.sub(r"\1\2 ", line)
    return f" {line}" if _INSTRUCTION_START.match(line) else line


def _escape_ci_instruction(match: re.Match[str]) -> str:
    text = match[1] or match[2]
    is_link = match.string.startswith("(", match.end()) and not _CI_WORD.search(text)
    return match[0] if is_link else f"({text})"


def _plain(line: str) -> str:
    """Convert a line to a subject: without Markdown, and with single spaces."""
    text = " ".join(_MARKERS.sub("", line.strip(), count=1).split())
    return text.replace("**", "").replace("`", "").strip() or text


def _shorten(title: str) -> str:
    """Cut a title at the end of a sentence, of a clause or of a word, without an ellipsis."""
    title = title.removesuffix("…").rstrip() or title
    if len(title) <= SUBJECT_CHARACTERS_MAX:
        return title
    start = title[: SUBJECT_CHARACTERS_MAX + 1]
    for pattern in (_SENTENCE_END, _CLAUSE_END):
        ends = [match.end() for match in pattern.finditer(start) if match.end() >= CLAUSE_CHARACTERS_MIN]
        if ends:
            return start[: ends[-1]].rstrip()
    words = _DANGLING_WORDS.sub("", start.rpartition(" ")[0].rstrip(" ,;:"))
    return words or title[:SUBJECT_CHARACTERS_MAX]


def _wrap(lines: Iterable[str]) -> Iterator[str]:
    """Wrap prose; keep code."""
    is_code = False
    for line in lines:
        is_fence = line.lstrip().startswith(_FENCES)
        is_code = is_code != is_fence
        if is_code or is_fence or len(line) <= BODY_CELLS_MAX:
            yield line
            continue
        item = _LIST_ITEM.match(line)
        indent = " " * (len(item[0]) if item else len(line) - len(line.lstrip()))
        yield from textwrap.wrap(
            line, BODY_CELLS_MAX, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )


def _squeeze(lines: Iterable[str]) -> Iterator[str]:
    """Drop leading, trailing and repeated empty lines."""
    is_gap, has_text = False, False
    for line in lines:
        if not line.strip():
            is_gap = has_text
            continue
        if is_gap:
            yield ""
        yield line
        is_gap, has_text = False, True
