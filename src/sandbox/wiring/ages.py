"""How bounds of what is kept are written: `90d`, `20G`, or `unlimited`."""

import re

from sandbox.model.manifest_formats import Format

UNLIMITED = "unlimited"
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_UNIT_BYTES = {"M": 1024**2, "G": 1024**3, "T": 1024**4}


def _age(text: str) -> str | None:
    is_one = text == UNLIMITED or re.fullmatch(r"[1-9][0-9]{0,5}[smhd]", text, re.ASCII)
    return None if is_one else "must be a whole number and a unit, such as 12h or 90d, or unlimited"


def _disk_size(text: str) -> str | None:
    is_one = text == UNLIMITED or re.fullmatch(r"[1-9][0-9]{0,5}[MGT]", text, re.ASCII)
    return None if is_one else "must be a whole number and a unit, such as 500M or 20G, or unlimited"


AGE = Format("age", _age)
DISK_SIZE = Format("disk_size", _disk_size)


def parse_age(text: str) -> int | None:
    """Seconds; None for unlimited."""
    return None if text == UNLIMITED else int(text[:-1]) * _UNIT_SECONDS[text[-1]]


def parse_disk_size(text: str) -> int | None:
    """Bytes; None for unlimited."""
    return None if text == UNLIMITED else int(text[:-1]) * _UNIT_BYTES[text[-1]]
