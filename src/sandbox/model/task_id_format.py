"""The format of task ids, and of the ids that the server generates."""

import re

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
