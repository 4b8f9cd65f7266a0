"""Names for collected files: unique in the task, without a slash, and nothing but visible characters."""

from sandbox.workspace.visible_path import show

TEMPORARY_NAME = ".sandbox.part"
"""What a file is called while it is copied; no artifact gets this name."""

_NAME_BYTES_MAX = 200


class ArtifactNames:
    """Gives names, each one once."""

    def __init__(self, taken: frozenset[str]) -> None:
        self._taken = {*taken, TEMPORARY_NAME}
        self._next_number: dict[str, int] = {}

    def claim(self, path: bytes) -> str:
        """The base name, else the path with `__` for `/`, else that with a number."""
        base = _cut(show(path.rpartition(b"/")[2]))
        whole = _cut(show(path).replace("/", "__"))
        name = base if base not in self._taken else whole
        while name in self._taken:
            number = self._next_number.get(whole, 2)
            name = _numbered(whole, number)
            self._next_number[whole] = number + 1
        self._taken.add(name)
        return name


def _cut(name: str) -> str:
    """Long names lose their beginning, so that what they are called last, and their suffix, stays."""
    return _end(show(_end(name).encode()))  # the new beginning may be a combining mark


def _end(name: str) -> str:
    return name.encode()[-_NAME_BYTES_MAX:].decode(errors="ignore")


def _numbered(name: str, number: int) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{number}{dot}{suffix}" if stem else f"{name}-{number}"
