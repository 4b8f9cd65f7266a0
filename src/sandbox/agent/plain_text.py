"""Prompts as text: what Claude Code would obey as a command gets words in front."""

import re

TEXT_MARK = "Task:\n"
"""Before a prompt that would be taken for a command."""

_TRIMMED = re.compile(r"[\s\ufeff]*")
"""What JavaScript trims: a byte order mark, too, which is no white space to Python."""


def as_text(prompt: str, marks: tuple[str, ...]) -> str:
    """The prompt, with words in front where one of the marks comes first, or would as soon as somebody trims it."""
    begin = _TRIMMED.match(prompt)
    return TEXT_MARK + prompt if begin and prompt.startswith(marks, begin.end()) else prompt
