"""A deployment whose tasks run on workers that the `processes` engine starts."""

import contextlib
import json
import os
import signal
import socket
from pathlib import Path

from doubles.deployment import preinstall_agent, wait_until
from doubles.remote_deployment import RemoteDeployment
from sandbox.bootstrap.settings.schema import LEASE_SECONDS_MIN
from sandbox.journal.journals import FileJournals
from sandbox.model.events import AttemptStarted

LEASE_SECONDS = LEASE_SECONDS_MIN


class ClusterDeployment(RemoteDeployment):
    """A deployment whose tasks run on workers. All workers share the data directory of one host."""

    @property
    def host_data_dir(self):
        return self.data_dir / "cluster" / "host"

    def start_server(self, **options):
        if not self.data_dir.exists():
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.worker_port = free.getsockname()[1]
            preinstall_agent(self.data_dir)
            preinstall_agent(self.host_data_dir)
            for directory in (self.host_data_dir.parent, self.host_data_dir):
                directory.chmod(0o700)
        cluster = {"ENGINE": "processes", "PORT": str(self.worker_port), "LEASE": f"{LEASE_SECONDS}s"}
        return super().start_server(**{f"SANDBOX_CLUSTER_{name}": value for name, value in cluster.items()}, **options)

    def events(self):
        """Return the events in the server's copy of the journal."""
        return [record.event for record in FileJournals(self.data_dir).read("task-1").records]

    def hosts(self):
        return self.http.get("/api/v1/hosts").json()["hosts"]

    def attempts(self):
        """Return the events that started attempts."""
        return [event for event in self.events() if isinstance(event, AttemptStarted)]

    def jobs(self):
        """Return the directories of the engine's jobs, oldest first."""
        paths = (self.data_dir / "cluster" / "processes").glob("sandbox-*")
        return sorted(paths, key=lambda path: json.loads((path / "request.json").read_bytes())["position"])

    def worker_pid(self):
        """Return the worker of the only running job."""
        return next(iter(self.worker_pids()), None)

    def worker_pids(self):
        """Return the workers of all running jobs, which are the children of the jobs' supervisors."""
        found = []
        for job in self.jobs():
            if self.exit_code(job) is None:
                pid = json.loads((job / "started.json").read_bytes())["pid"]
                found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found

    def exit_code(self, job):
        path = job / "ended.json"
        return json.loads(path.read_bytes())["exit_code"] if path.exists() else None

    def wait_for_clean_exit(self, *jobs):
        """Wait until the workers of the jobs have exited with 0."""
        for job in jobs:
            wait_until(lambda job=job: self.exit_code(job) is not None, 30, description="the worker's end")
            assert self.exit_code(job) == 0, self.diagnostics()

    def count_model_requests(self):
        return self.model_requests_file.read_bytes().count(b"\n")

    def ports(self):
        return [self.server.ready_message[name].rpartition(":")[2] for name in ("http", "ws")]

    def signal(self, number, *pids):
        for pid in pids:
            os.kill(pid, number)

    def close(self):
        super().close()
        for path in (self.data_dir / "cluster" / "processes").glob("*/started.json"):
            if not (path.parent / "ended.json").exists():
                kill(json.loads(path.read_bytes())["pid"])


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
