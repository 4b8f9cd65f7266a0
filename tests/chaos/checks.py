"""Gathers what the oracle judges, by HTTP, from the files on disk, and with git."""

import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from chaos.machine import END_SECONDS
from chaos.oracle import MARK, Evidence, Kept, Story
from doubles.leftovers import left_behind

GONE_SECONDS = 10


def examine(machine, blows):
    """Wait for every task's end, then look. blows: `{task id: (victim, state, stdout that was read before)}`."""
    machine.wait_for_all()
    stories = [_tell(machine, task_id, *blows.get(task_id, (None, "", b""))) for task_id in sorted(machine.orders)]
    deadline = time.monotonic() + GONE_SECONDS
    while (left := left_behind(machine.data_dir)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for path in map(Path, left.get("files", ())):
        if path.name == "runner.log":
            left[str(path)] = path.read_text()
    return Evidence(set(machine.acknowledged), _list(machine), [story for story in stories if story], left)


def _list(machine):
    listed, cursor = [], None
    while True:
        page = machine.http.get(
            "/api/v1/tasks", params={"limit": 1000, **({"cursor": cursor} if cursor else {})}
        ).json()
        listed += [task["id"] for task in page["tasks"]]
        if not (cursor := page.get("next_cursor")):
            return listed


def _tell(machine, task_id, victim, state, seen):
    """None for a task that was never acknowledged and is not there."""
    status = machine.status(task_id)
    if "state" not in status and task_id not in machine.acknowledged:
        return None
    if task_id not in machine.acknowledged:
        status = machine.wait(task_id, END_SECONDS)
    artifacts = list(_download(machine, task_id))
    patch = next((kept.content for kept in artifacts if kept.name == f"{task_id}.patch"), None)
    return Story(
        task_id,
        victim,
        state,
        status,
        machine.records(task_id),
        seen=seen,
        artifacts=artifacts,
        patched=None if patch is None else _apply(machine, patch),
        starts=machine.starts(task_id),
        retries=machine.orders[task_id]["retries"],
        files=machine.orders[task_id]["files"],
    )


def _download(machine, task_id):
    listed = machine.http.get(f"/api/v1/tasks/{task_id}/artifacts").json()
    for one in listed.get("artifacts", ()):
        answer = machine.http.get(f"/api/v1/tasks/{task_id}/artifacts/{quote(one['name'], safe='')}")
        yield Kept(one["name"], one["size_bytes"], one["checksum"], answer.content if answer.is_success else b"")


def _apply(machine, patch):
    """What MARK is after the patch, in a clone of the base commit; None when git refuses."""
    clone = machine.directory / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    git = ["git", "-c", "safe.directory=*", "-c", "core.autocrlf=false"]
    repository = str(machine.repositories / "repo.git")
    subprocess.run([*git, "clone", "-q", "--shared", repository, str(clone)], check=True, timeout=60)
    apply = [*git, "apply", "--index", "--allow-empty", "-"]
    if subprocess.run(apply, cwd=clone, input=patch, capture_output=True, timeout=60, check=False).returncode:
        return None
    mark = clone / MARK
    return mark.read_bytes() if mark.exists() else b""
