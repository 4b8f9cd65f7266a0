"""The attacks with the bubblewrap runtime."""

import pytest

from escape.escape_tests import EscapeTests, run_attacks


@pytest.fixture(scope="module")
def attack_run(tmp_path_factory):
    with run_attacks(tmp_path_factory.mktemp("bubblewrap"), "bubblewrap") as run:
        yield run


class TestEscapesOfBubblewrap(EscapeTests):
    pass
