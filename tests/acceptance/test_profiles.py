"""What is in a sandbox is its profile's to say: the host's own /usr, or an image that was built or brought."""

import json
import signal
import subprocess
import sys

from doubles.image_archives import directory, docker_archive, entry, layer, oci_archive, small_root
from doubles.live_server import bash, says

LOOK = (
    "cat /opt/tools/marker; ls /usr/share >/dev/null 2>&1 || { echo bare; echo bare >bare.txt; }; "
    "git log -1 --format=%s; echo new >made.txt"
)


def sandbox(world, *arguments):
    """Run `sandbox profile …` on the machine of the server."""
    argv = [sys.executable, "-m", "sandbox", "profile", *arguments, "--data-dir", str(world.data_dir)]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, env={"PATH": "/usr/bin:/bin"})
    return ran.returncode, ran.stdout, ran.stderr


MANIFEST = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "A task"},
    "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
    "claude": {"prompt": "Do it."},
}


def test_images_are_built_and_removed_beside_a_server_and_its_tasks_work_in_them(world, tmp_path):
    user = world(bash(LOOK), says())
    layers = small_root(), layer(directory("opt/tools"), entry("opt/tools/marker", b"my tools\n"))
    assert refusal_of(user, "my-tools").endswith(": agentic-dev, basic")
    used = build(user, "my-tools", oci_archive(tmp_path / "old.tar", *layers, packing="+gzip"))
    user.model.tell(signal.SIGSTOP)  # so long no agent comes to look at its image
    user.submit(vm={"profile": "my-tools"})
    user.until_state("running")
    newer = layer(entry("opt/tools/marker", b"newer\n"))
    assert build(user, "my-tools", oci_archive(tmp_path / "new.tar", *layers, newer)) != used
    code, _, told = sandbox(user, "remove", "my-tools")
    assert (code, "A task uses the image" in told) == (4, True)
    user.model.tell(signal.SIGCONT)
    assert_worked_in(user, used)
    assert sandbox(user, "remove", "my-tools")[0] == 0

    user.submit("on-the-host", vm={"profile": "basic"})
    status = user.wait("on-the-host")
    assert (status["state"], status["vm"]["image"], status["vm"]["profile"]) == ("completed", "host", "basic")
    assert b"+bare" not in user.artifact("on-the-host.patch", "on-the-host")
    build(user, "basic", docker_archive(tmp_path / "tools.tar", *layers), "--minimum-tier", "vm")
    said = refusal_of(user, "basic")
    assert "tier vm or stronger; this server's has tier namespaces" in said
    assert user.http.post("/api/v1/tasks?dry_run=true", json=MANIFEST).status_code == 200


def build(user, name, archive, *words):
    """Gives the name of the image."""
    code, image, told = sandbox(user, "build", name, "--from-oci", str(archive), *words)
    assert code == 0, told
    return image.strip()


def refusal_of(user, profile):
    """What is said to who asks for a profile that is not offered."""
    refused = user.http.post("/api/v1/tasks", json={**MANIFEST, "vm": {"profile": profile}})
    assert refused.status_code == 400
    (mistake,) = refused.json()["details"]
    assert (mistake["field"], mistake["rule"]) == ("vm.profile", "not_offered")
    return mistake["message"]


def assert_worked_in(user, image):
    status = user.wait()
    assert (status["state"], status["error"]) == ("completed", None), user.tell()
    assert status["vm"]["image"] == image
    assert image.startswith("my-tools@sha256:")
    assert user.tool_results() == ["my tools\nbare\nBegin"]
    patch = user.artifact("task-1.patch")
    assert b"+new" in patch
    assert b"+bare" in patch
    assert json.loads(user.artifact("metadata.json"))["sandbox"]["image"] == image
