"""The profile selects the contents of a sandbox: the host's /usr, or an imported image."""

import json
import signal
import subprocess
import sys

from doubles.deployment import bash_turn, reply_turn
from doubles.image_archives import directory, docker_archive, entry, layer, minimal_root, oci_archive

INSPECT_COMMAND = (
    "cat /opt/tools/marker; ls /usr/share >/dev/null 2>&1 || { echo bare; echo bare >bare.txt; }; "
    "git log -1 --format=%s; echo new >made.txt"
)


def profile_command(deployment, *arguments):
    """Run `sandbox profile …` on the server's machine."""
    argv = [sys.executable, "-m", "sandbox", "profile", *arguments, "--data-dir", str(deployment.data_dir)]
    result = subprocess.run(
        argv, capture_output=True, text=True, timeout=120, check=False, env={"PATH": "/usr/bin:/bin"}
    )
    return result.returncode, result.stdout, result.stderr


MANIFEST = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "A task"},
    "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
    "claude": {"prompt": "Do it."},
}


def test_images_are_built_and_used_and_removed_with_a_running_server(deploy, tmp_path):
    deployment = deploy(bash_turn(INSPECT_COMMAND), reply_turn())
    layers = minimal_root(), layer(directory("opt/tools"), entry("opt/tools/marker", b"my tools\n"))
    assert rejection_message(deployment, "my-tools").endswith(": agentic-dev, basic")
    image_in_use = build(deployment, "my-tools", oci_archive(tmp_path / "old.tar", *layers, compression="+gzip"))
    deployment.model.send_signal(signal.SIGSTOP)  # so that the task does not complete, and its image stays in use
    deployment.submit(vm={"profile": "my-tools"})
    deployment.wait_for_state("running")
    newer = layer(entry("opt/tools/marker", b"newer\n"))
    assert build(deployment, "my-tools", oci_archive(tmp_path / "new.tar", *layers, newer)) != image_in_use
    code, _, stderr = profile_command(deployment, "remove", "my-tools")
    assert (code, "A task uses the image" in stderr) == (4, True)
    deployment.model.send_signal(signal.SIGCONT)
    check_task_used(deployment, image_in_use)
    assert profile_command(deployment, "remove", "my-tools")[0] == 0

    deployment.submit("on-the-host", vm={"profile": "basic"})
    status = deployment.wait("on-the-host")
    assert (status["state"], status["vm"]["image"], status["vm"]["profile"]) == ("completed", "host", "basic")
    assert b"+bare" not in deployment.artifact("on-the-host.patch", "on-the-host")
    build(deployment, "basic", docker_archive(tmp_path / "tools.tar", *layers), "--minimum-tier", "vm")
    message = rejection_message(deployment, "basic")
    assert "tier vm or stronger; this server's runtime has tier namespaces" in message
    assert deployment.http.post("/api/v1/tasks?dry_run=true", json=MANIFEST).status_code == 200


def build(deployment, name, archive, *options):
    """Build the profile's image; return its name."""
    code, image, stderr = profile_command(deployment, "build", name, "--from-oci", str(archive), *options)
    assert code == 0, stderr
    return image.strip()


def rejection_message(deployment, profile):
    """Return the error message for a profile that is not offered."""
    response = deployment.http.post("/api/v1/tasks", json={**MANIFEST, "vm": {"profile": profile}})
    assert response.status_code == 400
    (detail,) = response.json()["details"]
    assert (detail["field"], detail["rule"]) == ("vm.profile", "not_offered")
    return detail["message"]


def check_task_used(deployment, image):
    status = deployment.wait()
    assert (status["state"], status["error"]) == ("completed", None), deployment.diagnostics()
    assert status["vm"]["image"] == image
    assert image.startswith("my-tools@sha256:")
    assert deployment.tool_results() == ["my tools\nbare\nBegin"]
    patch = deployment.artifact("task-1.patch")
    assert b"+new" in patch
    assert b"+bare" in patch
    assert json.loads(deployment.artifact("metadata.json"))["sandbox"]["image"] == image
