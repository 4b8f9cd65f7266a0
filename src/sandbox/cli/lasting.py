"""What a program imports lasts until its end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """What is made in here is never looked through for garbage: not while it is made, not later, not at the end.

    Modules are nothing else, and looking through them took a quarter of the CPU of a server's start and end.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
