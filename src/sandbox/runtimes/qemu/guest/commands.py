"""Processes of the sandbox in the guest: its init and its commands, confined as on the host."""

import ctypes
import os
import resource

from . import guest_setup

_signal = __import__("_signal")  # built in, and unknown to type checkers

_CLONE_NEWIPC, _CLONE_NEWPID = 0x08000000, 0x20000000
_PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 24, 38, 2
_SECCOMP_FILTER_FILE = "/filter"
UID = 1000


class _SockFprog(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def start_init() -> int:
    """Create a pid namespace for commands, with an init that reaps orphans. Killing the init ends the whole namespace.

    Every later child of this process is in the namespace. Returns init's pid. Raises OSError.
    """
    guest_setup.check_errno(guest_setup.libc.unshare(_CLONE_NEWPID | _CLONE_NEWIPC), "unshare")
    done, done_write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_init(done_write_fd)
    os.close(done_write_fd)
    output = os.read(done, 4096)
    os.close(done)
    if output != b"ready":
        raise OSError(0, output.decode(errors="replace"))
    return pid


def _run_init(ready_fd: int) -> None:
    try:
        guest_setup.mount_proc()
        os.write(ready_fd, b"ready")
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGCHLD])
        while True:
            _signal.sigwait([_signal.SIGCHLD])
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                pass
    except BaseException as error:
        os.write(ready_fd, str(error).encode())
    finally:
        os._exit(1)


def start_command(
    command: list[list[bytes]], standard_fds: tuple[int, int, int], terminal: str | None
) -> tuple[int, str]:
    """Fork and exec a command.

    command: directory, argv and environment. standard_fds: the command's first three descriptors, unless `terminal` (a
    path) is given. Returns the command's pid and the reason why it could not be run. The reason is empty on success. It
    is also empty if a terminal is given, because the terminal shows it.
    """
    status_fd, child_status_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_child(command, standard_fds, terminal, child_status_fd)
    os.close(child_status_fd)
    reason = os.read(status_fd, 4096).decode(errors="replace")
    os.close(status_fd)
    return pid, reason


def _run_child(
    command: list[list[bytes]], standard_fds: tuple[int, int, int], terminal: str | None, status_fd: int
) -> None:
    try:
        status_fd = os.dup2(status_fd, 1023, inheritable=False)
        os.setsid()
        guest_setup.write(f"{guest_setup.COMMAND_CGROUP}/cgroup.procs", str(os.getpid()))
        opened = None if terminal is None else os.open(terminal, os.O_RDWR)
        for number, descriptor in enumerate(standard_fds if opened is None else (opened,) * 3):
            os.dup2(descriptor, number)
        os.closerange(3, status_fd)
        _exec_command(command)
    except BaseException as error:
        if terminal is None:
            os.write(status_fd, str(error).encode())
        else:
            name = os.fsdecode(command[1][0])
            os.write(2, f"{name} could not be started: {error}\r\n".encode(errors="replace"))
    finally:
        os._exit(127)


def _exec_command(command: list[list[bytes]]) -> None:
    (directory,), argv, environment = command
    file = os.open(_SECCOMP_FILTER_FILE, os.O_RDONLY)
    program = os.read(file, 65536)
    os.close(file)
    for number in range(1, _signal.NSIG):
        if number not in (_signal.SIGKILL, _signal.SIGSTOP) and not 32 <= number < 34:
            _signal.signal(number, _signal.SIG_DFL)
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chroot(guest_setup.COMMAND_ROOT)
    _drop_privileges()
    os.chdir(directory)
    _install_seccomp_filter(program)
    os.execve(argv[0], argv, dict(word.split(b"=", 1) for word in environment))  # noqa: S606


def _drop_privileges() -> None:
    number = 0
    while guest_setup.libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
        number += 1
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)


def _install_seccomp_filter(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    header = _SockFprog(len(program) // 8, ctypes.addressof(buffer))
    guest_setup.check_errno(guest_setup.libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    guest_setup.check_errno(
        guest_setup.libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0), "seccomp"
    )
