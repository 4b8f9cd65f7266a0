"""Paths as people and JSON can take them."""

from sandbox.model.printable import printable


def show(path: bytes) -> str:
    """Text of a path: what is not UTF-8, and what is no visible character, stands as %XX for each of its bytes."""
    return printable(path.decode(errors="surrogateescape"), _escape)


def _escape(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogateescape"))
