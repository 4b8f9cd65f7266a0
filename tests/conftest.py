"""Settings that every test shares."""

from pathlib import Path

import pytest
from hypothesis import settings

# A slow moment of the machine is no defect; the time limit of each test is the bound.
settings.register_profile("sandbox", deadline=None, print_blob=True)
settings.load_profile("sandbox")

_TESTS = Path(__file__).parent
_MACHINE_WIDE = ("acceptance", "contract/test_runtime", "escape", "integration")


def pytest_collection_modifyitems(items):
    """Some tests look at the whole machine for what a sandbox left: all that start processes run in one worker."""
    for item in items:
        if item.path.relative_to(_TESTS).as_posix().startswith(_MACHINE_WIDE):
            item.add_marker(pytest.mark.xdist_group("machine"))
