"""The SQL of the store, by name: `-- name: …` begins a query, comment lines tell what it is for."""

import re
from importlib.resources import files

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load_queries() -> dict[str, str]:
    """Every query of `queries.sql`, without its comments and the semicolon at its end."""
    _, *parts = _NAME.split((files(__package__) / "queries.sql").read_text(encoding="utf-8"))
    return {name: _without_comments(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("--")).strip().removesuffix(";")
