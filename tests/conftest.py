"""Settings that every test shares."""

import pytest
from hypothesis import settings

# A slow moment of the machine is no defect; the time limit of each test is the bound.
settings.register_profile("sandbox", deadline=None, print_blob=True)
settings.load_profile("sandbox")

LONGEST_FIRST = ("escape", "chaos", "acceptance", "contract", "integration", "house", "unit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The last worker is not to play a long file while the others have nothing to do; within a directory: any order."""
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.relative_to(config.rootpath / "tests").parts[0]))
