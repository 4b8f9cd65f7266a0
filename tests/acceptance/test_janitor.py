"""What crashes leave of tasks that are over is cleared away when a server starts, and nothing of anybody else."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from doubles.leftovers import cgroups, files, is_clean, left_behind, processes
from doubles.live_server import World, bash, says, until
from doubles.runners import end_books
from doubles.runtimes import need_runtime

LONG = "python3 -c 'import time; time.sleep(600)'"
STEPS = {
    "the directory": lambda files_: files_.root.exists(),
    "the disk": lambda files_: files_.disk.exists() or files_.disk_image.exists(),
    "the clone": lambda files_: files_.repository.exists(),
    "the handle": lambda files_: files_.handle.exists(),
    "the control group": lambda files_: any(files_.root.name in one for one in cgroups(files_.root.parents[3])),
    "a process": lambda files_: any(f"sandbox:{files_.root.name}" in words for words in command_lines()),
}
"""What an attempt makes, in its order; each is a moment to die in."""

STEPS_OF_A_RUNTIME = ("the handle", "the control group", "a process")
"""Before these a runner has not spoken to its runtime."""


def command_lines():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_text(errors="replace").replace("\0", " ")


def runner_pids(data_dir, task_id=""):
    """All who hold the lock of a journal of this server's, or of this task's, the server apart."""
    root, found = str(data_dir / "tasks" / task_id), set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            path, words = str(descriptor.readlink()), (descriptor.parents[1] / "cmdline").read_bytes()
            if path.startswith(root) and path.endswith("/lock") and b"sandbox.bootstrap.runner" in words:
                found.add(int(descriptor.parents[1].name))
    return found


def stop_at(machine, task_id, has_come):
    """Its runner stands still as soon as this is there."""
    machine.submit(task_id, vm={"cpus": 1, "memory": "512M", "disk": "256M"})
    attempt = attempt_of(machine, task_id)
    until(lambda: has_come(attempt), what=f"{task_id} to be there", pause_max=0.02)
    for pid in runner_pids(machine.data_dir, task_id):
        os.kill(pid, signal.SIGSTOP)


def crash(machine, *task_ids):
    """Server and runners at once, and the books of the tasks are ended."""
    machine.server.stop(signal.SIGKILL)
    for task_id in task_ids:
        for pid in runner_pids(machine.data_dir, task_id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        end_books(machine.data_dir, task_id)


def attempt_of(machine, task_id):
    from sandbox.interfaces.layout import TaskLayout

    root = TaskLayout(machine.data_dir, task_id).root / "attempts"
    names = until(lambda: root.exists() and [path.name for path in root.iterdir()], what="an attempt")
    return TaskLayout(machine.data_dir, task_id).attempt(names[0])


@pytest.mark.parametrize(
    ("runtime", "steps"),
    [("bubblewrap", tuple(STEPS)), ("gvisor", STEPS_OF_A_RUNTIME)],
    ids=["bubblewrap", "gvisor"],
)
def test_whatever_was_made_when_all_died_is_gone_when_the_next_server_has_started(
    world, runtime, steps, empty_world, tmp_path
):
    need_runtime(runtime, tmp_path / "probe")
    empty_world.runtime = runtime
    machine = world(bash(LONG), says())
    tasks = {f"task-{number}": what for number, what in enumerate(steps)}
    for task_id, what in tasks.items():
        stop_at(machine, task_id, STEPS[what])
    crash(machine, *tasks)
    assert {"files", "cgroups"} <= left_behind(machine.data_dir).keys() or os.geteuid() != 0
    machine.start_server()
    until(lambda: is_clean(machine.data_dir), 60, f"nothing to be left of deaths at {steps}")
    assert {machine.status(task_id)["error"]["code"] for task_id in tasks} == {"runner_lost"}


def round_has_ended(machine):
    """The janitor's last duty, incomplete images, comes after everything else."""
    half_made = machine.data_dir / "profiles" / "half-made" / "part"
    half_made.mkdir(parents=True)
    return lambda: not half_made.exists()


def test_a_living_neighbour_and_what_is_preserved_are_let_alone(world, tmp_path):
    machine = world(bash(LONG), says())
    neighbour = World(make_directory(tmp_path / "next-door"))
    neighbour.model_url = machine.model_url
    (neighbour.home / ".gitconfig").write_text((machine.home / ".gitconfig").read_text())
    with contextlib.closing(neighbour):
        neighbour.start_server()
        vm = {"disk": "1G"}  # there is room for all of them at once on a small disk too
        neighbour.submit("next-door", vm=vm)
        machine.submit("kept", vm=vm, lifecycle={"timeout": "1s", "failure_action": "preserve"})
        machine.submit("living", vm=vm)
        machine.submit("lost", vm=vm)
        assert machine.wait("kept")["state"] == "failed_preserved"
        for here, task_id in ((neighbour, "next-door"), (machine, "living"), (machine, "lost")):
            here.until_state("running", task_id)
        others = [attempt_of(neighbour, "next-door"), *(attempt_of(machine, name) for name in ("living", "kept"))]
        crash(machine, "lost")
        before = [traces_of(attempt) for attempt in others]
        has_ended = round_has_ended(machine)
        machine.start_server()
        until(has_ended, 30, "the end of the janitor's round")
        assert [traces_of(attempt) for attempt in others] == before
        assert [path.name for path in attempt_of(machine, "lost").root.iterdir()] == ["runner.log"]
        assert (machine.status("living")["state"], neighbour.status("next-door")["state"]) == ("running", "running")
        assert machine.http.delete("/api/v1/tasks/kept/vm").is_success


def make_directory(path):
    path.mkdir()
    return path


def traces_of(attempt):
    """The sandbox's own processes, control groups and files of one attempt."""
    data_dir, attempt_id = attempt.root.parents[3], attempt.root.name
    marked = {one for one in processes(data_dir) if f"sandbox:{attempt_id}" in one[1]}
    return marked, {one for kind in (cgroups, files) for one in kind(data_dir) if attempt_id in one}
