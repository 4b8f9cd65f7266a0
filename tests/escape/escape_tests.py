"""Tests of the attacks and their controls. A control is the legitimate counterpart of an attack.

There is one test module per runtime, so that the tests of different runtimes can run in parallel.
"""

import re
import subprocess
from contextlib import ExitStack, contextmanager

import pytest

from doubles.deployment import wait_until
from doubles.leftovers import find_leftovers
from escape.attack_run import ATTACKS, HOST, AttackRun
from escape.attack_verdict import judge_attack
from escape.run_verdicts import Outcome, judge_watch

ATTACK_PARAMETERS = [
    pytest.param(kind, one.name, id=f"{kind}: {one.name}") for kind, attacks in ATTACKS.items() for one in attacks
]


@contextmanager
def run_attacks(directory, runtime, attacks=ATTACKS):
    """Run the attacks; skip the tests, with the remedy, if the runtime does not work on this machine."""
    with ExitStack() as stack:
        try:
            attack_run = stack.enter_context(AttackRun(directory, runtime, attacks=attacks))
        except AssertionError as error:
            reason = re.search(rf'The runtime {runtime} does not work here[^\n"]*', str(error))
            if reason is None:
                raise
            pytest.skip(reason[0])
        yield attack_run


def artifacts(attack_run):
    return attack_run.deployment.http.get("/api/v1/tasks/task-1/artifacts").json()["artifacts"]


@pytest.mark.timeout(1800)  # the first test runs all attacks
class EscapeTests:
    """Tests of the results of `attack_run`, a fixture that runs the attacks with one runtime."""

    @pytest.mark.parametrize(("kind", "name"), ATTACK_PARAMETERS)
    def test_attack_has_the_expected_outcome_and_its_control_succeeds(self, attack_run, kind, name):
        if name not in {each.name for each in attack_run.attacks[kind]}:
            pytest.skip(f"only runtime-specific attacks run with {attack_run.runtime}; script/escape-battery runs all")
        attack = next(each for each in attack_run.attacks[kind] if each.name == name)
        verdict = judge_attack(attack, attack_run.runtime, attack_run.results[kind].get(name, {}), attack_run.evidence)
        assert verdict.outcome is attack.expected_outcome(attack_run.runtime), verdict

    def test_host_is_unchanged(self, attack_run):
        verdict = judge_watch(attack_run.evidence)
        assert verdict.outcome is Outcome.REQUIREMENT_MET, verdict

    def test_only_allowed_packets_were_sent(self, attack_run):
        assert ("tcp", "8.8.4.4", 443) in attack_run.sent_packets
        assert attack_run.sent_packets <= attack_run.allowed_packets

    def test_denied_requests_did_not_reach_the_allowed_host(self, attack_run):
        assert {host.removesuffix(":80").removesuffix(":443") for _, _, host in attack_run.host_requests} == {HOST}
        assert not any("other.example" in line and "/away/" not in line for _, line, _ in attack_run.host_requests)

    def test_host_tools_ran_nothing_from_the_workspace(self, attack_run):
        assert not attack_run.execution_marker_file.exists()

    def test_patch_applies_and_preserves_file_bytes(self, attack_run, tmp_path):
        patch = attack_run.deployment.artifact("task-1.patch")
        assert b"+changed\n" in patch
        assert b"nested/file.txt" in patch
        assert b"\r" not in patch
        clone = tmp_path / "clone"
        repository = str(attack_run.deployment.repositories / "repo.git")
        subprocess.run(["git", "clone", "-q", repository, str(clone)], check=True, timeout=60)
        apply = ["git", "apply", "--index", "-"]
        applied = subprocess.run(apply, cwd=clone, input=patch, capture_output=True, timeout=60, check=False)
        assert applied.returncode == 0, applied.stderr
        assert (clone / "README.md").read_bytes() == b"# Hi\n\nchanged\n"

    def test_artifacts_are_regular_files_of_the_workspace(self, attack_run):
        paths = {artifact["path"] for artifact in artifacts(attack_run)}
        assert "out/plain.txt" in paths
        for name in ("link-to-the-host", "shadow", "environ", "fifo", "socket", "sparse", "root/"):
            assert not any(name in path for path in paths), name
        for artifact in artifacts(attack_run):
            content = attack_run.deployment.artifact(artifact["name"])
            assert b"the host's own" not in content or artifact["name"].endswith((".patch", ".ndjson", ".json"))

    def test_skipped_files_are_reported(self, attack_run):
        messages = [event["message"] for event in attack_run.deployment.wire_events() if event["type"] == "error"]
        for name in ("link-to-the-host", "sparse"):
            assert any(name in message for message in messages), name

    def test_artifact_names_have_no_control_characters(self, attack_run):
        names = [artifact[key] for artifact in artifacts(attack_run) for key in ("name", "path")]
        assert any("title" in name for name in names)
        assert not any(re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", name) for name in names), names

    def test_no_leftovers_remain(self, attack_run):
        wait_until(lambda: not find_leftovers(attack_run.deployment.data_dir), 10, "the removal of all leftovers")
