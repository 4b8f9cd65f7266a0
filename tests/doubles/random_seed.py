"""Seeds of randomized tests."""

import os
import random

SEED_VARIABLE = "SANDBOX_TEST_SEED"


def seed():
    """Return the seed from the environment, as set by `script/test`, or a new seed, and print it."""
    value = os.environ.get(SEED_VARIABLE)
    seed_value = int(value) if value else random.SystemRandom().randrange(2**32)
    print(f"{SEED_VARIABLE}={seed_value}")
    return seed_value
