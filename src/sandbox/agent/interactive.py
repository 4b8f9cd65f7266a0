"""Claude Code with a person before it: how it is started, and the questions that it would ask first, answered."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sandbox.agent.plain_text import as_text
from sandbox.contracts.inside import HOME

PROMPT_FILE = ".sandbox/prompt.md"

_ARGUMENT_BYTES_MAX = 100 * 1024
"""A prompt over it goes through a file: the kernel takes no argument of more than 128 KiB."""

_KEY_CHARACTERS = 20
_ASKS = {"dontAsk": "default"}
_MARKS = ("/", "!", "#", "@")


def interactive_arguments(options: tuple[str, ...], prompt: str) -> tuple[str, ...]:
    """What follows the program's name. `options`: those of a run without a person, where nobody could be asked."""
    return (*(_ASKS.get(option, option) for option in options), "--", _first_words(prompt))


def interactive_files(prompt: str, task_key: str, directory: str) -> Mapping[str, bytes]:
    """Files of the home: the answers to what Claude Code asks when it meets a home, a key or a folder first."""
    answers = {
        "hasCompletedOnboarding": True,
        "theme": "dark",
        "customApiKeyResponses": {"approved": [task_key[-_KEY_CHARACTERS:]], "rejected": []},
        "bypassPermissionsModeAccepted": True,
        "projects": {directory: {"hasTrustDialogAccepted": True}},
    }
    files = {".claude.json": msgspec.json.encode(answers)}
    if _is_long(prompt):
        files[PROMPT_FILE] = prompt.encode(errors="replace")
    return files


def interactive_variables() -> Mapping[str, str]:
    """Beside those of every agent."""
    return {
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL": "1",
    }


def _first_words(prompt: str) -> str:
    """The prompt as text: what begins with a mark would be a command to Claude Code."""
    if _is_long(prompt):
        return f"Your task is in the file {HOME}/{PROMPT_FILE}. Read it whole and carry it out."
    return as_text(prompt.replace("\0", "\ufffd"), _MARKS)


def _is_long(prompt: str) -> bool:
    return len(prompt.encode(errors="replace")) > _ARGUMENT_BYTES_MAX
