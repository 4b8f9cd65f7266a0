"""Fixtures: the checkout and its parsed modules."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def modules() -> list[Path]:
    """Every module in the project."""
    return sorted((ROOT / "src").rglob("*.py"))


@pytest.fixture(scope="session")
def trees(modules: list[Path]) -> dict[Path, ast.Module]:
    """The syntax tree of each module, parsed once."""
    return {path: ast.parse(path.read_text()) for path in modules}
