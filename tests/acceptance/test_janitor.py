"""After a crash, the next server removes the leftovers of finished tasks, and nothing else."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from doubles.deployment import Deployment, bash_turn, reply_turn, wait_until
from doubles.leftovers import cgroups, files, find_leftovers, is_clean, processes
from doubles.runner_processes import finalize_journal
from doubles.runtime_availability import require_runtime

SLEEP_COMMAND = "python3 -c 'import time; time.sleep(600)'"
CREATED_OBJECTS = {
    "the directory": lambda layout: layout.root.exists(),
    "the disk": lambda layout: layout.disk.exists() or layout.disk_image.exists(),
    "the clone": lambda layout: layout.host_git_directory.exists(),
    "the handle": lambda layout: layout.handle.exists(),
    "the control group": lambda layout: any(layout.root.name in one for one in cgroups(layout.root.parents[3])),
    "a process": lambda layout: any(f"sandbox:{layout.root.name}" in words for words in command_lines()),
}
"""The objects that an attempt creates, in order. The runner is stopped after each."""

RUNTIME_OBJECTS = ("the handle", "the control group", "a process")
"""Once one of these objects exists, the runner has used its runtime."""


def command_lines():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_text(errors="replace").replace("\0", " ")


def runner_pids(data_dir, task_id=""):
    """Return the pids of the runners that hold journal locks in this data directory, or the lock of the given task."""
    root, found = str(data_dir / "tasks" / task_id), set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            path, words = str(descriptor.readlink()), (descriptor.parents[1] / "cmdline").read_bytes()
            if path.startswith(root) and path.endswith("/lock") and b"sandbox.bootstrap.runner" in words:
                found.add(int(descriptor.parents[1].name))
    return found


def stop_runner_after_creation(deployment, task_id, exists):
    """Submit a task and pause its runner as soon as `exists` returns true for the layout of its attempt."""
    deployment.submit(task_id, vm={"cpus": 1, "memory": "512M", "disk": "256M"})
    layout = attempt_layout(deployment, task_id)
    wait_until(lambda: exists(layout), description=f"the object of {task_id}", pause_max=0.02)
    for pid in runner_pids(deployment.data_dir, task_id):
        os.kill(pid, signal.SIGSTOP)


def crash_and_finalize_journals(deployment, *task_ids):
    """Kill the server and the runners, and finalize the tasks' journals."""
    deployment.server.stop(signal.SIGKILL)
    for task_id in task_ids:
        for pid in runner_pids(deployment.data_dir, task_id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        finalize_journal(deployment.data_dir, task_id)


def attempt_layout(deployment, task_id):
    from sandbox.interfaces.task_file_layout import TaskLayout

    root = TaskLayout(deployment.data_dir, task_id).root / "attempts"
    names = wait_until(lambda: root.exists() and [path.name for path in root.iterdir()], description="an attempt")
    return TaskLayout(deployment.data_dir, task_id).attempt(names[0])


@pytest.mark.parametrize(
    ("runtime", "object_names"),
    [("bubblewrap", tuple(CREATED_OBJECTS)), ("gvisor", RUNTIME_OBJECTS)],
    ids=["bubblewrap", "gvisor"],
)
def test_leftovers_of_a_crash_are_removed_at_startup(deploy, runtime, object_names, deployment, tmp_path):
    require_runtime(runtime, tmp_path / "probe")
    deployment.runtime = runtime
    deployment = deploy(bash_turn(SLEEP_COMMAND), reply_turn())
    tasks = {f"task-{number}": object_name for number, object_name in enumerate(object_names)}
    for task_id, object_name in tasks.items():
        stop_runner_after_creation(deployment, task_id, CREATED_OBJECTS[object_name])
    crash_and_finalize_journals(deployment, *tasks)
    assert {"files", "cgroups"} <= find_leftovers(deployment.data_dir).keys() or os.geteuid() != 0
    deployment.start_server()
    wait_until(lambda: is_clean(deployment.data_dir), 60, f"no leftovers of {object_names}")
    assert {deployment.status(task_id)["error"]["code"] for task_id in tasks} == {"runner_lost"}


def sweep_condition(deployment):
    """Return a condition that is true at the end of the janitor's round, which removes incomplete images last."""
    incomplete_image = deployment.data_dir / "profiles" / "half-made" / "part"
    incomplete_image.mkdir(parents=True)
    return lambda: not incomplete_image.exists()


def test_sandboxes_of_running_and_preserved_tasks_and_of_other_servers_are_kept(deploy, tmp_path):
    deployment = deploy(bash_turn(SLEEP_COMMAND), reply_turn())
    other_deployment = Deployment(make_directory(tmp_path / "other"))
    other_deployment.model_url = deployment.model_url
    (other_deployment.home / ".gitconfig").write_text((deployment.home / ".gitconfig").read_text())
    with contextlib.closing(other_deployment):
        other_deployment.start_server()
        vm = {"disk": "1G"}  # all these sandboxes fit on a small disk
        other_deployment.submit("other", vm=vm)
        deployment.submit("kept", vm=vm, lifecycle={"timeout": "1s", "failure_action": "preserve"})
        deployment.submit("running", vm=vm)
        deployment.submit("lost", vm=vm)
        assert deployment.wait("kept")["state"] == "failed_preserved"
        for each, task_id in ((other_deployment, "other"), (deployment, "running"), (deployment, "lost")):
            each.wait_for_state("running", task_id)
        kept_layouts = [
            attempt_layout(other_deployment, "other"),
            *(attempt_layout(deployment, name) for name in ("running", "kept")),
        ]
        crash_and_finalize_journals(deployment, "lost")
        before = [attempt_files(layout) for layout in kept_layouts]
        is_finished = sweep_condition(deployment)
        deployment.start_server()
        wait_until(is_finished, 30, "the end of the janitor's round")
        assert [attempt_files(layout) for layout in kept_layouts] == before
        assert [path.name for path in attempt_layout(deployment, "lost").root.iterdir()] == ["runner.log"]
        assert (deployment.status("running")["state"], other_deployment.status("other")["state"]) == (
            "running",
            "running",
        )
        assert deployment.http.delete("/api/v1/tasks/kept/vm").is_success


def make_directory(path):
    path.mkdir()
    return path


def attempt_files(layout):
    """Return the processes, control groups and files of one attempt."""
    data_dir, attempt_id = layout.root.parents[3], layout.root.name
    marked = {one for one in processes(data_dir) if f"sandbox:{attempt_id}" in one[1]}
    return marked, {one for kind in (cgroups, files) for one in kind(data_dir) if attempt_id in one}
