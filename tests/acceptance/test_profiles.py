"""What is in a sandbox is its profile's to say: the host's own /usr, or an image that was built or brought."""

import json
import subprocess
import sys

import pytest

from doubles.image_archives import directory, docker_archive, entry, layer, oci_archive, small_root
from doubles.live import bash, says, until

LOOK = "cat /opt/tools/marker; ls /usr/share >/dev/null 2>&1 || echo bare; git log -1 --format=%s; echo new >made.txt"


def sandbox(world, *arguments):
    """Run `sandbox profile …` on the machine of the server."""
    argv = [sys.executable, "-m", "sandbox", "profile", *arguments, "--data-dir", str(world.data_dir)]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, env={"PATH": "/usr/bin:/bin"})
    return ran.returncode, ran.stdout, ran.stderr


@pytest.fixture(scope="module")
def layers():
    """A small root, and a layer above it."""
    return small_root(), layer(directory("opt/tools"), entry("opt/tools/marker", b"my tools\n"))


def test_claude_code_works_in_an_image_that_was_imported_while_the_server_ran(world, layers, tmp_path):
    user = world(bash(LOOK), says())
    refused = user.http.post("/api/v1/tasks", json={**MANIFEST, "vm": {"profile": "my-tools"}})
    assert refused.status_code == 400
    (mistake,) = refused.json()["details"]
    assert (mistake["field"], mistake["rule"]) == ("vm.profile", "not_offered")
    assert mistake["message"].endswith(": agentic-dev, basic")

    archive = oci_archive(tmp_path / "tools.tar", *layers, packing="+gzip")
    code, name, told = sandbox(user, "build", "my-tools", "--from-oci", str(archive))
    assert code == 0, told

    user.submit(vm={"profile": "my-tools"})
    status = user.wait()
    assert (status["state"], status["error"]) == ("completed", None), user.tell()
    assert status["vm"]["image"] == name.strip()
    assert status["vm"]["image"].startswith("my-tools@sha256:")
    assert user.tool_results() == ["my tools\nbare\nBegin"]
    assert b"+new" in user.artifact("task-1.patch")
    assert json.loads(user.artifact("metadata.json"))["sandbox"]["image"] == name.strip()


def test_without_an_image_the_hosts_own_usr_serves_and_the_status_says_so(world):
    user = world(bash("ls -d /usr/share"), says())
    user.submit(vm={"profile": "basic"})
    status = user.wait()
    assert (status["state"], status["vm"]["image"], status["vm"]["profile"]) == ("completed", "host", "basic")
    assert user.tool_results() == ["/usr/share"]


def test_a_profile_that_asks_for_a_stronger_runtime_is_refused(world, layers, tmp_path):
    user = world(says())
    archive = docker_archive(tmp_path / "tools.tar", *layers)
    assert sandbox(user, "build", "basic", "--from-oci", str(archive), "--minimum-tier", "vm")[0] == 0
    refused = user.http.post("/api/v1/tasks", json={**MANIFEST, "vm": {"profile": "basic"}})
    assert refused.status_code == 400
    (mistake,) = refused.json()["details"]
    assert mistake["rule"] == "not_offered"
    assert "tier vm or a stronger one; this server's is of the tier namespaces" in mistake["message"]
    assert user.http.post("/api/v1/tasks", json=MANIFEST).status_code == 202


def test_an_image_is_kept_for_the_task_that_uses_it(world, layers, tmp_path):
    user = world(bash("cat /opt/tools/marker"), bash("until [ -e go ]; do sleep 1; done"))
    old = oci_archive(tmp_path / "old.tar", *layers)
    new = oci_archive(tmp_path / "new.tar", *layers, layer(entry("opt/tools/marker", b"newer\n")))
    _, used, _ = sandbox(user, "build", "my-tools", "--from-oci", str(old))
    user.submit(vm={"profile": "my-tools"})
    until(lambda: user.model_requests() and user.tool_results() == ["my tools"], what="the agent to look at its image")
    _, current, _ = sandbox(user, "build", "my-tools", "--from-oci", str(new))
    assert current != used
    code, _, told = sandbox(user, "remove", "my-tools")
    assert (code, "A task uses the image" in told) == (4, True)
    assert user.http.delete("/api/v1/tasks/task-1?force=true").status_code == 200
    assert user.wait()["vm"]["image"] == used.strip()
    assert sandbox(user, "remove", "my-tools")[0] == 0


MANIFEST = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "A task"},
    "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
    "claude": {"prompt": "Do it."},
}
