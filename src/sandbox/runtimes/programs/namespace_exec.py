"""Runs an additional command in a namespace sandbox. A separate program, like the launcher.

It enters the namespaces of the sandbox's init through a pidfd, so it does not depend on a path or a process id that a
process inside could have replaced. Then it switches to the sandbox's user, drops all privileges, opens a pty of the
sandbox's devpts and starts the command on the pty. It stays outside the sandbox's pid namespace as the command's
parent, so processes inside do not see it and cannot read its memory.

Arguments: control descriptor, parent's pid, uid inside, rows, columns, directory. The last argument is a marker for
finding the process and is otherwise ignored. One message then passes the pidfd and three files: the command's argv, its
environment and the seccomp filter.
"""

import _socket
import ctypes
import fcntl
import os
import stat
import struct
import sys

_signal = __import__("_signal")  # built in, and unknown to type checkers
# These are imported from this directory, not as modules of the package.
launcher = __import__("launcher")
inherited_limits = __import__("inherited_limits")

PTMX_PATH = "/dev/pts/ptmx"
"""A path under a mount point, which no process in the sandbox can move. `/dev/ptmx` may have been replaced."""

NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""Mount, cgroup, UTS, IPC, user, pid and network namespaces. The process enters either all of them or none."""

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
CAPABILITY_VERSION, CAPABILITIES_MAX = 0x20080522, 64
TIOCSCTTY, TIOCSWINSZ, TIOCSPTLCK, TIOCGPTPEER = 0x540E, 0x5414, 0x40045431, 0x5441
EXIT_NOT_STARTED = 127
DESCRIPTORS_MAX = 8
"""Maximum number of descriptors in the message."""

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *values: int) -> int:
    numbers = [ctypes.c_ulong(value) for value in (*values, *(0,) * (4 - len(values)))]
    return int(_libc.prctl(option, *numbers))


def receive_descriptors(control: _socket.socket) -> list[int]:
    """Return the descriptors of the only message. Exits silently if the runner hangs up instead."""
    message, ancillary, _, _ = control.recvmsg(16, _socket.CMSG_SPACE(4 * DESCRIPTORS_MAX), _socket.MSG_CMSG_CLOEXEC)
    if message != b"join":
        os._exit(0)
    return [number for _, _, data in ancillary for (number,) in struct.iter_unpack("i", data)]


def read_file(descriptor: int) -> bytes:
    """Return the content of a memfd, from its start."""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def enter_sandbox(init_pidfd: int, uid: int) -> None:
    """Enter the namespaces, then switch to a user that has no privileges and cannot gain any."""
    if os.getuid() == 0:
        os.setgroups([])
    launcher.check_errno(_libc.setns(init_pidfd, NAMESPACES), "setns")
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    for capability in range(CAPABILITIES_MAX):
        if _prctl(PR_CAPBSET_DROP, capability) != 0:
            break
    header, none = struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24)
    launcher.check_errno(_libc.capset(header, none), "capset")
    launcher.check_errno(_prctl(PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")


def open_pty(rows: int, columns: int) -> tuple[int, int]:
    """Open a pty of the sandbox's devpts. Returns the master and the slave."""
    master_fd = os.open(PTMX_PATH, os.O_RDWR | os.O_NOCTTY | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(master_fd)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(5, 2):
        raise OSError(f"{PTMX_PATH} is not a pty multiplexer")
    fcntl.ioctl(master_fd, TIOCSPTLCK, struct.pack("i", 0))
    fcntl.ioctl(master_fd, TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    # Open the slave through the master's descriptor, because its name could refer to another file by now.
    inner = fcntl.ioctl(master_fd, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    return master_fd, inner


def exec_on_pty(argv: list[bytes], environment_entries: list[bytes], directory: str, filter_: bytes, pty: int) -> None:
    """In the child: create a session on the terminal and exec the command. Never returns."""
    try:
        os.setsid()
        fcntl.ioctl(pty, TIOCSCTTY, 0)
        for number in range(3):
            os.dup2(pty, number)
        os.chdir(directory)
        environment = dict(variable.split(b"=", 1) for variable in environment_entries)
        launcher.install_seccomp_filter(filter_)
        os.execvpe(argv[0], argv, environment)  # noqa: S606
    except OSError as error:
        os.write(2, f"{os.fsdecode(argv[0])} could not be started: {error.strerror}\r\n".encode(errors="replace"))
    finally:
        os._exit(EXIT_NOT_STARTED)


def wait_for_parent(channel: _socket.socket) -> None:
    """In the child: make the kernel kill this process when its parent ends, then wait for the parent's response.

    The response shows that the parent had not already ended. The child cannot check this in another way, because the
    parent's pid is not visible in the sandbox.
    """
    launcher.check_errno(_prctl(PR_SET_PDEATHSIG, _signal.SIGKILL), "prctl")
    channel.send(b"ready")
    if channel.recv(2) != b"go":
        os._exit(EXIT_NOT_STARTED)


def locate_argv() -> tuple[int, int]:
    """Return the address and length of this process's arguments in its memory."""
    with open("/proc/self/stat", "rb") as file:  # noqa: PTH123  (pathlib doubles the start)
        numbers = file.read().rpartition(b")")[2].split()
    begin, end = int(numbers[45]), int(numbers[46])
    return begin, end - begin


def start_command(
    init_pidfd: int, descriptors: list[int], uid: int, size: tuple[int, int], directory: str
) -> tuple[int, int]:
    """Enter the sandbox and start the command. Returns its pid and the pty's master.

    descriptors: files with the argv, the environment and the seccomp filter.
    """
    words, variables = (read_file(descriptor).split(b"\0")[:-1] for descriptor in descriptors[:2])
    filter_ = read_file(descriptors[2])
    parent, argv_location = os.getppid(), locate_argv()
    enter_sandbox(init_pidfd, uid)
    launcher.set_parent_death_signal(parent)
    pty_master, pty_peer = open_pty(*size)
    parent_socket, child_socket = _socket.socketpair()
    # Clear the arguments before the fork: the child gets a copy, which would show host paths to processes inside.
    argv_copy = ctypes.string_at(*argv_location)
    ctypes.memset(argv_location[0], 0, argv_location[1])
    child = os.fork()
    if child == 0:
        parent_socket.close()
        wait_for_parent(child_socket)
        exec_on_pty(words, variables, directory, filter_, pty_peer)
    ctypes.memmove(argv_location[0], argv_copy, argv_location[1])  # so the host finds this process by its marker
    child_socket.close()
    os.close(pty_peer)
    if parent_socket.recv(5) != b"ready":
        raise OSError("the command's process ended before the command started")
    parent_socket.send(b"go")
    return child, pty_master


def main(arguments: list[str]) -> None:
    """Run until the command ends, and report its status. Report an earlier error over the control socket."""
    control_number, parent, uid, rows, columns, directory = arguments[:-1]
    control = _socket.socket(fileno=int(control_number))
    os.set_inheritable(control.fileno(), False)
    try:
        launcher.set_parent_death_signal(int(parent))
        inherited_limits.apply_process_limits()
        inherited_limits.limit_open_files()
        launcher.check_errno(_prctl(PR_SET_DUMPABLE, 0), "prctl")
        first_process, *descriptors = receive_descriptors(control)
        child, terminal = start_command(first_process, descriptors, int(uid), (int(rows), int(columns)), directory)
        numbers = struct.pack("ii", terminal, os.pidfd_open(child))
        control.sendmsg([b"open"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)])
        os.close(terminal)
        control.send(b"exit %d" % _exit_code(os.waitpid(child, 0)[1]))
    except Exception as error:
        control.send(f"error {error}".encode(errors="replace")[:4096])
        sys.exit(1)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
