"""How many lines and files a task and the earlier tasks of its chain changed in total."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sandbox.cli.output.patch_text import format_line_counts, patch_lines
from sandbox.cli.patch_download import find_chain_patch
from sandbox.model.task_state import FINAL_STATES

if TYPE_CHECKING:
    from sandbox.client import Client
    from sandbox.client.response_types import Task


COUNTED_PATCH_BYTES_MAX = 8 * 1024 * 1024
"""Maximum size of a patch that is downloaded only to count its lines."""


def chain_changes_summary(client: Client, task: Task) -> str:
    """Return what the task and the earlier tasks of its chain changed in total, such as `+31 −4 in 3 files`.

    Empty if the task does not continue another one, or if the number of lines cannot be determined.
    """
    from sandbox.client import ClientError

    if task.get("parent") is None or task["state"] not in FINAL_STATES:
        return ""
    try:
        entry = find_chain_patch(client, task["id"])
        if entry is None or entry["contains_secret"] or entry["size_bytes"] > COUNTED_PATCH_BYTES_MAX:
            return ""
        with TemporaryDirectory() as directory:
            patch = Path(directory) / "patch"
            client.download(task["id"], entry["path"], patch)
            return format_line_counts(patch_lines(patch))
    except ClientError:
        return ""  # the size is only additional information
