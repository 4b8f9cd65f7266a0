"""Collects the evidence for the oracle: by HTTP, from files on disk, and with git."""

import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from chaos.machine import END_SECONDS
from chaos.oracle import MARK, DownloadedArtifact, Evidence, TaskRecord
from doubles.leftovers import find_leftovers

CLEANUP_SECONDS = 10


def collect_evidence(machine, kills):
    """Wait until every task has ended, then collect. kills: `{task id: (target, state, stdout read before)}`."""
    machine.wait_for_all()
    tasks = [
        _collect_task(machine, task_id, *kills.get(task_id, (None, "", b""))) for task_id in sorted(machine.submitted)
    ]
    deadline = time.monotonic() + CLEANUP_SECONDS
    while (leftovers := find_leftovers(machine.data_dir)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for path in map(Path, leftovers.get("files", ())):
        if path.name == "runner.log":
            leftovers[str(path)] = path.read_text()
    return Evidence(set(machine.acknowledged), _list_task_ids(machine), [task for task in tasks if task], leftovers)


def _list_task_ids(machine):
    listed, cursor = [], None
    while True:
        page = machine.http.get(
            "/api/v1/tasks", params={"limit": 1000, **({"cursor": cursor} if cursor else {})}
        ).json()
        listed += [task["id"] for task in page["tasks"]]
        if not (cursor := page.get("next_cursor")):
            return listed


def _collect_task(machine, task_id, target, state, stdout_before):
    """None for a task that was never acknowledged and does not exist."""
    status = machine.status(task_id)
    if "state" not in status and task_id not in machine.acknowledged:
        return None
    if task_id not in machine.acknowledged:
        status = machine.wait(task_id, END_SECONDS)
    artifacts = list(_download(machine, task_id))
    patch = next((artifact.content for artifact in artifacts if artifact.name == f"{task_id}.patch"), None)
    return TaskRecord(
        task_id,
        target,
        state,
        status,
        machine.records(task_id),
        stdout_before=stdout_before,
        artifacts=artifacts,
        patched_mark=None if patch is None else _apply(machine, patch),
        agent_starts=machine.agent_starts(task_id),
        retries=machine.submitted[task_id]["retries"],
        files=machine.submitted[task_id]["files"],
    )


def _download(machine, task_id):
    listed = machine.http.get(f"/api/v1/tasks/{task_id}/artifacts").json()
    for entry in listed.get("artifacts", ()):
        response = machine.http.get(f"/api/v1/tasks/{task_id}/artifacts/{quote(entry['name'], safe='')}")
        yield DownloadedArtifact(
            entry["name"], entry["size_bytes"], entry["checksum"], response.content if response.is_success else b""
        )


def _apply(machine, patch):
    """Content of MARK in a clone of the base commit with the patch applied; None if git rejects the patch."""
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
