"""The deployment under test on the hosts of a Slurm cluster.

A task's journal is written on its host, and copied to the server.
"""

import contextlib
import re
from pathlib import Path
from typing import ClassVar

from chaos import journal_file
from chaos.chaos_deployment import ChaosDeployment
from doubles import leftovers, slurm_cluster
from doubles.deployment import wait_until
from doubles.runner_processes import find_runner
from doubles.slurm_deployment import SlurmDeployment

_IDLE_SECONDS = 120
_SHARED_KINDS = (leftovers.processes, leftovers.loop_devices)
"""Leftovers that are found by the data directory of their host, because the hosts share a kernel."""


class ClusterChaosDeployment(ChaosDeployment, SlurmDeployment):
    """A server whose tasks run on three hosts. The agents repeat failed requests, as the real agent does."""

    end_timeout_seconds = 300
    agent_options: ClassVar = {"patience_seconds": 240, "request_interval": 50}

    def host_data_dirs(self):
        return [self.hosts_dir / host for host in slurm_cluster.HOSTS]

    def latest_records(self, task_id):
        """Return the last writer's records: those in a host's journal, or those in the server's copy."""
        copies = [journal_file.read_records(path, task_id) for path in (self.data_dir, *self.host_data_dirs())]
        return max(copies, key=lambda records: (records[-1]["epoch"], records[-1]["seq"]) if records else (0, 0))

    def find_runner(self, task_id):
        return next(filter(None, (find_runner(path, task_id) for path in self.host_data_dirs())), None)

    def host_of(self, task_id):
        """Return the last attempt's host name; empty before the first attempt."""
        events = (record["event"] for record in reversed(self.latest_records(task_id)))
        host = next((event["host"] for event in events if event["type"] == "attempt_started"), "")
        return host.removeprefix("cluster:")

    def worker_of(self, task_id):
        """Return the pid of the worker that claimed the task's job last. This worker holds a lock on its host."""
        locks = [path / "workers" / task_id for path in self.host_data_dirs()]
        return next((pid for lock in locks if lock.exists() for pid in _holders(lock)), None)

    def wait_for_workers(self):
        """Wait until all workers have exited and the hosts run no jobs."""
        wait_until(lambda: self.stored_jobs() == [], _IDLE_SECONDS, "the end of the workers")
        wait_until(lambda: self.cluster.run("squeue", "--noheader") == "", _IDLE_SECONDS, "the end of the jobs")

    def sweep(self):
        """Run a task on each host. Its worker removes the leftovers of killed workers on that host."""
        for host in slurm_cluster.HOSTS:
            self.cluster.restrict_to(host)
            self.submit_instructions(f"sweep-{host}")
            self.wait(f"sweep-{host}", self.end_timeout_seconds)
        self.cluster.restrict_to(*slurm_cluster.HOSTS)

    def find_leftovers(self):
        """Return what remains of tasks on the server and on all hosts."""
        found = leftovers.find_leftovers(self.data_dir)
        ids = leftovers.attempt_ids(self.data_dir)
        pattern = re.compile("|".join(map(re.escape, [*ids, str(self.hosts_dir)])))
        for host, pid in self.cluster.host_pids().items():
            data_dir, root = self.hosts_dir / host, Path(f"/proc/{pid}/root")
            kinds = {kind.__name__: kind(data_dir) for kind in _SHARED_KINDS}
            kinds["files"] = {str(path) for path in data_dir.glob("tasks/*")}
            kinds["sockets"] = {str(path) for path in root.glob("run/sandbox/*/*.sock") if path.stem in ids}
            kinds["mounts"] = {
                line for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines() if pattern.search(line)
            }
            found |= {f"{kind} of {host}": things for kind, things in kinds.items() if things}
        return found

    def diagnostics(self, task_id="task-1"):
        return f"{super().diagnostics(task_id)}\n{self.cluster.logs()}"


def _holders(path):
    """Yield the pids of the processes that have the file open."""
    status = path.stat()
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for descriptor in (directory / "fd").iterdir():
                with contextlib.suppress(OSError):
                    found = descriptor.stat()
                    if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                        yield int(directory.name)
