"""Tasks on the hosts of a real Slurm cluster, with a real server, real runners and a scripted model."""

import pytest

from doubles import slurm_cluster
from doubles.deployment import make_repository, reply_turn, wait_until
from doubles.remote_deployment import MAKE_FILE
from doubles.slurm_deployment import SMALL, SlurmDeployment


@pytest.fixture(scope="module")
def cluster():
    slurm_cluster.require_slurm()
    with slurm_cluster.SlurmCluster() as cluster:
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
    deployment.start_model(MAKE_FILE, reply_turn())
    deployment.start_server()
    deployment.submit(vm=SMALL)
    status = deployment.wait(seconds=180)
    assert status["state"] == "completed", deployment.diagnostics()
    assert b"+made\n" in deployment.artifact("task-1.patch")
    [host] = deployment.hosts_of("task-1")
    assert host in {f"cluster:{name}" for name in slurm_cluster.HOSTS}
    wait_until(lambda: deployment.stored_jobs() == [], 60, "the end of the worker")
    wait_until(lambda: set(deployment.queue().values()) == {"COMPLETED"}, 60, "the end of the job")
    assert not (deployment.hosts_dir / host.partition(":")[2] / "tasks" / "task-1").exists()
