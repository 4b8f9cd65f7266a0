"""Settings for all tests."""

import gc
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# An example may take a long time on a slow machine, so it has no deadline: only the test's timeout applies.
settings.register_profile("sandbox", deadline=None, print_blob=True)
settings.load_profile("sandbox")

TEST_DIRECTORIES_LONGEST_FIRST = ("escape", "chaos", "acceptance", "contract", "integration", "architecture", "unit")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Disable garbage collection during test collection, which creates hundreds of thousands of permanent objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the directories with long tests first, so that no worker is left with a long file at the end."""
    ranks = {path: _rank(path, config.rootpath) for path in {item.path for item in items}}
    items.sort(key=lambda item: ranks[item.path])


def _rank(path: Path, root: Path) -> int:
    return TEST_DIRECTORIES_LONGEST_FIRST.index(path.relative_to(root / "tests").parts[0])
