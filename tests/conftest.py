"""Settings that every test shares."""

from pathlib import Path

import pytest
from hypothesis import settings

# A slow moment of the machine is no defect; the time limit of each test is the bound.
settings.register_profile("sandbox", deadline=None, print_blob=True)
settings.load_profile("sandbox")

_TESTS = Path(__file__).parent
_START_PROCESSES = ("acceptance", "contract/test_runtime", "escape", "integration")


@pytest.hookimpl(tryfirst=True)  # what hands the tests out reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """A file that starts processes is played by one worker, which makes what its tests share once; a tier counts."""
    for item in items:
        path = item.path.relative_to(_TESTS).as_posix()
        if path.startswith(_START_PROCESSES):
            item.add_marker(pytest.mark.xdist_group(f"{path}:{_tier(item)}" if path.startswith("escape") else path))


def _tier(item):
    return item.callspec.params.get("field", "") if hasattr(item, "callspec") else ""
