"""One machine for all tests of this process that ask nothing of its start; it is emptied after each of them.

A test borrows it: the server has run before, which a server may have. What differs afterwards from a machine that has
just been started is not cleaned but given up, and the next test gets a new one.
"""

import shutil

from doubles.live_server import TERMINAL, World, until

_EMPTY_SECONDS = 10.0
_LEFT_ALONE = {"home", "git", "data"}
"""Directories of the machine that are emptied each in a way of its own."""


class SharedMachine:
    """make_directory: gives a new directory for each machine. environment: variables of its server."""

    def __init__(self, make_directory, runtime, environment):
        self._make_directory, self._runtime, self._environment = make_directory, runtime, environment
        self._standing = None
        self._kept = None

    def attach(self, world, *turns, **script):
        """Make `world` the standing machine, whose model says these turns."""
        if self._standing is None:
            self._standing = World(self._make_directory())
            self._standing.runtime = self._runtime
            self._carry_out(self._start, *turns, **script)
            self._kept = _kept_by(self._standing)
        else:
            self._carry_out(self._standing.restart_model, *turns, **script)
        for name, value in vars(self._standing).items():
            setattr(world, name, value)
        world.processes = list(self._standing.processes)

    def reclaim(self, world):
        """Empty it; or end it, where that does not make it what it was.

        A server that was ended and started again as it was before stays.
        """
        for one in [one for one in world.processes if not one.is_alive()]:
            one.stop()
            world.processes.remove(one)
        try:
            is_as_it_was = self._is_complete(world) and self._empty(world)
        except Exception:  # whatever the test has done to it
            is_as_it_was = False
        if is_as_it_was:
            vars(self._standing).update(vars(world))
        else:
            self.discard(world)

    def discard(self, world):
        """End it with all that the test has started on it."""
        self._standing = None
        world.close()

    def close(self):
        if self._standing is not None:
            self._standing.close()

    def _start(self, *turns, **script):
        self._standing.start_git()
        self._standing.start_model(*turns, **script)
        self._standing.start_server(**self._environment)

    def _carry_out(self, step, *turns, **script):
        try:
            step(*turns, **script)
        except BaseException:
            self.discard(self._standing)
            raise

    def _is_complete(self, world):
        names = sorted(one.log.stem for one in world.processes)
        return (
            names == ["git", "model", "server"]
            and world.variables == self._environment
            and world.data_dir == self._standing.data_dir
            and world.bearer is None
            and not (world.home / ".config").exists()
        )

    def _empty(self, world):
        world.end_tasks()
        until(lambda: _forgets_all(world), _EMPTY_SECONDS, "all tasks to be forgotten")
        for path in world.directory.iterdir():
            if path.suffix == ".log":
                path.write_bytes(b"")
            elif path.name not in _LEFT_ALONE:
                _remove(path)
        for path in (*world.repositories.iterdir(), *(p for p in world.home.iterdir() if p.name != ".gitconfig")):
            _remove(path)
        return _kept_by(world) == self._kept


def _kept_by(world):
    """What a test may have changed of the machine."""
    return (
        (world.home / ".gitconfig").read_bytes(),
        {path.name for path in world.data_dir.iterdir() if path.name not in {"pruned", "tasks"}},
        {path.name for name in ("pruned", "profiles", "tasks") for path in (world.data_dir / name).glob("*")},
        world.http.get("/api/v1/health/ready").status_code,
    )


def _forgets_all(world):
    for task in world.http.get("/api/v1/tasks?limit=100").json()["tasks"]:
        if task["state"] == "failed_preserved":
            world.http.delete(f"/api/v1/tasks/{task['id']}/vm")
        assert task["state"] in TERMINAL
    world.http.post("/api/v1/admin/prune?older_than_seconds=0")
    return not any(any((world.data_dir / name).glob("*")) for name in ("tasks", "pruned"))


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
