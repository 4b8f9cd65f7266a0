"""Examples in the help of commands."""

from __future__ import annotations


def help_examples(*lines: str, note: str = "") -> str:
    """Return the end of a command's help: a note, followed by examples, which are not wrapped."""
    block = "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))
    return f"{note}\n\n{block}" if note else block
