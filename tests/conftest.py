"""Settings for all tests."""

import gc
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# A slow machine is not a defect: only the timeout of each test limits the time.
settings.register_profile("sandbox", deadline=None, print_blob=True)
settings.load_profile("sandbox")

LONGEST_FIRST = ("escape", "chaos", "acceptance", "contract", "integration", "architecture", "unit")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Disable garbage collection during collection, which creates some hundred thousand permanent objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run slow directories first, so that no worker runs a long file at the end; any order within a directory."""
    ranks = {path: _rank(path, config.rootpath) for path in {item.path for item in items}}
    items.sort(key=lambda item: ranks[item.path])


def _rank(path: Path, root: Path) -> int:
    return LONGEST_FIRST.index(path.relative_to(root / "tests").parts[0])
