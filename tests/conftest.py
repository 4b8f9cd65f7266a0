"""Settings that every test shares."""

import gc
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# A slow moment of the machine is no defect; the time limit of each test is the bound.
settings.register_profile("sandbox", deadline=None, print_blob=True)
settings.load_profile("sandbox")

LONGEST_FIRST = ("escape", "chaos", "acceptance", "contract", "integration", "architecture", "unit")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collecting makes some hundred thousand objects, and all of them stay: they are not looked through for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The last worker is not to play a long file while the others have nothing to do; within a directory: any order."""
    ranks = {path: _rank(path, config.rootpath) for path in {item.path for item in items}}
    items.sort(key=lambda item: ranks[item.path])


def _rank(path: Path, root: Path) -> int:
    return LONGEST_FIRST.index(path.relative_to(root / "tests").parts[0])
