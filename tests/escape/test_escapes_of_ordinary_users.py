"""The same battery where the server is no root: sandboxes without a kernel uid of their own."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from doubles.leftovers import left_behind
from doubles.live_server import until
from escape.attack_runner import ATTACKS, Battlefield
from escape.verdict import judge_attack
from escape.verdicts import Outcome, judge_watch

pytestmark = pytest.mark.timeout(900)
USER = 64_321
ALL = [
    pytest.param(kind, one.name, id=f"{kind}: {one.name}")
    for kind in ("network", "credentials")
    for one in ATTACKS[kind]
]


@pytest.fixture(scope="module")
def field():
    if os.geteuid() != 0:
        pytest.skip("only root can play the internet")
    with tempfile.TemporaryDirectory(prefix="escape-") as directory:
        Path(directory).chmod(0o755)
        place = Path(directory, "field")
        place.mkdir()
        with ExitStack() as stack:
            try:
                played = stack.enter_context(Battlefield(place, "bubblewrap", user=USER))
            except AssertionError as error:
                if "The runtime bubblewrap does not work here" in str(error):
                    pytest.skip("bubblewrap does not work for ordinary users here, and the server says so")
                raise
            yield played


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_an_attack_has_the_declared_outcome_and_its_twin_works(field, kind, name):
    attack = next(one for one in ATTACKS[kind] if one.name == name)
    verdict = judge_attack(attack, field.tier, field.results[kind].get(name, {}), field.evidence)
    assert verdict.outcome is attack.declared(field.tier), verdict


def test_nothing_changed_on_the_host(field):
    verdict = judge_watch(field.evidence)
    assert verdict.outcome is Outcome.HELD, verdict


def test_it_was_no_root_that_served(field):
    assert Path(f"/proc/{field.world.server.said['pid']}").stat().st_uid == USER


def test_nothing_was_on_the_wire_but_what_is_allowed(field):
    assert field.sent <= field.allowed


def test_no_tool_of_the_host_obeyed_the_workspace(field):
    assert not field.mark.exists()
    assert b"+changed\n" in field.world.artifact("task-1.patch")


def test_nothing_is_left_of_the_tasks(field):
    until(lambda: not left_behind(field.world.data_dir), 10, "everything to be gone")
