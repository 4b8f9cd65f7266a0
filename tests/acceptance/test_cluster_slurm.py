"""Tasks on the hosts of a real Slurm cluster, with a real server, real runners and a scripted model."""

import base64
import contextlib
import signal
from pathlib import Path

import pytest

from doubles import slurm_cluster
from doubles.deployment import SERVER_KEY, bash_turn, make_repository, reply_turn, wait_until
from doubles.image_archives import entry, layer, minimal_root, oci_archive
from doubles.remote_deployment import MAKE_FILE_TURN
from doubles.slurm_cluster import HOSTS
from doubles.slurm_deployment import SMALL, SlurmDeployment
from sandbox.bootstrap.worker import TOKEN_VARIABLE
from sandbox.images.image_builder import import_image
from sandbox.images.image_store import ImageStore
from sandbox.interfaces.cluster_engine import job_name


@pytest.fixture(scope="module")
def cluster():
    slurm_cluster.require_slurm()
    with slurm_cluster.SlurmCluster(slurmd_timeout=60) as cluster:
        yield cluster


@pytest.fixture
def deployment(tmp_path, cluster):
    deployment = SlurmDeployment(tmp_path, cluster)
    try:
        make_repository(deployment.repositories / "repo.git", {"README.md": "Hello.\n"})
        deployment.start_git()
        yield deployment
    finally:
        deployment.close()


@pytest.mark.timeout(300)
def test_task_runs_on_a_host_of_the_cluster(deployment):
    deployment.start_model(MAKE_FILE_TURN, reply_turn())
    deployment.start_server()
    deployment.submit(vm=SMALL)
    status = deployment.wait(seconds=180)
    assert status["state"] == "completed", deployment.diagnostics()
    assert b"+made\n" in deployment.artifact("task-1.patch")
    [started] = deployment.attempts_of("task-1")
    placement, _, host = started.host.partition(":")
    assert placement == "cluster"
    assert host in HOSTS
    assert status["host"] == host
    wait_until(lambda: deployment.stored_jobs() == [], 60, "the end of the worker")
    job = job_name(started.attempt_id)
    wait_until(lambda: deployment.queue()[job] == "COMPLETED", 60, "the end of the job")
    assert not (deployment.hosts_dir / host / "tasks" / "task-1").exists()


@pytest.mark.timeout(300)
def test_host_gets_the_image_of_the_server(deployment, tmp_path):
    """Each host has a different image with the same name, which no task uses."""
    deployment.start_model(bash_turn("cat /marker"), reply_turn())
    deployment.start_server()
    for number, data_dir in enumerate((deployment.data_dir, *(deployment.hosts_dir / host for host in HOSTS))):
        marker = layer(entry("marker", b"host %d" % number if number else b"server"))
        archive = oci_archive(tmp_path / f"{number}.tar", minimal_root(), marker)
        import_image(ImageStore(data_dir, "my-tools"), archive)
    image = ImageStore(deployment.data_dir, "my-tools").read_current().digest
    deployment.submit(vm={**SMALL, "profile": "my-tools"})
    status = deployment.wait(seconds=180)
    assert (status["state"], status["vm"]["image"]) == ("completed", f"my-tools@{image}"), deployment.diagnostics()
    assert deployment.tool_results()[-1] == "server"


@pytest.mark.timeout(300)
def test_host_with_another_key_gets_no_task_until_the_key_is_corrected(deployment):
    """The hosts share the key file of this test, so the file is replaced after the server has read it."""
    deployment.start_model(MAKE_FILE_TURN, reply_turn())
    deployment.start_server()
    path, correct = deployment.host_key_file, deployment.host_key_file.read_bytes()
    path.write_bytes(base64.b64encode(bytes(32)))
    deployment.submit(vm=SMALL)
    reason = "has a different key than the server: check cluster.host_key_file on both."
    wait_until(lambda: reason in deployment.status()["state_message"], 60, "the reason")
    assert deployment.attempts_of("task-1") == []
    assert any(reason in log.read_text() for log in deployment.hosts_dir.glob("*/worker.log"))
    path.write_bytes(correct)
    assert deployment.wait(seconds=180)["state"] == "completed", deployment.diagnostics()
    assert len(deployment.attempts_of("task-1")) == 1


def check_stored_files(deployment):
    """Check that Slurm, which stores jobs' environments, stored neither the model key nor the cluster's host key."""
    cluster, host_key = deployment.cluster, deployment.host_key_file.read_bytes()
    contents = []
    for path in filter(Path.is_file, cluster.directory.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            contents.append(path.read_bytes())
    assert any(TOKEN_VARIABLE.encode() in content for content in contents)
    assert any(str(deployment.host_key_file).encode() in content for content in contents)
    for key in (SERVER_KEY.encode(), host_key, base64.b64decode(host_key)):
        assert not any(key in content for content in contents)


WAIT_SECONDS = 45
"""Longer than the lease, so an agent on a host that is cut off makes its next request after the lease ends."""

WHOLE_HOST = {**SMALL, "cpus": slurm_cluster.CPUS}


@pytest.mark.timeout(900)
def test_tasks_of_lost_hosts_are_retried_and_a_task_without_a_host_waits(deployment, cluster):
    """Three tasks occupy three hosts. One host is killed and one is cut off; then only the third one runs jobs."""
    wait = bash_turn(f"mkfifo /tmp/gate; read -t {WAIT_SECONDS} _ <> /tmp/gate; echo late > late.txt")
    deployment.start_model(MAKE_FILE_TURN, wait, reply_turn())
    deployment.start_server()
    task_ids = [f"task-{number}" for number in range(1, 5)]
    for task_id in task_ids:
        deployment.submit(task_id, vm=WHOLE_HOST, lifecycle={"retries": 1})

    def running():
        """Return the tasks whose agents are waiting, keyed by host."""
        calls = {task_id: deployment.status(task_id)["progress"]["tool_calls"] for task_id in task_ids}
        return {deployment.hosts_of(task_id)[0]: task_id for task_id in task_ids if calls[task_id] >= 2}

    by_host = wait_until(lambda: len(found := running()) == 3 and found, 240, "a task on each host")
    waiting = (set(task_ids) - set(by_host.values())).pop()
    assert deployment.status(waiting)["state_message"] in {
        f"Waiting for a host: The job is waiting in Slurm's queue ({reason})." for reason in ("Resources", "Priority")
    }
    job = deployment.status(waiting)["job"]
    assert (job["phase"], job["host"]) == ("waiting", None)
    assert f"Waiting for a host: {job['reason']}" == deployment.status(waiting)["state_message"]
    assert job["id"].isdecimal()
    for host, task_id in by_host.items():
        job = deployment.status(task_id)["job"]
        assert (job["phase"], f"cluster:{job['host']}") == ("running", host)
    check_stored_files(deployment)
    lost = {by_host["cluster:n1"], by_host["cluster:n2"]}
    cluster.kill_host("n1")
    cluster.cut_off("n2")
    try:
        for task_id in task_ids:
            status = deployment.wait(task_id, 600)
            assert status["state"] == "completed", deployment.diagnostics(task_id)
            assert b"+late\n" in deployment.artifact(f"{task_id}.patch", task_id)
            errors = [(attempt["error"] or {}).get("code") for attempt in status["attempts"]]
            assert errors == (["host_lost", None] if task_id in lost else [None]), deployment.diagnostics(task_id)
            assert deployment.hosts_of(task_id)[-1] == "cluster:n3"
    finally:
        cluster.start_host("n1")
        cluster.reconnect("n2")
    wait_until(lambda: deployment.stored_jobs() == [], 60, "the end of the workers")


@pytest.mark.timeout(900)
def test_drained_host_gets_no_new_task_while_its_task_continues(deployment, cluster):
    """Three tasks occupy three hosts, and one waits in Slurm's queue when a host is drained."""
    cluster.wait_until_idle()  # another test may have lost a host
    deployment.start_model(MAKE_FILE_TURN, bash_turn("mkfifo /tmp/gate; read -t 40 _ <> /tmp/gate"), reply_turn())
    deployment.start_server()

    def submit(*task_ids):
        for task_id in task_ids:
            deployment.submit(task_id, vm=WHOLE_HOST)

    def change_drain(method, host):
        return deployment.http.request(method, f"/api/v1/hosts/{host}/drain").raise_for_status().json()

    def drained():
        hosts = deployment.http.get("/api/v1/hosts").json()["hosts"]
        assert [host["name"] for host in hosts] == list(HOSTS)
        return [host["name"] for host in hosts if host["draining_since"] is not None]

    def excluded():
        """Return the excluded hosts of each waiting job in Slurm."""
        lines = cluster.run("squeue", "--noheader", "--states=PENDING", "--Format=Name:|,ExcNodes:|").splitlines()
        return [line.split("|")[1] for line in lines]

    assert drained() == []  # the hosts are listed before a worker has run there
    running = ["task-1", "task-2", "task-3"]
    submit(*running)
    wait_until(lambda: all(deployment.hosts_of(task_id) for task_id in running), 240, "a task on each host")
    by_host = {deployment.hosts_of(task_id)[0]: task_id for task_id in running}
    assert len(by_host) == 3
    submit("waiting")
    wait_until(lambda: "Slurm's queue" in deployment.status("waiting")["state_message"], 60, "the queued job")
    assert excluded() == [""]
    assert change_drain("POST", "n1")["task_ids"] == [by_host["cluster:n1"]]
    wait_until(lambda: excluded() == ["n1"], 60, "the new job")
    deployment.restart_server(signal.SIGKILL)
    assert drained() == ["n1"]
    assert excluded() == ["n1"]
    submit("later-1", "later-2")
    for task_id in [*running, "waiting", "later-1", "later-2"]:
        status = deployment.wait(task_id, 300)
        assert status["state"] == "completed", deployment.diagnostics(task_id)
        assert len(status["attempts"]) == 1
    assert not {"cluster:n1"} & {deployment.hosts_of(task_id)[0] for task_id in ("waiting", "later-1", "later-2")}
    for host in ("n2", "n3"):
        change_drain("POST", host)
    submit("undone")
    reason = (
        "Waiting for a host: No host is left for the job: all hosts of the partition are excluded. "
        "Drained hosts: n1, n2, n3. `sandbox admin drain --host NAME --undo` ends a drain."
    )
    wait_until(lambda: deployment.status("undone")["state_message"] == reason, 60, "the reason")
    assert deployment.status("undone")["state"] == "pending"
    change_drain("DELETE", "n1")
    assert deployment.wait("undone", 180)["state"] == "completed", deployment.diagnostics("undone")
    assert deployment.hosts_of("undone") == ["cluster:n1"]
