"""One battery of attacks over every tier, each beside its legitimate twin."""

import re
import subprocess

import pytest

from doubles.live import until
from doubles.tiers import QEMU_WHOLE, need_runtime
from doubles.traces import left_behind
from escape.battlefield import ATTACKS, HOST, Battlefield
from escape.verdicts import is_held

pytestmark = pytest.mark.timeout(1800)  # the first of a tier plays all of it
SAMPLE = {"network": ATTACKS["network"][::8], "credentials": ATTACKS["credentials"][::8], "resources": ()}
TIERS = {"bubblewrap": ATTACKS, "gvisor": ATTACKS, "qemu": ATTACKS if QEMU_WHOLE else SAMPLE}
ALL = [pytest.param(kind, one.name, id=f"{kind}: {one.name}") for kind, attacks in ATTACKS.items() for one in attacks]


@pytest.fixture(scope="module", params=TIERS)
def field(request, tmp_path_factory):
    """What came of the attacks on this tier."""
    need_runtime(request.param, tmp_path_factory.mktemp("run"))
    with Battlefield(tmp_path_factory.mktemp(request.param), request.param, attacks=TIERS[request.param]) as played:
        yield played


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_an_attack_fails_and_its_twin_works(field, kind, name):
    if name not in {one.name for one in field.attacks[kind]}:
        pytest.skip(f"{field.tier} is asked for a sample; script/test-qemu and script/escape-battery ask it everything")
    came_of_it = field.results[kind][name]
    assert is_held(came_of_it), came_of_it


def test_nothing_was_on_the_wire_but_what_the_manifest_and_the_server_need(field):
    assert ("tcp", "8.8.4.4", 443) in field.sent
    assert field.sent <= field.allowed


def test_the_allowed_host_was_asked_for_nothing_that_was_refused(field):
    assert {host.removesuffix(":80").removesuffix(":443") for _, _, host in field.asked} == {HOST}
    assert not any("other.example" in line and "/away/" not in line for _, line, _ in field.asked)


def test_no_tool_of_the_host_obeyed_the_workspace(field):
    assert not field.mark.exists()


def test_the_patch_has_the_bytes_of_the_files_and_applies(field, tmp_path):
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


def artifacts(field):
    return field.world.http.get("/api/v1/tasks/task-1/artifacts").json()["artifacts"]


def test_artifacts_are_regular_files_of_the_workspace_and_nothing_else(field):
    paths = {artifact["path"] for artifact in artifacts(field)}
    assert "out/plain.txt" in paths
    for name in ("link-to-the-host", "shadow", "environ", "fifo", "socket", "sparse", "root/"):
        assert not any(name in path for path in paths), name
    for artifact in artifacts(field):
        content = field.world.artifact(artifact["name"])
        assert b"the host's own" not in content or artifact["name"].endswith((".patch", ".ndjson", ".json"))


def test_what_is_left_out_is_told(field):
    told = [frame["message"] for frame in field.world.frames() if frame["type"] == "error"]
    for name in ("link-to-the-host", "sparse"):
        assert any(name in message for message in told), name


def test_no_name_of_the_agents_moves_a_terminal(field):
    names = [artifact[key] for artifact in artifacts(field) for key in ("name", "path")]
    assert any("title" in name for name in names)
    assert not any(re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", name) for name in names), names


def test_nothing_is_left_on_the_machine(field):
    until(lambda: not left_behind(field.world.data_dir), 10, "everything to be gone")
