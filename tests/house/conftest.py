"""Where this house stands."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def modules() -> list[Path]:
    """Every module of the project."""
    return sorted((ROOT / "src").rglob("*.py"))
