"""One deployment, shared by those tests in this process that prepare nothing before the deployment starts.

The deployment is emptied after each test. If its state then differs from that of a newly started deployment, the
deployment is discarded, and the next test gets a new one.
"""

import shutil

from doubles.deployment import FINAL_STATES, Deployment, wait_until

_EMPTYING_TIMEOUT_SECONDS = 10.0
_RESET_SEPARATELY = {"home", "git", "data"}
"""Directories of the deployment that are emptied separately."""


class SharedDeployment:
    """The holder of the shared deployment.

    make_directory: returns a new directory for each deployment. environment: the server's environment variables.
    """

    def __init__(self, make_directory, runtime, environment):
        self._make_directory, self._runtime, self._environment = make_directory, runtime, environment
        self._shared = None
        self._initial_state = None

    def attach(self, deployment, *turns, **script):
        """Make `deployment` the shared deployment and give its scripted model these turns."""
        if self._shared is None:
            self._shared = Deployment(self._make_directory())
            self._shared.runtime = self._runtime
            self._run_or_discard(self._start, *turns, **script)
            self._initial_state = _state_of(self._shared)
        else:
            self._run_or_discard(self._shared.restart_model, *turns, **script)
        for name, value in vars(self._shared).items():
            setattr(deployment, name, value)
        deployment.processes = list(self._shared.processes)

    def reclaim(self, deployment):
        """Empty the deployment; discard it if that does not restore its initial state.

        A server that was restarted with the same settings is kept.
        """
        for process in [process for process in deployment.processes if not process.is_alive()]:
            process.stop()
            deployment.processes.remove(process)
        try:
            is_unchanged = self._is_complete(deployment) and self._empty(deployment)
        except Exception:  # the test may have broken any part of the deployment
            is_unchanged = False
        if is_unchanged:
            vars(self._shared).update(vars(deployment))
        else:
            self.discard(deployment)

    def discard(self, deployment):
        """Stop the deployment and everything that the test has started."""
        self._shared = None
        deployment.close()

    def close(self):
        if self._shared is not None:
            self._shared.close()

    def _start(self, *turns, **script):
        self._shared.start_git()
        self._shared.start_model(*turns, **script)
        self._shared.start_server(**self._environment)

    def _run_or_discard(self, action, *turns, **script):
        try:
            action(*turns, **script)
        except BaseException:
            self.discard(self._shared)
            raise

    def _is_complete(self, deployment):
        names = sorted(process.log.stem for process in deployment.processes)
        return (
            names == ["git", "model", "server"]
            and deployment.server_environment == self._environment
            and deployment.data_dir == self._shared.data_dir
            and deployment.bearer is None
            and not (deployment.home / ".config").exists()
        )

    def _empty(self, deployment):
        deployment.end_tasks()
        wait_until(lambda: _prune_all(deployment), _EMPTYING_TIMEOUT_SECONDS, "all tasks to be pruned")
        for path in deployment.directory.iterdir():
            if path.suffix == ".log":
                path.write_bytes(b"")
            elif path.name not in _RESET_SEPARATELY:
                _remove(path)
        for path in (
            *deployment.repositories.iterdir(),
            *(p for p in deployment.home.iterdir() if p.name != ".gitconfig"),
        ):
            _remove(path)
        return _state_of(deployment) == self._initial_state


def _state_of(deployment):
    """Return the parts of the deployment's state that a test may have changed."""
    return (
        (deployment.home / ".gitconfig").read_bytes(),
        {path.name for path in deployment.data_dir.iterdir() if path.name not in {"pruned", "tasks"}},
        {path.name for name in ("pruned", "profiles", "tasks") for path in (deployment.data_dir / name).glob("*")},
        deployment.http.get("/api/v1/health/ready").status_code,
    )


def _prune_all(deployment):
    for task in deployment.http.get("/api/v1/tasks?limit=100").json()["tasks"]:
        if task["state"] == "failed_preserved":
            deployment.http.delete(f"/api/v1/tasks/{task['id']}/vm")
        assert task["state"] in FINAL_STATES
    deployment.http.post("/api/v1/admin/prune?older_than_seconds=0")
    return not any(any((deployment.data_dir / name).glob("*")) for name in ("tasks", "pruned"))


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
