"""A deployment whose tasks run on the hosts of a real Slurm cluster."""

import base64
import json
import os

from doubles import slurm_cluster
from doubles.deployment import Deployment, preinstall_agent
from sandbox.journal.journals import FileJournals
from sandbox.model.events import AttemptStarted

LEASE_SECONDS = 30
WORKER_PORT = 8724
SMALL = {"cpus": 1, "memory": "512M", "disk": "1G"}


class SlurmDeployment(Deployment):
    """A server, a git host and a model in the network of a cluster's controller."""

    def __init__(self, directory, cluster):
        command_prefix = ("nsenter", f"--net={cluster.network}", "--")
        super().__init__(
            directory,
            command_prefix=command_prefix,
            address=slurm_cluster.CONTROLLER_ADDRESS,
            namespace=cluster.network,
        )
        self.cluster = cluster
        self.hosts_dir = self.directory / "hosts"
        self.host_key_file = self.directory / "host.key"

    def start_git(self):
        super().start_git(self.command_prefix)

    def start_model(self, *turns, **script):
        super().start_model(*turns, command_prefix=self.command_prefix, **script)

    def start_server(self, **options):
        if not self.data_dir.exists():
            preinstall_agent(self.data_dir)
            for host in slurm_cluster.HOSTS:
                preinstall_agent(self.hosts_dir / host)
        if not self.host_key_file.exists():
            self.host_key_file.write_bytes(base64.b64encode(os.urandom(32)))
            self.host_key_file.chmod(0o600)
        cluster = {
            "ENGINE": "slurm",
            "HOST": slurm_cluster.CONTROLLER_ADDRESS,
            "PORT": str(WORKER_PORT),
            "LEASE": f"{LEASE_SECONDS}s",
            "HOST_KEY_FILE": str(self.host_key_file),
            "SLURM_DATA_DIR": str(self.hosts_dir),
            "SLURM_COMMANDS": str(self.cluster.commands),
            "SLURM_CONFIGURATION": str(self.cluster.configuration),
        }
        return super().start_server(**{f"SANDBOX_CLUSTER_{name}": value for name, value in cluster.items()}, **options)

    def attempts_of(self, task_id):
        """Return the events that started attempts."""
        records = FileJournals(self.data_dir).read(task_id).records
        return [record.event for record in records if isinstance(record.event, AttemptStarted)]

    def hosts_of(self, task_id):
        """Return the host of each attempt, as the server recorded it."""
        return [started.host for started in self.attempts_of(task_id)]

    def stored_jobs(self):
        """Return the jobs that the server has stored."""
        return [json.loads(path.read_bytes()) for path in (self.data_dir / "cluster" / "jobs").glob("*.json")]

    def queue(self):
        """Return the state of each job that Slurm still lists, keyed by name."""
        output = self.cluster.run("squeue", "--noheader", "--states=all", "--Format=Name:|,State:|")
        return dict(line.split("|")[:2] for line in output.splitlines())

    def diagnostics(self, task_id="task-1"):
        logs = [*self.hosts_dir.glob("*/tasks/*/attempts/*/runner.log"), *self.hosts_dir.glob("*/worker.log")]
        text = "".join(f"{path}: {path.read_text()[-3000:]}" for path in logs)
        return f"{super().diagnostics(task_id)}\n{text}\n{self.cluster.run('squeue', '--states=all')}"
