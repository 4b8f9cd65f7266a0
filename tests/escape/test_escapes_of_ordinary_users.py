"""The attacks with a server that does not run as root. Its sandboxes have no separate kernel uid."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from doubles.deployment import wait_until
from doubles.leftovers import find_leftovers
from escape.attack_run import ATTACKS, AttackRun
from escape.attack_verdict import judge_attack
from escape.run_verdicts import Outcome, judge_watch

pytestmark = pytest.mark.timeout(900)
USER = 64_321
ATTACK_PARAMETERS = [
    pytest.param(kind, one.name, id=f"{kind}: {one.name}")
    for kind in ("network", "credentials")
    for one in ATTACKS[kind]
]


@pytest.fixture(scope="module")
def attack_run():
    if os.geteuid() != 0:
        pytest.skip("needs root to set up network namespaces")
    with tempfile.TemporaryDirectory(prefix="escape-") as directory:
        Path(directory).chmod(0o755)
        run_directory = Path(directory, "run")
        run_directory.mkdir()
        with ExitStack() as stack:
            try:
                run = stack.enter_context(AttackRun(run_directory, "bubblewrap", user=USER))
            except AssertionError as error:
                if "The runtime bubblewrap does not work here" in str(error):
                    pytest.skip("bubblewrap does not work for ordinary users on this machine")
                raise
            yield run


@pytest.mark.parametrize(("kind", "name"), ATTACK_PARAMETERS)
def test_attack_has_the_expected_outcome_and_its_control_succeeds(attack_run, kind, name):
    attack = next(each for each in ATTACKS[kind] if each.name == name)
    verdict = judge_attack(attack, attack_run.runtime, attack_run.results[kind].get(name, {}), attack_run.evidence)
    assert verdict.outcome is attack.expected_outcome(attack_run.runtime), verdict


def test_host_is_unchanged(attack_run):
    verdict = judge_watch(attack_run.evidence)
    assert verdict.outcome is Outcome.REQUIREMENT_MET, verdict


def test_server_runs_as_an_ordinary_user(attack_run):
    assert Path(f"/proc/{attack_run.deployment.server.ready_message['pid']}").stat().st_uid == USER


def test_only_allowed_packets_were_sent(attack_run):
    assert attack_run.sent_packets <= attack_run.allowed_packets


def test_host_tools_ran_nothing_from_the_workspace(attack_run):
    assert not attack_run.execution_marker_file.exists()
    assert b"+changed\n" in attack_run.deployment.artifact("task-1.patch")


def test_no_leftovers_remain(attack_run):
    wait_until(lambda: not find_leftovers(attack_run.deployment.data_dir), 10, "the removal of all leftovers")
