"""A chain of tasks, each of which continues the previous one, and tasks that are run again."""

import json
import signal

import pytest

from doubles.deployment import bash_turn, git, make_repository, reply_turn

FILES = {"README.md": "# Hi\n", "count.txt": "0\n"}
SECRET = "the-value-of-the-secret-5521"
STEPS = (
    (bash_turn("echo 1 > count.txt; echo one > one.txt"), reply_turn("One is there.")),
    (bash_turn("cat count.txt one.txt; echo 2 > count.txt; git mv one.txt renamed.txt"), reply_turn("Two is there.")),
    (bash_turn("true"), reply_turn("Nothing to do.")),
    (bash_turn("echo 4 > count.txt; printf '\\000\\001' > data.bin; cat renamed.txt"), reply_turn("Four is there.")),
)


def submit_derived_task(deployment, task_id, action="continue", **body):
    response = deployment.http.post(f"/api/v1/tasks/{task_id}/{action}", json=body)
    assert response.status_code == 202, response.text
    return response.json()["task_id"]


def checkout(deployment, directory, *patches):
    """Clone the first commit and apply the patches in order; return the content of each file."""
    git("clone", "-q", str(deployment.repositories / "repo.git"), str(directory), cwd=deployment.directory)
    git("checkout", "-q", deployment.commit, cwd=directory)
    for number, patch in enumerate(patches):
        if patch:
            (directory.parent / f"{number}.patch").write_bytes(patch)
            git("apply", "--index", str(directory.parent / f"{number}.patch"), cwd=directory)
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def newest_messages(deployment):
    """Return the conversation in the newest request to the model, as JSON."""
    bodies = [json.loads(one["body"]) for one in deployment.model_requests() if one["method"] == "POST"]
    return json.dumps(bodies[-1]["messages"])


@pytest.mark.usefixtures("without_command_fork_server")
def test_chain_of_three_continuations_resumes_the_session(deploy_and_check_leftovers, tmp_path):
    deployment = deploy_and_check_leftovers(*(turn for step in STEPS for turn in step), files=FILES)
    chain = [deployment.submit("first", metadata={"name": "A task", "id": "first", "labels": {"team": "a"}})]
    assert deployment.wait("first")["state"] == "completed", deployment.diagnostics("first")
    push_another_commit(deployment, tmp_path)
    for number in range(1, len(STEPS)):
        chain.append(
            submit_derived_task(
                deployment, chain[-1], prompt=f"Step {number}", overrides=[f"metadata.id=step-{number}"]
            )
        )
        status = deployment.wait(chain[-1])
        assert status["state"] == "completed", deployment.diagnostics(chain[-1])
        assert (status["parent"], status["continues"]) == (chain[-2], "session")
        assert status["result"]["result"] == STEPS[number][1].content[0].text
        assert status["labels"] == {"team": "a"}
        assert status["definition"]["repository"]["commit"] == deployment.commit
    assert (deployment.status("first")["parent"], deployment.status("first")["continues"]) == (None, None)
    check_patches(deployment, chain, tmp_path)
    tool_results = deployment.tool_results()
    assert len(tool_results) == len(STEPS)
    assert tool_results[1] == "1\none"
    listed = deployment.http.get("/api/v1/tasks").json()["tasks"]
    assert {task["id"]: task["parent"] for task in listed if task["id"] in chain} == dict(
        zip(chain, [None, *chain], strict=False)
    )
    assert not any("session" in name or "inherited" in name for name in deployment.artifact_names(chain[-1]))
    for name in ("agent-session.gz", ".sandbox/agent-session.gz", "inherited-1.patch", "inherited-agent-session.gz"):
        assert deployment.http.get(f"/api/v1/tasks/{chain[-1]}/artifacts/{name}").status_code == 404


def push_another_commit(deployment, tmp_path):
    """Move the branch. A task that continues another one still starts from its parent's commit."""
    work = tmp_path / "push"
    git("clone", "-q", str(deployment.repositories / "repo.git"), str(work), cwd=tmp_path)
    (work / "count.txt").write_text("100\n")
    git("commit", "-qam", "Another", cwd=work)
    git("push", "-q", "origin", "main", cwd=work)


def check_patches(deployment, chain, tmp_path):
    patches = [deployment.artifact(f"{task_id}.patch", task_id) for task_id in chain]
    assert patches[2] == b""
    assert b"one.txt" not in patches[3]
    (tmp_path / "each").mkdir()
    (tmp_path / "whole").mkdir()
    one_by_one = checkout(deployment, tmp_path / "each" / "work", *patches)
    whole = deployment.artifact(f"{chain[-1]}.chain.patch", chain[-1])
    assert checkout(deployment, tmp_path / "whole" / "work", whole) == one_by_one
    assert one_by_one == {
        "README.md": b"# Hi\n",
        "count.txt": b"4\n",
        "renamed.txt": b"one\n",
        "data.bin": b"\0\1",
    }
    assert f"{chain[0]}.chain.patch" not in deployment.artifact_names(chain[0])


def test_parent_with_a_secret_in_its_session_is_continued_with_text(deployment, deploy):
    deployment.forks = False
    second = (bash_turn("cat one.txt"), reply_turn("The second is done."))
    branches = {"SECOND": second}
    deployment.start_git()
    first = bash_turn("echo one > one.txt; echo $TOKEN")
    deployment = deploy_with_secret(deployment, first, reply_turn("The first is done."), branches=branches)
    secrets = [{"name": "TOKEN", "source": "env", "key": "MY_TOKEN"}]
    deployment.submit("first", secrets=secrets, claude={"prompt": "Do the FIRST thing."})
    assert deployment.wait("first")["state"] == "completed", deployment.diagnostics("first")
    task_id = submit_derived_task(deployment, "first", prompt="Now the SECOND thing.")
    status = deployment.wait(task_id)
    assert status["state"] == "completed", deployment.diagnostics(task_id)
    assert (status["parent"], status["continues"]) == ("first", "context")
    assert status["result"]["result"] == "The second is done."
    sent = newest_messages(deployment)
    assert '"content": "one' in sent
    for text in ("Do the FIRST thing.", "The first is done.", "[REDACTED:TOKEN]", "Now the SECOND thing."):
        assert text in sent
    assert SECRET not in sent
    assert list(deployment.data_dir.glob("tasks/first/**/*session*")) == []
    assert not any(SECRET.encode() in path.read_bytes() for path in deployment.data_dir.glob("tasks/*/artifacts/*"))


def deploy_with_secret(deployment, *turns, **script):
    deployment.start_model(*turns, **script)
    deployment.start_server(MY_TOKEN=SECRET)
    deployment.commit = make_repository(deployment.repositories / "repo.git", FILES)
    return deployment


def test_chain_survives_a_killed_server_and_a_pruned_parent(deployment, tmp_path):
    steps = (*STEPS[0], *STEPS[1])
    deployment.start_git()
    deploy_with_secret(deployment, *steps)
    deployment.submit("first")
    assert deployment.wait("first")["state"] == "completed", deployment.diagnostics("first")
    with deployment.paused_model():
        task_id = submit_derived_task(deployment, "first", prompt="Step 1")
        deployment.restart_server(signal.SIGKILL)
        pruned = deployment.http.post("/api/v1/admin/prune?older_than_seconds=0")
        assert [task["id"] for task in pruned.json()["tasks"]] == ["first"], pruned.text
    status = deployment.wait(task_id)
    assert status["state"] == "completed", deployment.diagnostics(task_id)
    assert (status["parent"], status["continues"]) == ("first", "session")
    assert deployment.http.post("/api/v1/tasks/first/continue", json={"prompt": "x"}).status_code == 404
    (tmp_path / "whole").mkdir()
    whole = deployment.artifact(f"{task_id}.chain.patch", task_id)
    assert checkout(deployment, tmp_path / "whole" / "work", whole)["renamed.txt"] == b"one\n"
    again = submit_derived_task(deployment, task_id, "rerun", overrides=["metadata.id=again"])
    status = deployment.wait(again)
    assert (status["state"], status["parent"], status["continues"]) == ("completed", "first", "session")


def test_continuing_an_unsuitable_task_is_rejected(deploy):
    deployment = deploy(bash_turn("python3 -c 'import time; time.sleep(600)'"), files=FILES)
    deployment.submit("running")
    deployment.submit("unclonable", repository={"branch": "absent"})
    assert deployment.wait("unclonable")["state"] == "failed"
    deployment.wait_for_state("running", "running")
    for task_id, status, code in (
        ("running", 409, "task_not_ended"),
        ("unclonable", 409, "task_not_continuable"),
        ("absent", 404, "task_not_found"),
    ):
        response = deployment.http.post(f"/api/v1/tasks/{task_id}/continue", json={"prompt": "x"})
        assert (response.status_code, response.json()["error"]) == (status, code)
    deployment.http.delete("/api/v1/tasks/running?force=true")
    deployment.wait("running")
    response = deployment.http.post("/api/v1/tasks/running/continue", json={"prompt": "x"})
    assert response.status_code == 202, response.text
    deployment.http.delete(f"/api/v1/tasks/{response.json()['task_id']}?force=true")
