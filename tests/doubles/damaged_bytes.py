"""Damages messages at random places, to compare how two parsers read them."""

import random
from collections.abc import Iterator

FIRST_BYTES = 120
"""Half of the changes affect the first bytes, where most messages have their length fields."""


def damage(message: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield `count` copies of the message, each with one to three bytes changed, removed or inserted."""
    generator = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(message)
        for _ in range(generator.choice([1, 1, 2, 3])):
            end = len(damaged) if generator.random() < 0.5 else min(len(damaged), FIRST_BYTES)
            at = generator.randrange(max(1, end))
            change = generator.randrange(4)
            if change == 0:
                damaged[at : at + 1] = generator.randbytes(1)
            elif change == 1:
                damaged[at : at + 1] = bytes((byte + generator.choice([-1, 1])) % 256 for byte in damaged[at : at + 1])
            elif change == 2:
                del damaged[at : at + generator.randrange(1, 4)]
            else:
                damaged[at:at] = generator.randbytes(generator.randrange(1, 4))
        yield bytes(damaged)
