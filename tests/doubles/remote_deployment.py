"""A deployment whose tasks run on a host that has a separate data directory."""

import contextlib
from functools import partial

from doubles.deployment import Deployment, bash_turn, make_repository, wait_until
from doubles.runner_processes import find_runner
from doubles.terminal_user import TerminalUser

MAKE_FILE_TURN = bash_turn("echo made > made.txt")
WAIT_FOR_FIFO_TURN = bash_turn("mkfifo /tmp/gate && read _ < /tmp/gate; cat answer.txt")
"""A command that runs until the test calls `RemoteDeployment.finish_second_command`."""


class RemoteDeployment(Deployment):
    """A deployment with the task `task-1`. Subclasses set `host_data_dir`, the data directory of the host."""

    def start_host(self):
        """Start the programs that must run on the host before the server starts."""

    def runner_pid(self):
        return find_runner(self.host_data_dir, "task-1")

    def wait_for_second_tool_call(self):
        wait_until(lambda: self.status()["progress"]["tool_calls"] == 2, 60, description="the second tool call")

    def type_into_shell(self, text):
        """Open a shell in the sandbox, and type the text."""
        terminal = wait_until(self._open_shell, 60, description="a shell")
        terminal.type(text)
        return terminal

    def _open_shell(self):
        """Open a shell; return None if the host has not connected to the server again after a restart."""
        terminal = TerminalUser("task", "shell", "task-1", server=self.server.ready_message["http"])
        if terminal.expect(r"\$ |try again")[0] == b"$ ":
            return terminal
        terminal.close()
        return None

    def finish_second_command(self):
        """Let the agent's second command end."""
        terminal = self.type_into_shell("echo from-the-user > answer.txt; echo > /tmp/gate; exit 7\n")
        assert terminal.exit_code() == 7
        terminal.close()

    def check_preserved_file(self):
        """Read the file `kept.txt` in a shell of the preserved sandbox."""
        terminal = self.type_into_shell("cat kept.txt; exit 3\n")
        terminal.expect("kept\r\n")
        assert terminal.exit_code() == 3
        terminal.close()

    def request_release(self):
        """Request the release of the preserved sandbox; return the status of the response."""
        return self.http.delete("/api/v1/tasks/task-1/vm", timeout=30).status_code

    def release(self):
        """Release the preserved sandbox, unless an earlier request has already released it."""
        wait_until(lambda: self.request_release() in {200, 404}, 30, description="the release")
        assert not self.status()["sandbox_kept"]

    def diagnostics(self, task_id="task-1"):
        logs = [*self.host_data_dir.glob("tasks/*/attempts/*/runner.log"), self.host_data_dir / "worker.log"]
        return f"{super().diagnostics(task_id)}\n" + "".join(path.read_text() for path in logs if path.exists())


@contextlib.contextmanager
def closing_deployment(deployment):
    """Yield a function that starts the deployment, given the turns of the model. Close the deployment afterwards."""
    try:
        yield partial(_start, deployment)
    finally:
        deployment.close()


def _start(deployment, *turns):
    make_repository(deployment.repositories / "repo.git", {"README.md": "Hello.\n"})
    deployment.start_git()
    deployment.start_model(*turns)
    deployment.start_host()
    deployment.start_server()
    return deployment
