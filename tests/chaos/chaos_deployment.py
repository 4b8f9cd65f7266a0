"""The deployment under test: a real server, an agent that logs its output, and a git server with pausing relays."""

import json
import os
import random
from typing import ClassVar

from chaos import journal_file, logging_fake_agent
from chaos.pausing_relay import PausingRelay
from doubles.deployment import ORGANIZATION, Deployment, make_repository, reply_turn
from doubles.leftovers import find_leftovers
from doubles.runner_processes import find_runner
from sandbox.model.fixed_limits import CPU_OVERCOMMIT_FACTOR

RESERVABLE_CPUS = CPU_OVERCOMMIT_FACTOR * len(os.sched_getaffinity(0))
"""The number of CPUs that running tasks may reserve together."""
FILLER_BYTES = 200_000


class ChaosDeployment(Deployment):
    """The deployment, as a context manager. acknowledged: ids of the tasks that got a 202."""

    end_timeout_seconds = 120
    agent_options: ClassVar = {"patience_seconds": 0, "request_interval": 0}
    """How long an agent repeats a failed model request, and how many lines it prints between two requests."""

    def __init__(self, directory, *arguments, runtime="bubblewrap"):
        super().__init__(directory, *arguments)
        self.runtime = runtime
        self.acknowledged = set()
        self.submitted = {}
        self.relays = []

    def __enter__(self):
        # The repository is so large that a clone can be interrupted in the middle.
        filler = random.Random(1).randbytes(FILLER_BYTES)
        files = {"README.md": "# Hi\n", logging_fake_agent.SCRIPT: logging_fake_agent.AGENT, "filler": filler}
        self.commit = make_repository(self.repositories / "repo.git", files)
        for data_dir in (self.data_dir, *self.host_data_dirs()):
            logging_fake_agent.install(data_dir)
        self.start_git()
        self.start_model(reply_turn())
        self.start_server()
        return self

    def __exit__(self, *_):
        self.close()
        for relay in self.relays:
            relay.close()

    def host_data_dirs(self):
        """Return the data directories of other hosts."""
        return []

    def start_git(self, *arguments):
        super().start_git(*arguments)
        self.git_port = int(self.processes[-1].ready_message["url"].rpartition(":")[2])

    def add_pausing_relay(self, bytes_max):
        """Return a relay that pauses after `bytes_max` bytes, and the URL of the repository behind it."""
        relay = PausingRelay(self.git_port, bytes_max, self.address, self.namespace)
        self.relays.append(relay)
        with (self.home / ".gitconfig").open("a") as file:
            file.write(
                f'[url "http://{self.address}:{relay.port}/"]\n\tinsteadOf = https://held-{relay.port}.example.org/\n'
            )
        return relay, f"https://held-{relay.port}.example.org/repo.git"

    def submit_instructions(
        self, task_id, *, url=f"{ORGANIZATION}repo.git", lines=5, pause_seconds=0.01, files=0, cpus=1, retries=0
    ):
        """Submit a task whose agent prints `lines` lines and then creates `files` files."""
        instructions = {"task": task_id, "lines": lines, "pause_seconds": pause_seconds, "files": files}
        instructions |= self.agent_options
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
            self.wait(task_id, self.end_timeout_seconds)

    def records(self, task_id):
        """Return the records that the server has."""
        return journal_file.read_records(self.data_dir, task_id)

    def latest_records(self, task_id):
        """Return the records on the host where the journal is written."""
        return self.records(task_id)

    def state(self, task_id):
        return journal_file.state_of(self.latest_records(task_id))

    def find_runner(self, task_id):
        """Return the pid of the task's runner; None if there is none."""
        return find_runner(self.data_dir, task_id)

    def find_leftovers(self):
        return find_leftovers(self.data_dir)

    def agent_sessions(self, task_id):
        """Return the session of the agent that sent each request for the task to the model, in order of arrival."""
        questions = {f"{word} {task_id}" for word in ("begin", "continue", "end")}
        bodies = [json.loads(request["body"]) for request in self.model_requests() if request["method"] == "POST"]
        return [body["metadata"]["user_id"] for body in bodies if body["messages"][0]["content"] in questions]
