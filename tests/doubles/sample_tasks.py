"""Where a test lets chance decide, and how it is made to decide the same again."""

import os
import random

NAME = "SANDBOX_TEST_SEED"


def seed():
    """The given one, as `script/test` gives one to all that it plays, once more too; else a new one. It is printed."""
    given = os.environ.get(NAME)
    number = int(given) if given else random.SystemRandom().randrange(2**32)
    print(f"{NAME}={number}")
    return number
