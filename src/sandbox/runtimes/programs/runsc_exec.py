"""Runs runsc against a running sandbox. A separate program, like the launcher.

It enters the namespaces of the sandbox's own runsc through a pidfd and becomes root of their user namespace: the
sandbox's kernel uid, without privileges on the host. There it execs runsc, directly or on a pty that it opens first.

Arguments: control descriptor, parent's pid, rows and columns (0 for no terminal). The last argument is a marker for
finding the process and is otherwise ignored. One message then passes the pidfd and runsc's argv in a memfd. For a
terminal, it passes three more files, which runsc gets as descriptors numbered from the launcher's
FIRST_HIGH_DESCRIPTOR. The first one contains the command. The others are empty: runsc writes its log messages and the
started command's pid into them.
"""

import _socket
import ctypes
import fcntl
import os
import resource
import struct
import sys

# These are imported from this directory, not as modules of the package.
namespace_exec = __import__("namespace_exec")
launcher = __import__("launcher")
inherited_limits = __import__("inherited_limits")

NAMESPACES = launcher.CLONE_NEWNS | launcher.CLONE_NEWUSER | launcher.CLONE_NEWNET
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}
TIOCSCTTY = 0x540E
EXIT_NOT_STARTED = 127
EXIT_RUNSC_FAILED = 128
"""Exit code of a runsc that failed; its log messages contain the reason for the failure."""
EXIT_KILLED = 128 + 9
DATA_BYTES_MAX = 256 * 1024 * 1024
CPU_SECONDS_MAX = 5
"""Limits of a runsc without a terminal, which runs outside the sandbox's control group.

It reads responses of any size from gVisor's kernel, which a program in the sandbox may have taken over.
"""

_libc = ctypes.CDLL(None, use_errno=True)


def enter_sandbox(runsc_pidfd: int, parent: int) -> None:
    """Become root of the sandbox's user namespace, in its mount and network namespaces."""
    launcher.check_errno(_libc.setns(runsc_pidfd, NAMESPACES), "setns")
    launcher.switch_to_uid(0)
    launcher.set_parent_death_signal(parent)


def exec_runsc(argv: list[bytes], pty: int, files: list[int]) -> None:
    """In the child: create a session on the terminal and exec runsc. Never returns."""
    try:
        os.setsid()
        fcntl.ioctl(pty, TIOCSCTTY, 0)
        for number in range(3):
            os.dup2(pty, number)
        for number, file in enumerate(files, launcher.FIRST_HIGH_DESCRIPTOR):
            os.dup2(file, number)
        os.execve(argv[0], argv, ENVIRONMENT)  # noqa: S606
    finally:
        os._exit(EXIT_NOT_STARTED)


def run_on_pty(control: _socket.socket, argv: list[bytes], files: list[int], size: tuple[int, int]) -> None:
    """Start runsc, send the pty's master to the runner, wait for runsc and report its exit status."""
    pty_master, pty_peer = namespace_exec.open_pty(*size)
    parent_socket, child_socket = _socket.socketpair()
    child = os.fork()
    if child == 0:
        parent_socket.close()
        namespace_exec.wait_for_parent(child_socket)
        exec_runsc(argv, pty_peer, files)
    child_socket.close()
    if parent_socket.recv(5) != b"ready":
        raise OSError("runsc ended before it started")
    parent_socket.send(b"go")
    numbers = struct.pack("ii", pty_master, os.pidfd_open(child))
    control.sendmsg([b"open"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)])
    os.close(pty_master)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _, messages, started_size = (os.fstat(file).st_size for file in files)
    if code == EXIT_RUNSC_FAILED and started_size and messages:
        code = EXIT_KILLED  # killed with its sandbox
    elif code == EXIT_RUNSC_FAILED and messages:
        os.write(pty_peer, b"The command could not be started.\r\n")
        code = EXIT_NOT_STARTED
    control.send(b"exit %d" % (code if code >= 0 else 128 - code))


def main(arguments: list[str]) -> None:
    """Run until the exec or, with a terminal, until runsc ends. An error is reported over the control socket."""
    control_number, parent, rows, columns = map(int, arguments[:-1])
    control = _socket.socket(fileno=control_number)
    os.set_inheritable(control.fileno(), False)
    try:
        launcher.set_parent_death_signal(parent)
        inherited_limits.apply_process_limits()
        inherited_limits.limit_host_program_files()
        runsc, words_file, *files = namespace_exec.receive_descriptors(control)
        words = namespace_exec.read_file(words_file).split(b"\0")
        enter_sandbox(runsc, parent)
        if files:
            run_on_pty(control, words, files, (rows, columns))
        else:
            inherited_limits.lower_limit(resource.RLIMIT_DATA, DATA_BYTES_MAX)
            inherited_limits.lower_limit(resource.RLIMIT_CPU, CPU_SECONDS_MAX)
            os.execve(words[0], words, ENVIRONMENT)  # noqa: S606
    except Exception as error:
        control.send(f"error {error}".encode(errors="replace")[:4096])
        sys.exit(1)
