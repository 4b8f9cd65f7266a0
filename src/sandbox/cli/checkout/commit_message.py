"""Creates the commit message for a task's changes from the agent's final message, which is untrusted."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator

from sandbox.cli.output.text import escape_text

SUBJECT_CHARACTERS_MAX = 72
BODY_CELLS_MAX = 72
"""Width of the body. Code and words that are longer are not wrapped."""

BODY_LINES_MAX = 60
BODY_CHARACTERS_MAX = 8000

TRAILER = "Sandbox-Task"

_HEADING = re.compile(r"#{1,6}\s+")
_MARKERS = re.compile(r"\A(?:#{1,6}|[-*+>]|[0-9]{1,3}[.)])\s+")
_LIST_ITEM = re.compile(r"\s*(?:[-*+]|[0-9]{1,3}[.)])\s+")
_FENCES = ("```", "~~~")
_EMAIL_SYNTAX = re.compile(r"(---|diff -|Index: |From |(From|Subject|Date):)", re.IGNORECASE)
"""Line starts that `git am` parses as a patch, another email or an email header. An indented line is plain text."""

_CI_INSTRUCTION = re.compile(r"\[\s*((?:skip|no)\s+[\w-]+|[\w-]+\s+skip)\s*\](?!\()|\*{3}(no_ci)\*{3}", re.IGNORECASE)
"""Markers such as `[skip ci]`, which make CI services skip a commit."""


def build_commit_message(final_message: str, task_name: str, task_id: str) -> str:
    """Return a subject, a wrapped body and the trailer `Sandbox-Task`.

    The subject is the first line of the message that is not a heading; without one, it is the task's name. The trailer
    is in a separate last paragraph, so that no line of the message is read as a trailer. No line is an instruction for
    git or for a CI service.
    """
    lines = [escape_text(line.rstrip()) for line in final_message[:BODY_CHARACTERS_MAX].splitlines()]
    is_cut = len(final_message) > BODY_CHARACTERS_MAX
    first = next((at for at, line in enumerate(lines) if line.strip() and not _HEADING.match(line)), None)
    title = _plain(lines[first]) if first is not None else ""
    if first is None or not title:
        first, title = None, _plain(escape_text(task_name)) or "Apply the changes of a task"
    subject = _shorten(title)
    others = lines if first is None or subject != title else [*lines[:first], *lines[first + 1 :]]
    body = [f" {line}" if _EMAIL_SYNTAX.match(line) else line for line in _squeeze(_wrap(others))]
    if len(body) > BODY_LINES_MAX or is_cut:
        body = [*body[:BODY_LINES_MAX], "…"]
    paragraphs = [subject, "\n".join(body), f"{TRAILER}: {escape_text(task_id)}"]
    message = "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"
    return _CI_INSTRUCTION.sub(lambda match: f"({match[1] or match[2]})", message)


def _plain(line: str) -> str:
    """Return a line as a subject: without Markdown, and with single spaces."""
    text = " ".join(_MARKERS.sub("", line.strip(), count=1).split())
    return text.replace("**", "").replace("`", "").strip() or text


def _shorten(title: str) -> str:
    if len(title) <= SUBJECT_CHARACTERS_MAX:
        return title
    cut = title[:SUBJECT_CHARACTERS_MAX]
    return (cut.rpartition(" ")[0].rstrip(" ,;:") or cut[:-1])[: SUBJECT_CHARACTERS_MAX - 1] + "…"


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
