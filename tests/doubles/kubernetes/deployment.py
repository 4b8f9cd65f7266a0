"""A deployment whose tasks run in Pods of a double of Kubernetes, as processes of this machine."""

import socket
import sys

from doubles.deployment import preinstall_agent
from doubles.kubernetes.api_server import KubernetesApi
from doubles.kubernetes.cluster import Volumes
from doubles.remote_deployment import RemoteDeployment
from sandbox.bootstrap.cluster_placement import KUBERNETES_WORKER_COMMAND
from sandbox.journal.journals import FileJournals
from sandbox.model.events import AttemptStarted

LEASE_SECONDS = 30
SMALL = {"cpus": 1, "memory": "512M", "disk": "1G"}


class SandboxOnKubernetes(RemoteDeployment):
    """A server outside the cluster, and the API server of the double."""

    def __init__(self, directory):
        super().__init__(directory)
        self.api = KubernetesApi(directory / "kubernetes")
        self.cluster = self.api.cluster
        self.cluster.add_node("n1", cpu="8", memory="8192Mi", disk="100Gi")
        programs = {KUBERNETES_WORKER_COMMAND: (sys.executable, "-I", "-m", "sandbox", "worker")}
        image = {"HOME": str(self.home)}
        self.cluster.volumes = Volumes(directory / "pods", programs, image, self.api.issue_token, prepare_data_dir)

    @property
    def host_data_dir(self):
        """The data directory of the only running Pod."""
        [pod] = [pod for pod in self.cluster.pods.values() if pod["status"]["phase"] == "Running"]
        return self.cluster.volumes.path_of(pod) / "data"

    def start_server(self, **options):
        if not self.data_dir.exists():
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.worker_port = free.getsockname()[1]
            preinstall_agent(self.data_dir)
        cluster = {
            "ENGINE": "kubernetes",
            "HOST": "localhost",
            "LISTEN_HOST": "127.0.0.1",
            "PORT": str(self.worker_port),
            "LEASE": f"{LEASE_SECONDS}s",
            "KUBERNETES_IMAGE": "registry.example/sandbox@sha256:0123",
            "KUBERNETES_SERVER": self.api.url,
            "KUBERNETES_TOKEN_FILE": str(self.api.token_file),
            "KUBERNETES_CA_FILE": str(self.api.ca_file),
        }
        return super().start_server(**{f"SANDBOX_CLUSTER_{name}": value for name, value in cluster.items()}, **options)

    def attempts(self):
        """Return the events that started attempts."""
        records = FileJournals(self.data_dir).read("task-1").records
        return [record.event for record in records if isinstance(record.event, AttemptStarted)]

    def pods(self):
        """Return the Pods, oldest first."""
        with self.cluster.lock:
            return list(self.cluster.pods.values())

    def container_of(self, pod):
        return self.cluster.containers[pod["metadata"]["uid"]]

    def diagnostics(self, task_id="task-1"):
        logs = self.cluster.volumes.directory.glob("*/log")
        return super().diagnostics(task_id) + "".join(f"{path}: {path.read_text()[-3000:]}\n" for path in logs)

    def close(self):
        super().close()
        self.api.close()


def prepare_data_dir(path):
    """Create the data directory of a worker, with a copy of the agent."""
    path.mkdir(mode=0o700, parents=True)
    preinstall_agent(path)
