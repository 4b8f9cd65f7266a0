"""Seeds of randomized tests."""

import os
import random

NAME = "SANDBOX_TEST_SEED"


def seed():
    """The seed from the environment, as set by `script/test`, or a new one. It is printed."""
    value = os.environ.get(NAME)
    seed_value = int(value) if value else random.SystemRandom().randrange(2**32)
    print(f"{NAME}={seed_value}")
    return seed_value
