"""The attacks with the gVisor runtime, except for attacks on the gateway, which does not depend on the runtime.

System calls are a hundred times slower in gVisor. `script/escape-battery` runs all attacks.
"""

import pytest

from escape.attack_run import ATTACKS_FOR_EACH_RUNTIME
from escape.escape_tests import EscapeTests, run_attacks


@pytest.fixture(scope="module")
def attack_run(tmp_path_factory):
    with run_attacks(tmp_path_factory.mktemp("gvisor"), "gvisor", ATTACKS_FOR_EACH_RUNTIME) as run:
        yield run


class TestEscapesOfGvisor(EscapeTests):
    pass
