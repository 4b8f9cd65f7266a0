"""Seeds of randomized tests."""

import os
import random

SEED_VARIABLE = "SANDBOX_TEST_SEED"


def seed():
    """The seed from the environment, as set by `script/test`, or a new one. It is printed."""
    value = os.environ.get(SEED_VARIABLE)
    seed_value = int(value) if value else random.SystemRandom().randrange(2**32)
    print(f"{SEED_VARIABLE}={seed_value}")
    return seed_value
