"""The battery of attacks, each beside its legitimate twin, over one tier: a file a tier, to play them side by side."""

import re
import subprocess
from contextlib import ExitStack, contextmanager

import pytest

from doubles.leftovers import left_behind
from doubles.live_server import until
from escape.attack_runner import ATTACKS, HOST, Battlefield
from escape.verdict import judge_attack
from escape.verdicts import Outcome, judge_watch

ALL = [pytest.param(kind, one.name, id=f"{kind}: {one.name}") for kind, attacks in ATTACKS.items() for one in attacks]


@contextmanager
def fought(directory, tier, attacks=ATTACKS):
    """What came of the attacks; skips, with what to mend, where the server says that the tier does not work here."""
    with ExitStack() as stack:
        try:
            field = stack.enter_context(Battlefield(directory, tier, attacks=attacks))
        except AssertionError as error:
            told = re.search(rf'The runtime {tier} does not work here[^\n"]*', str(error))
            if told is None:
                raise
            pytest.skip(told[0])
        yield field


def artifacts(field):
    return field.world.http.get("/api/v1/tasks/task-1/artifacts").json()["artifacts"]


@pytest.mark.timeout(1800)  # the first plays all of it
class Held:
    """What is asked of `field`, the battlefield of a tier."""

    @pytest.mark.parametrize(("kind", "name"), ALL)
    def test_an_attack_has_the_declared_outcome_and_its_twin_works(self, field, kind, name):
        if name not in {one.name for one in field.attacks[kind]}:
            pytest.skip(
                f"{field.tier} is asked what it may answer in a way of its own; script/escape-battery asks it all"
            )
        attack = next(one for one in field.attacks[kind] if one.name == name)
        verdict = judge_attack(attack, field.tier, field.results[kind].get(name, {}), field.evidence)
        assert verdict.outcome is attack.declared(field.tier), verdict

    def test_nothing_changed_on_the_host(self, field):
        verdict = judge_watch(field.evidence)
        assert verdict.outcome is Outcome.HELD, verdict

    def test_nothing_was_on_the_wire_but_what_the_manifest_and_the_server_need(self, field):
        assert ("tcp", "8.8.4.4", 443) in field.sent
        assert field.sent <= field.allowed

    def test_the_allowed_host_was_asked_for_nothing_that_was_refused(self, field):
        assert {host.removesuffix(":80").removesuffix(":443") for _, _, host in field.asked} == {HOST}
        assert not any("other.example" in line and "/away/" not in line for _, line, _ in field.asked)

    def test_no_tool_of_the_host_obeyed_the_workspace(self, field):
        assert not field.mark.exists()

    def test_the_patch_has_the_bytes_of_the_files_and_applies(self, field, tmp_path):
        patch = field.world.artifact("task-1.patch")
        assert b"+changed\n" in patch
        assert b"nested/file.txt" in patch
        assert b"\r" not in patch
        clone = tmp_path / "clone"
        repository = str(field.world.repositories / "repo.git")
        subprocess.run(["git", "clone", "-q", repository, str(clone)], check=True, timeout=60)
        apply = ["git", "apply", "--index", "-"]
        applied = subprocess.run(apply, cwd=clone, input=patch, capture_output=True, timeout=60, check=False)
        assert applied.returncode == 0, applied.stderr
        assert (clone / "README.md").read_bytes() == b"# Hi\n\nchanged\n"

    def test_artifacts_are_regular_files_of_the_workspace_and_nothing_else(self, field):
        paths = {artifact["path"] for artifact in artifacts(field)}
        assert "out/plain.txt" in paths
        for name in ("link-to-the-host", "shadow", "environ", "fifo", "socket", "sparse", "root/"):
            assert not any(name in path for path in paths), name
        for artifact in artifacts(field):
            content = field.world.artifact(artifact["name"])
            assert b"the host's own" not in content or artifact["name"].endswith((".patch", ".ndjson", ".json"))

    def test_what_is_left_out_is_told(self, field):
        told = [frame["message"] for frame in field.world.frames() if frame["type"] == "error"]
        for name in ("link-to-the-host", "sparse"):
            assert any(name in message for message in told), name

    def test_no_name_of_the_agents_moves_a_terminal(self, field):
        names = [artifact[key] for artifact in artifacts(field) for key in ("name", "path")]
        assert any("title" in name for name in names)
        assert not any(re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", name) for name in names), names

    def test_nothing_is_left_on_the_machine(self, field):
        until(lambda: not left_behind(field.world.data_dir), 10, "everything to be gone")
