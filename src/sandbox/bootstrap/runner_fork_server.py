"""Entry point of the fork server of the runners: `python -m sandbox.bootstrap.runner_fork_server --control-fd=N`.

Forks a runner for each request from the socket N. `placements.local.runner_starters.RunnerForkServer` is its client.
"""

import gc

if __name__ == "__main__":
    # During the imports, the garbage collector would scan the permanent objects of modules a hundred times.
    gc.disable()

import errno
import os
import select
import socket
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from sandbox.agents import registered_agents
from sandbox.bootstrap.runner import run_order
from sandbox.bootstrap.runtime_selection import import_runtime
from sandbox.interfaces.agent import Agent
from sandbox.runtimes.limits.kernel_memory import load_slab_kinds

_REQUEST_BYTES_MAX = 256


def main(get_agents: Callable[[], Mapping[str, Agent]] = registered_agents) -> None:
    """Import everything that runners need, and fork runners until the server closes the socket.

    get_agents: returns the agents, keyed by their manifest section; the server must have the same agents.
    """
    [option] = sys.argv[-1:]
    import_for_attempts(get_agents())
    lock_fd = fork_runners(socket.socket(fileno=int(option.removeprefix("--control-fd="))))
    run_order(get_agents, lock_fd)


def import_for_attempts(agents: Mapping[str, Agent]) -> None:
    """Import and read what runners would otherwise import or read only when they need it."""
    for module in ("array", "concurrent.futures.thread", "encodings.idna", "sandbox.secrets.redaction.redactor"):
        import_module(module)

    for agent in agents.values():
        agent.create_dialect()
        agent.create_driver(Path("/nonexistent"))
    load_slab_kinds()


def fork_runners(control: socket.socket) -> int:
    """Fork a runner for each request until the server closes the socket; then exit.

    Returns only in the runners, with the descriptor of the lock (see `run_order`). This process must have no threads.
    It never holds the lock: a runner receives its own descriptors from the socket.
    """
    control.set_inheritable(False)
    null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    _replace_standard_files(null_fd, null_fd)
    runner_pidfds: set[int] = set()
    events = select.poll()
    events.register(control, select.POLLIN)
    while True:
        for ready_fd, _ in events.poll():
            if ready_fd in runner_pidfds:
                os.waitid(os.P_PIDFD, ready_fd, os.WEXITED)
                events.unregister(ready_fd)
                runner_pidfds.remove(ready_fd)
                os.close(ready_fd)
                continue
            _prepare_request(control)
            ack_read_fd, ack_write_fd = os.pipe()
            pid = _fork(control)
            if pid == 0:
                for descriptor in (ack_read_fd, *runner_pidfds):
                    os.close(descriptor)
                return _become_runner(control, ack_write_fd)
            os.close(ack_write_fd)
            if pid is not None and os.read(ack_read_fd, 1):
                runner_pidfds.add(pidfd := os.pidfd_open(pid))
                events.register(pidfd, select.POLLIN)
                socket.send_fds(control, [b"forked"], [pidfd])
            elif pid is not None:
                os.waitpid(pid, 0)
                _refuse(control, errno.EAGAIN)
            os.close(ack_read_fd)


def _prepare_request(control: socket.socket) -> None:
    """Import the runtime that the next request names, and leave the request in the socket.

    Exits when the server has closed the socket.
    """
    try:
        runtime = control.recv(_REQUEST_BYTES_MAX, socket.MSG_PEEK)
    except ConnectionError:
        runtime = b""
    if not runtime:
        sys.exit(0)
    import_runtime(runtime.decode())
    gc.freeze()


def _fork(control: socket.socket) -> int | None:
    """Fork. Returns None, and reports the error to the server, if the host lacks resources."""
    try:
        return os.fork()
    except OSError as error:
        _refuse(control, error.errno or errno.EAGAIN)
        return None


def _refuse(control: socket.socket, error_number: int) -> None:
    """Drop the next request, and report an error to the server."""
    control.recv(_REQUEST_BYTES_MAX)
    control.send(b"%d" % error_number)


def _become_runner(control: socket.socket, ack_write_fd: int) -> int:
    """Receive the descriptors of the order, the log and the lock, and start a session. Returns the lock."""
    descriptors = socket.recv_fds(control, _REQUEST_BYTES_MAX, 3, socket.MSG_CMSG_CLOEXEC)[1]
    control.close()
    if not descriptors:
        os._exit(1)
    order_fd, log_fd, lock_fd = descriptors
    os.write(ack_write_fd, b"1")
    os.close(ack_write_fd)
    os.setsid()
    _replace_standard_files(order_fd, log_fd)
    return lock_fd


def _replace_standard_files(input_fd: int, output_fd: int) -> None:
    """Replace stdin, stdout and stderr. Closes the given descriptors."""
    for standard_fd, replacement_fd in enumerate((input_fd, output_fd, output_fd)):
        os.dup2(replacement_fd, standard_fd)
    for descriptor in {input_fd, output_fd}:
        os.close(descriptor)


if __name__ == "__main__":
    main()
