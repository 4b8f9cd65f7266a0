"""Collects the evidence for the oracle: over HTTP, from files on disk, and with git."""

import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from chaos.oracle import WRITTEN_LINES_FILE, DownloadedArtifact, Evidence, TaskEvidence

CLEANUP_SECONDS = 10


def collect_evidence(deployment, kills):
    """Collect the evidence once every task has ended.

    kills: `{task id: (target, state at the kill, stdout read before)}`.
    """
    deployment.wait_for_all()
    tasks = [
        _collect_task(deployment, task_id, *kills.get(task_id, (None, "", b"")))
        for task_id in sorted(deployment.submitted)
    ]
    deadline = time.monotonic() + CLEANUP_SECONDS
    while (leftovers := deployment.find_leftovers()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for path in map(Path, leftovers.get("files", ())):
        if path.name == "runner.log":
            leftovers[str(path)] = path.read_text()
    return Evidence(
        set(deployment.acknowledged), _list_task_ids(deployment), [task for task in tasks if task], leftovers
    )


def _list_task_ids(deployment):
    listed, cursor = [], None
    while True:
        page = deployment.http.get(
            "/api/v1/tasks", params={"limit": 1000, **({"cursor": cursor} if cursor else {})}
        ).json()
        listed += [task["id"] for task in page["tasks"]]
        if not (cursor := page.get("next_cursor")):
            return listed


def _collect_task(deployment, task_id, target, state_at_kill, stdout_before):
    """Collect the evidence of one task. Return None if the task was never acknowledged and does not exist."""
    status = deployment.status(task_id)
    if "state" not in status and task_id not in deployment.acknowledged:
        return None
    if task_id not in deployment.acknowledged:
        status = deployment.wait(task_id, deployment.end_timeout_seconds)
    artifacts = list(_download(deployment, task_id))
    patch = next((artifact.content for artifact in artifacts if artifact.name == f"{task_id}.patch"), None)
    return TaskEvidence(
        task_id,
        target,
        state_at_kill,
        status,
        deployment.records(task_id),
        stdout_before=stdout_before,
        artifacts=artifacts,
        patched_lines=None if patch is None else _apply(deployment, patch),
        agent_sessions=deployment.agent_sessions(task_id),
        retries=deployment.submitted[task_id]["retries"],
        file_count=deployment.submitted[task_id]["files"],
    )


def _download(deployment, task_id):
    listed = deployment.http.get(f"/api/v1/tasks/{task_id}/artifacts").json()
    for entry in listed.get("artifacts", ()):
        response = deployment.http.get(f"/api/v1/tasks/{task_id}/artifacts/{quote(entry['name'], safe='')}")
        yield DownloadedArtifact(
            entry["name"], entry["size_bytes"], entry["checksum"], response.content if response.is_success else b""
        )


def _apply(deployment, patch):
    """Apply the patch to a clone of the base commit; return WRITTEN_LINES_FILE, or None if git rejects the patch."""
    clone = deployment.directory / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    git = ["git", "-c", "safe.directory=*", "-c", "core.autocrlf=false"]
    repository = str(deployment.repositories / "repo.git")
    subprocess.run([*git, "clone", "-q", "--shared", repository, str(clone)], check=True, timeout=60)
    apply = [*git, "apply", "--index", "--allow-empty", "-"]
    if subprocess.run(apply, cwd=clone, input=patch, capture_output=True, timeout=60, check=False).returncode:
        return None
    written_lines = clone / WRITTEN_LINES_FILE
    return written_lines.read_bytes() if written_lines.exists() else b""
