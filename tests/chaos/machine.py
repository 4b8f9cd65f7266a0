"""The machine on which things are broken: a real server, a scribe for an agent, a network that can be held."""

import json
import os
import random

from chaos import event_log_writer, journal_file
from chaos.throttle import Valve
from doubles.live_server import ORGANISATION, World, make_repository, says

ALL_CPUS = 8 * len(os.sched_getaffinity(0))
FILLER_BYTES = 200_000
END_SECONDS = 120


class Machine(World):
    """Use as a context; `acknowledged` has what the server said 202 to."""

    def __init__(self, directory, runtime="bubblewrap"):
        super().__init__(directory)
        self.runtime = runtime
        self.acknowledged = set()
        self.orders = {}
        self.valves = []

    def __enter__(self):
        # So much that a clone can be met in its middle.
        filler = random.Random(1).randbytes(FILLER_BYTES)
        files = {"README.md": "# Hi\n", event_log_writer.SCRIPT: event_log_writer.AGENT, "filler": filler}
        self.commit = make_repository(self.repositories / "repo.git", files)
        event_log_writer.put_in_place(self.data_dir)
        self.start_git()
        self.start_model(says())
        self.start_server()
        return self

    def __exit__(self, *_):
        self.close()
        for valve in self.valves:
            valve.close()

    def start_git(self, prefix=()):
        super().start_git(prefix)
        self.git_port = int(self.processes[-1].said["url"].rpartition(":")[2])

    def add_valve(self, bytes_max):
        """Gives it, and the URL of the repository behind it."""
        valve = Valve(self.git_port, bytes_max)
        self.valves.append(valve)
        with (self.home / ".gitconfig").open("a") as file:
            file.write(
                f'[url "http://127.0.0.1:{valve.port}/"]\n\tinsteadOf = https://held-{valve.port}.example.org/\n'
            )
        return valve, f"https://held-{valve.port}.example.org/repo.git"

    def order(self, task_id, *, url=f"{ORGANISATION}repo.git", lines=5, pause_seconds=0.01, files=0, cpus=1, retries=0):
        """Submit a task; the scribe prints so many lines, and makes so many files in the end."""
        order = {"task": task_id, "lines": lines, "pause_seconds": pause_seconds, "files": files}
        self.orders[task_id] = {**order, "retries": retries}
        self.submit(
            task_id,
            repository={"url": url},
            claude={"prompt": json.dumps(order)},
            vm={"cpus": cpus, "memory": "512M", "disk": "64M"},
            lifecycle={"artifact_patterns": [event_log_writer.MARK, "made/**"], "retries": retries},
        )
        self.acknowledged.add(task_id)

    def wait_for_all(self):
        """Until every task that was taken has ended."""
        for task_id in sorted(self.acknowledged):
            self.wait(task_id, END_SECONDS)

    def records(self, task_id):
        return journal_file.read_records(self.data_dir, task_id)

    def state(self, task_id):
        return journal_file.state_of(self.records(task_id))

    def starts(self, task_id):
        """How often the model was told by an agent that it begins with this task."""
        told = json.dumps(f"begin {task_id}")
        return sum(told in request["body"] for request in self.model_requests())
