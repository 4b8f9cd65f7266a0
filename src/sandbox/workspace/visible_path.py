"""Paths as people and JSON can take them."""


def show(path: bytes) -> str:
    """Text of a path: what is not UTF-8, and what is no visible character, stands as %XX for each of its bytes."""
    return "".join(
        character if character.isprintable() else _escape(character)
        for character in path.decode(errors="surrogateescape")
    )


def _escape(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogateescape"))
