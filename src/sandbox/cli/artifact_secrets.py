"""Rejects artifacts that contain secrets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.terminal_text import escape_name

if TYPE_CHECKING:
    from sandbox.client.response_types import Artifact


def reject_secrets(entries: Iterable[Artifact], *, allows_secrets: bool, advice: str = "add --allow-secrets") -> None:
    """Exit with an error if an artifact contains a secret and `--allow-secrets` was not given.

    advice: how to allow the download.
    """
    names = [escape_name(entry["name"]) for entry in entries if entry["contains_secret"] and not allows_secrets]
    if names:
        contain = "contains a secret of the task and was" if len(names) == 1 else "contain secrets and were"
        message = f"Error: {', '.join(names)} {contain} skipped."
        fail(f"{message}\n  Download it anyway: {advice}", ExitCode.REFUSED)
