"""The deployment under test: a real server, an agent that logs its output, and a git server with pausing relays."""

import json
import os
import random

from chaos import journal_file, logging_fake_agent
from chaos.pausing_relay import PausingRelay
from doubles.deployment import ORGANIZATION, Deployment, make_repository, reply_turn
from sandbox.model.fixed_limits import CPU_OVERCOMMIT_FACTOR

RESERVABLE_CPUS = CPU_OVERCOMMIT_FACTOR * len(os.sched_getaffinity(0))
"""The number of CPUs that running tasks may reserve together."""
FILLER_BYTES = 200_000
END_TIMEOUT_SECONDS = 120


class ChaosDeployment(Deployment):
    """The deployment, as a context manager. acknowledged: ids of the tasks that got a 202."""

    def __init__(self, directory, runtime="bubblewrap"):
        super().__init__(directory)
        self.runtime = runtime
        self.acknowledged = set()
        self.submitted = {}
        self.relays = []

    def __enter__(self):
        # Large enough that a clone can be interrupted in the middle.
        filler = random.Random(1).randbytes(FILLER_BYTES)
        files = {"README.md": "# Hi\n", logging_fake_agent.SCRIPT: logging_fake_agent.AGENT, "filler": filler}
        self.commit = make_repository(self.repositories / "repo.git", files)
        logging_fake_agent.install(self.data_dir)
        self.start_git()
        self.start_model(reply_turn())
        self.start_server()
        return self

    def __exit__(self, *_):
        self.close()
        for relay in self.relays:
            relay.close()

    def start_git(self, command_prefix=()):
        super().start_git(command_prefix)
        self.git_port = int(self.processes[-1].ready_message["url"].rpartition(":")[2])

    def add_pausing_relay(self, bytes_max):
        """Return a relay that pauses after `bytes_max` bytes, and the URL of the repository behind it."""
        relay = PausingRelay(self.git_port, bytes_max)
        self.relays.append(relay)
        with (self.home / ".gitconfig").open("a") as file:
            file.write(
                f'[url "http://127.0.0.1:{relay.port}/"]\n\tinsteadOf = https://held-{relay.port}.example.org/\n'
            )
        return relay, f"https://held-{relay.port}.example.org/repo.git"

    def submit_instructions(
        self, task_id, *, url=f"{ORGANIZATION}repo.git", lines=5, pause_seconds=0.01, files=0, cpus=1, retries=0
    ):
        """Submit a task whose agent prints `lines` lines and then creates `files` files."""
        instructions = {"task": task_id, "lines": lines, "pause_seconds": pause_seconds, "files": files}
        self.submitted[task_id] = {**instructions, "retries": retries}
        self.submit(
            task_id,
            repository={"url": url},
            claude={"prompt": json.dumps(instructions)},
            vm={"cpus": cpus, "memory": "512M", "disk": "64M"},
            lifecycle={"artifact_patterns": [logging_fake_agent.WRITTEN_LINES_FILE, "made/**"], "retries": retries},
        )
        self.acknowledged.add(task_id)

    def wait_for_all(self):
        """Wait until every acknowledged task has ended."""
        for task_id in sorted(self.acknowledged):
            self.wait(task_id, END_TIMEOUT_SECONDS)

    def records(self, task_id):
        return journal_file.read_records(self.data_dir, task_id)

    def state(self, task_id):
        return journal_file.state_of(self.records(task_id))

    def agent_starts(self, task_id):
        """Return the number of agents that announced the start of this task to the model."""
        message = json.dumps(f"begin {task_id}")
        return sum(message in request["body"] for request in self.model_requests())
