"""The process that becomes a sandbox. A separate program, run without importing the package.

It works in these steps:
1. Create the network and IPC namespaces and open the gateway's listeners in the network.
2. Expose the host files for the sandbox under one path of a private mount namespace.
3. Send the listeners, switch to the sandbox's kernel uid, and report `ready`.
4. Wait for one message with the command and exec it. The message determines the program: bubblewrap, runsc or QEMU. For
   each `run` message, start a program as a child instead and continue to wait.

Only built-in and C modules are imported, because `socket`, `signal` and `json` would double the start time, and
`ctypes` would add a tenth. They are imported before the kernel uid changes, because that uid may not be able to read
this interpreter's files.

Arguments, in this order:
- Control descriptor.
- Parent's pid.
- Kernel uid, or `-` if an ordinary user runs the server.
- Kernel uid of the agent's files if it differs, or `-`.
- Descriptor of a file with a system call filter, for a process that makes the system calls of all programs inside. For
  other processes this is `-`, and open files are limited.
- Transparent ports, separated by commas.
- Triples of KIND, NAME and VALUE to expose at EXPOSED_DIRECTORY/NAME, see `expose_entries`.
- A marker for finding the process. It is otherwise ignored.
"""

import _socket
import fcntl
import os
import select
import struct
import sys

_signal = __import__("_signal")  # built in, and unknown to type checkers
_ctypes = __import__("_ctypes")  # the C module behind `ctypes`

EXPOSED_DIRECTORY = "/run"
DEVPTS_DIRECTORY = f"{EXPOSED_DIRECTORY}/terminals"
"""Mount point of the sandbox's devpts, which contains no terminals of the host."""

DEVICES_DIRECTORY = f"{EXPOSED_DIRECTORY}/devices"
"""The sandbox's /dev, without the mounts under it."""

DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
"""Major and minor numbers of the device files."""

_DEVICE_LINKS = {
    "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
    "core": "/proc/kcore", "ptmx": "pts/ptmx",
}  # fmt: skip

PTYS_MAX = 40
"""Maximum number of open terminals of the devpts. The machine-wide limit is kernel.pty.max."""

INOTIFY_WATCHES_MAX = 131_072
"""Maximum number of inotify watches in the sandbox. The machine-wide limit for a user is fs.inotify.max_user_watches.

A read in /proc/self/fdinfo lists all watches of an instance without interruption: 3 s for a million.
"""

NAMESPACE_SYSCTLS = {
    "net/ipv4/tcp_rmem": "4096 32768 1048576",
    "net/ipv4/tcp_wmem": "4096 16384 1048576",
    "net/ipv4/tcp_max_tw_buckets": "16384",
    "net/ipv4/tcp_no_metrics_save": "1",
    "net/ipv4/tcp_fastopen": "0",
    "net/ipv4/igmp_max_memberships": "2",
    "net/core/optmem_max": "20480",
    "net/core/tstamp_allow_data": "0",
    "kernel/msgmni": "64",
    "kernel/sem": "32000 1024000 500 32000",
}
"""Settings of the sandbox's network and IPC namespaces: sizes in bytes, maximum numbers, and switches.

tcp_rmem: a connection that no program has accepted uses about the second number of bytes. tcp_max_tw_buckets: limits
connections in TIME_WAIT. igmp_max_memberships: limits the multicast memberships of a socket. tcp_no_metrics_save,
tcp_fastopen: connections leave no entries in the machine's table of TCP metrics. tstamp_allow_data: sent data is not
queued with its timestamp. msgmni: limits System V message queues. When the namespace ends, a kernel thread frees all
messages without interruption: 0.9 s for 6 million. sem: the second number limits all System V semaphores, which the
thread frees in the same way: 0.08 s for 16 million. The other numbers of sem are the kernel's defaults.
"""

HOST_PATH_KINDS = ("bind", "image", "overlay", "program")
FIRST_HIGH_DESCRIPTOR = 100
"""The program's number for the third descriptor in the message; the following descriptors get the next numbers."""

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP = 28, 4
PR_CAPBSET_DROP, CAP_SYS_PTRACE = 24, 19
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
RTM_NEWROUTE, NLMSG_ERROR, NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE = 24, 2, 1, 4, 0x400
RTA_DST, RTA_OIF, RT_TABLE_LOCAL, RTPROT_BOOT, RT_SCOPE_HOST, RTN_LOCAL = 1, 4, 255, 3, 254, 2
LOOPBACK_INDEX, SOCK_DIAG, SO_TIMESTAMP = 1, 4, 29

# Equivalents of the types `ctypes.c_int`, `c_void_p` and `c_char_p`, and of the functions of
# `ctypes.CDLL(None, use_errno=True)`.
_Int, _Pointer, _Text = (type(code, (_ctypes._SimpleCData,), {"_type_": code}) for code in "iPz")
_FUNCTION_FLAGS = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
_Function = type("_Function", (_ctypes.CFuncPtr,), {"_flags_": _FUNCTION_FLAGS, "_restype_": _Int})
_libc = _ctypes.dlopen(None, os.RTLD_NOW)
_mount_call, _prctl, _unshare = (_Function(_ctypes.dlsym(_libc, name)) for name in ("mount", "prctl", "unshare"))


def check_errno(result: int, operation: str) -> None:
    if result != 0:
        number = _ctypes.get_errno()
        raise OSError(number, f"{operation}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check_errno(_mount_call(texts[0], texts[1], texts[2], flags, texts[3]), f"mount {target}")


def set_parent_death_signal(parent: int) -> None:
    """Make the kernel kill this process when the thread that started it ends. Call this again after each uid change."""
    check_errno(_prctl(PR_SET_PDEATHSIG, _signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os._exit(1)


def unshare_namespaces(as_root: bool) -> None:
    """Leave the host's network, mounts and IPC objects. An ordinary user first becomes root of a user namespace."""
    uid, gid = os.getuid(), os.getgid()
    namespaces = CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC
    check_errno(_unshare(namespaces | (0 if as_root else CLONE_NEWUSER)), "unshare")
    if not as_root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123  (pathlib doubles the start)
                file.write(text)
        limit_watches()
    # Mounts do not propagate to the host, but the host's unmounts propagate here, so no device stays busy.
    _mount("none", "/", None, MS_REC | MS_SLAVE)
    if as_root:
        mount_unmasked_proc()


def mount_unmasked_proc() -> None:
    """Mount a complete /proc over the host's.

    In a container, other mounts cover some files in the host's /proc. A user namespace may mount its own /proc only if
    an uncovered one is visible (mount_namespaces(7), "locked" mounts).
    """
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def limit_kernel_objects() -> None:
    """Limit message queues, and the socket memory in this network namespace that no control group counts.

    A container's /proc/sys may be read-only, and older kernels have some of these settings only for the whole machine.
    """
    for name, value in NAMESPACE_SYSCTLS.items():
        try:
            with open(f"/proc/sys/{name}", "w") as file:  # noqa: PTH123
                file.write(value)
        except OSError:
            pass


def limit_watches() -> None:
    """Limit the inotify watches in this user namespace and in those that programs create in it."""
    try:
        with open("/proc/sys/user/max_inotify_watches", "w") as file:  # noqa: PTH123
            file.write(str(INOTIFY_WATCHES_MAX))
    except OSError:  # a container's /proc/sys may be read-only, and a kernel may be built without inotify
        pass


def configure_loopback() -> None:
    """Bring `lo` up and make all addresses of 198.18.0.0/15 local to this namespace."""
    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    fcntl.ioctl(any_socket.fileno(), SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))
    any_socket.close()
    route = struct.pack(
        "=BBBBBBBBI", _socket.AF_INET, 15, 0, 0, RT_TABLE_LOCAL, RTPROT_BOOT, RT_SCOPE_HOST, RTN_LOCAL, 0
    )
    route += struct.pack("=HH4s", 8, RTA_DST, bytes([198, 18, 0, 0])) + struct.pack("=HHI", 8, RTA_OIF, LOOPBACK_INDEX)
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE
    netlink = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, 0)
    netlink.sendto(struct.pack("=IHHII", 16 + len(route), RTM_NEWROUTE, flags, 1, 0) + route, (0, 0))
    response = netlink.recv(4096)
    netlink.close()
    kind, error = struct.unpack_from("=4xH10xi", response)
    if kind != NLMSG_ERROR or error != 0:
        raise OSError(-error, f"route to 198.18.0.0/15: {os.strerror(-error)}")


def open_listeners(transparent_ports: list[int]) -> list[_socket.socket]:
    """Open the listeners in the order that the runner expects: model, proxy, DNS over UDP and TCP, transparent ports.

    The first two ports are those of interfaces/gateway.py, which this program cannot import.
    """
    stream, datagram = _socket.SOCK_STREAM, _socket.SOCK_DGRAM
    addresses = [
        (stream, "127.0.0.1", 8123),
        (stream, "127.0.0.1", 3128),
        (datagram, "0.0.0.0", 53),  # noqa: S104  (all addresses of a namespace that contains nothing else)
        (stream, "0.0.0.0", 53),  # noqa: S104
        *((stream, "0.0.0.0", port) for port in transparent_ports),  # noqa: S104
    ]
    return [_open_listener(*one) for one in addresses]


def _open_listener(kind: int, address: str, port: int) -> _socket.socket:
    listener = _socket.socket(_socket.AF_INET, kind)
    listener.bind((address, port))
    if kind == _socket.SOCK_STREAM:
        listener.listen(512)
    return listener


def expose_entries(entries: list[tuple[str, str, str]], kernel_uid: int | None) -> None:
    """Expose each entry at EXPOSED_DIRECTORY/NAME, for a kernel uid that has no access to the host's directories.

    The kind determines what is exposed and what the value means:
    - `overlay`: a host path, read-only, with separate inodes if the kernel supports it. Value: the path.
    - `bind` (writable), `image` (read-only), `program` (read-only, readable by all): a host path. Value: the path.
    - `link`: a symbolic link. Value: its target.
    - `file`: a file, mounted over an existing one. Value: its text.
    - `directory`: an empty directory. The value is ignored.
    - `own`: a directory owned by the kernel uid. The value is ignored.
    - `memory`: an empty tmpfs that hides existing files. Value: the mount options; if empty, the limit is 1 MiB.
    """
    # Open the paths first, because the mount at EXPOSED_DIRECTORY hides the host's files under it.
    sources = {path: os.open(path, os.O_PATH) for kind, _, path in entries if kind in HOST_PATH_KINDS}
    with_parents = {path: os.path.dirname(path) for kind, _, path in entries if kind in ("overlay", "program")}  # noqa: PTH120
    parent_fds = {path: os.open(parent, os.O_PATH) for path, parent in with_parents.items()}
    _mount("tmpfs", EXPOSED_DIRECTORY, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    for kind, name, value in entries:
        target = f"{EXPOSED_DIRECTORY}/{name}"
        os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120
        if kind in HOST_PATH_KINDS:
            source = f"/proc/self/fd/{sources[value]}"
            if kind == "program" and not os.stat(source).st_mode & 0o004:  # noqa: PTH116
                readable = f"{EXPOSED_DIRECTORY}/readable/{name}"
                source = make_program_readable(parent_fds[value], os.path.basename(value), readable)  # noqa: PTH119
            if kind == "overlay" and expose_overlay(value, source, parent_fds[value], name):
                continue
            _bind(source, target, is_read_only=kind != "bind")
        elif kind == "link":
            os.symlink(value, target)  # noqa: PTH211
        elif kind == "file":
            _expose_file(target, f"{EXPOSED_DIRECTORY}/files/{name}", value)
        else:
            os.makedirs(target, exist_ok=True)  # noqa: PTH103
        if kind == "own" and kernel_uid is not None:
            os.chown(target, kernel_uid, kernel_uid)
        if kind == "memory":
            _mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, value or "mode=0755,size=1m")
    for descriptor in (*sources.values(), *parent_fds.values()):
        os.close(descriptor)


def expose_overlay(path: str, source: str, parent: int, name: str) -> bool:
    """Expose a path at EXPOSED_DIRECTORY/NAME through a read-only overlay.

    For a file, the overlay contains the file's directory.

    source: another path of the same file. parent: descriptor of its directory. Returns False if the overlay cannot be
    exposed.
    """
    target = f"{EXPOSED_DIRECTORY}/{name}"
    if os.path.isdir(source):  # noqa: PTH112
        return not _has_mounts_below(path) and _mount_overlay(source, target)
    # An ordinary user's overlay opens files as that user, who may be allowed to execute them but not to read them.
    overlay = f"{EXPOSED_DIRECTORY}/overlays/{name}"
    if not os.access(source, os.R_OK) or not _mount_overlay(f"/proc/self/fd/{parent}", overlay):
        return False
    file = f"{overlay}/{os.path.basename(path)}"  # noqa: PTH119
    if not _is_same_inode(file, source):
        return False
    _bind(file, target, is_read_only=True)
    return True


def _is_same_inode(file: str, source: str) -> bool:
    """Return whether both paths have the same inode number. The numbers differ if `file` is a mount point or a link."""
    return os.path.exists(file) and os.stat(file).st_ino == os.stat(source).st_ino  # noqa: PTH110, PTH116


def _has_mounts_below(directory: str) -> bool:
    """Return whether file systems are mounted under the directory; an overlay of it would not contain them."""
    prefix = directory.rstrip("/") + "/"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:  # noqa: PTH123
        return any(line.split(" ", 5)[4].startswith(prefix) for line in mounts)


def _mount_overlay(directory: str, target: str) -> bool:
    """Mount a read-only overlay with separate inodes, so file locks and inotify watches are separate too.

    Returns False if the kernel refuses it, as in user namespaces before Linux 5.11.
    """
    empty = f"{EXPOSED_DIRECTORY}/empty"  # an overlay without an upper directory needs two lower ones
    for path in (empty, target):
        os.makedirs(path, exist_ok=True)  # noqa: PTH103
    options = f"lowerdir={directory}:{empty},xino=off,redirect_dir=nofollow,metacopy=off"
    try:
        _mount("overlay", target, "overlay", MS_RDONLY | MS_NOSUID | MS_NODEV, options)
    except OSError:
        return False
    return True


def make_program_readable(directory: int, program: str, overlay: str) -> str:
    """Return the path of a readable view of an execute-only program. Only its mode is copied up, not its content."""
    for name in ("upper", "scratch", "view"):
        os.makedirs(f"{overlay}/{name}")  # noqa: PTH103
    overlay_options = f"lowerdir=/proc/self/fd/{directory},upperdir={overlay}/upper,workdir={overlay}/scratch"
    _mount("overlay", f"{overlay}/view", "overlay", MS_NOSUID | MS_NODEV, f"{overlay_options},metacopy=on,xino=off")
    os.chmod(f"{overlay}/view/{program}", 0o555)  # noqa: PTH101, S103
    return f"{overlay}/view/{program}"


def _bind(path: str, target: str, *, is_read_only: bool) -> None:
    if os.path.isdir(path):  # noqa: PTH112
        os.makedirs(target, exist_ok=True)  # noqa: PTH103
    else:
        os.close(os.open(target, os.O_RDONLY | os.O_CREAT))
    _mount(path, target, None, MS_BIND | MS_REC)
    if is_read_only:
        _mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _expose_file(target: str, fallback: str, text: str) -> None:
    """Write the file, or mount it over an existing one, which may belong to an image and is never written to."""
    path = fallback if os.path.exists(target) else target  # noqa: PTH110
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
    with open(path, "w", errors="surrogateescape") as file:  # noqa: PTH123
        file.write(text)
    if path != target:
        _bind(path, target, is_read_only=True)


def mount_devpts() -> None:
    """Mount a devpts at DEVPTS_DIRECTORY, and at the paths that gVisor uses if they exist on the host."""
    os.mkdir(DEVPTS_DIRECTORY)  # noqa: PTH102
    options = f"newinstance,ptmxmode=0666,mode=0600,max={PTYS_MAX}"
    _mount("devpts", DEVPTS_DIRECTORY, "devpts", MS_NOSUID | MS_NOEXEC, options)
    for source, target in ((DEVPTS_DIRECTORY, "/dev/pts"), (f"{DEVPTS_DIRECTORY}/ptmx", "/dev/ptmx")):
        if os.path.exists(target):  # noqa: PTH110
            _mount(source, target, None, MS_BIND)


def create_devices() -> None:
    """Create the sandbox's /dev at DEVICES_DIRECTORY.

    The device files are not those of the host. Otherwise, a task could watch the host's /dev/null with inotify. Each
    host program that uses the file would then add the events itself, allocate the task's memory for them, which can
    take seconds if the task's memory is full, and wake up everything in the task that waits for them.

    The host's files are used if no others can be created, as in a user namespace.
    """
    nodes = f"{EXPOSED_DIRECTORY}/nodes"
    os.mkdir(nodes)  # noqa: PTH102
    _mount("tmpfs", nodes, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=0700,size=64k,nr_inodes=64")
    for name in ("", "pts", "shm"):
        os.mkdir(f"{DEVICES_DIRECTORY}/{name}")  # noqa: PTH102
    for name, target in _DEVICE_LINKS.items():
        os.symlink(target, f"{DEVICES_DIRECTORY}/{name}")  # noqa: PTH211
    for name, (major, minor) in DEVICES.items():
        node = f"{nodes}/{name}"
        try:
            os.mknod(node, 0o20666, os.makedev(major, minor))  # 0o20000: a character device
            os.chmod(node, 0o666)  # noqa: PTH101, S103  (independent of the umask)
        except PermissionError:
            node = f"/dev/{name}"
        _bind(node, f"{DEVICES_DIRECTORY}/{name}", is_read_only=False)


def unshare_user_namespace(uids: dict[int, int], owner: int) -> None:
    """Enter a new user namespace with these uids and gids of the host, keyed by the ids in the namespace.

    A child that stays outside maps the ids, because a process that is already in the namespace cannot map two uids.
    The child does not pass the namespace as a file: a process in the namespace is not privileged, so files that any
    program of root has in transit could prevent that.

    owner: the host's uid to which the kernel charges the sandbox's inotify instances and watches, bytes in POSIX
    message queues, and queued signals. If root created the namespace, one sandbox could use up the limits of root and
    all other sandboxes.
    """
    launcher_socket, child_socket = _socket.socketpair()
    launcher = os.getpid()
    child = os.fork()
    if child == 0:
        launcher_socket.close()
        try:
            _map_ids(launcher, uids, child_socket)
        finally:
            os._exit(1)
    child_socket.close()
    _create_user_namespace(owner)
    launcher_socket.send(b"made")
    if launcher_socket.recv(6) != b"mapped":
        raise OSError("the ids of a user namespace could not be mapped")
    launcher_socket.close()
    os.waitpid(child, 0)
    limit_watches()


def _map_ids(launcher: int, uids: dict[int, int], report: _socket.socket) -> None:
    """Map the ids of the launcher's namespace as soon as the launcher has created it."""
    if report.recv(4) != b"made":
        return
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{launcher}/{name}", "w") as file:  # noqa: PTH123
            file.write("".join(f"{inside} {uid} 1\n" for inside, uid in uids.items()))
    report.send(b"mapped")


def _create_user_namespace(owner: int) -> None:
    """Enter a new user namespace that the host's uid `owner` owns.

    The capabilities are kept, because some hosts allow only privileged processes to create user namespaces.
    """
    _prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
    os.seteuid(owner)
    check_errno(_unshare(CLONE_NEWUSER), "a user namespace could not be created")


def switch_to_uid(uid: int) -> None:
    """Switch to this uid and the gid with the same number, without supplementary groups."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def install_seccomp_filter(instructions: bytes) -> None:
    """Filter all later system calls of this process and its descendants."""
    check_errno(_prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    program = struct.pack("H", len(instructions) // 8) + bytes(6) + struct.pack("P", _pointer(instructions))
    check_errno(_prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, _Pointer(_pointer(program)), 0, 0), "seccomp")


def _pointer(data: bytes) -> int:
    return int.from_bytes(memoryview(_Text(data)), sys.byteorder)


def open_sock_diag() -> list[_socket.socket]:
    """Open a socket that reports all sockets of this network namespace (SOCK_DIAG); none if it is not supported.

    See `SocketCounter` in limits/socket_memory.py. The socket keeps packet time stamps enabled (SO_TIMESTAMP): when
    the first socket enables them and when the last one is closed, the kernel changes its own code, which interrupts
    every processor of the machine.
    """
    try:
        counter = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, SOCK_DIAG)
        counter.setsockopt(_socket.SOL_SOCKET, SO_TIMESTAMP, 1)
        return [counter]
    except OSError:
        return []


def send_sockets(control: _socket.socket, sockets: list[_socket.socket]) -> None:
    """Send the runner the sockets that it needs, and close them in this process."""
    numbers = struct.pack(f"{len(sockets)}i", *(one.fileno() for one in sockets))
    control.sendmsg([b"sockets"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)])
    for one in sockets:
        one.close()


def serve(control: _socket.socket) -> None:
    """Handle messages: `run` starts a program, `start` passes the command to exec. Exits when the runner hangs up."""
    buffer_bytes = _socket.CMSG_SPACE(4 * (FIRST_HIGH_DESCRIPTOR - 10))
    while True:
        message, ancillary, _, _ = control.recvmsg(16, buffer_bytes, _socket.MSG_CMSG_CLOEXEC)
        numbers = [number for _, _, data in ancillary for (number,) in struct.iter_unpack("i", data)]
        if message == b"start":
            argv_file, stdin, *rest = numbers
            os.dup2(stdin, 0)
            exec_program(argv_file, rest)
        if not message.startswith(b"run "):
            os._exit(0)
        # Let the kernel reap the supervisors.
        _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)
        parent = os.getpid()
        if os.fork() == 0:
            control.close()
            set_parent_death_signal(parent)
            supervise(int(message[4:]), *numbers)
        for number in numbers:
            os.close(number)


def supervise(low_fd_count: int, status_fd: int, argv_file: int, *descriptors: int) -> None:
    """Start a program, kill it when the runner closes `status_fd`, and report its exit status there.

    low_fd_count: how many descriptors are numbered from 0; the others are numbered from FIRST_HIGH_DESCRIPTOR.
    """
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    status, parent = _socket.socket(fileno=status_fd), os.getpid()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            set_parent_death_signal(parent)
            # Move all descriptors out of the way first: a target number may belong to a descriptor that is duplicated
            # later.
            high = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 300) for number in (argv_file, *descriptors)]
            for target, number in enumerate(high[1 : low_fd_count + 1]):
                os.dup2(number, target)
            exec_program(high[0], high[low_fd_count + 1 :])
        finally:
            os._exit(127)
    for number in descriptors:
        os.close(number)
    poll = select.poll()
    poll.register(os.pidfd_open(child), select.POLLIN)
    poll.register(status, select.POLLIN)
    poll.poll()
    # Kill the process group too: a child that bubblewrap has just forked could outlive bubblewrap and keep the pipes
    # open.
    for kill in (os.kill, os.killpg):
        try:  # noqa: SIM105  (importing contextlib slows the start down)
            kill(child, _signal.SIGKILL)
        except ProcessLookupError:
            pass
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        status.send(b"%d" % code)
    finally:
        os._exit(0)


def exec_program(argv_file: int, descriptors: list[int]) -> None:
    """Exec the argv in the file: the path, then the arguments starting with argv[0]."""
    program, *argv = os.pread(argv_file, os.fstat(argv_file).st_size, 0).split(b"\0")
    for target, number in enumerate(descriptors, FIRST_HIGH_DESCRIPTOR):
        os.dup2(number, target)
    # pid 1 inside keeps this environment readable in /proc, so the environment must not reveal anything about the host.
    os.execve(program, argv, {"PATH": "/usr/bin:/bin"})  # noqa: S606


def main(arguments: list[str]) -> None:
    """Run until the exec. An error before the exec is reported over the control socket."""
    control_number, parent, kernel_uid, files_uid, filter_number, ports, *words = arguments[:-1]
    control = _socket.socket(fileno=int(control_number))
    os.set_inheritable(control.fileno(), False)
    inherited_limits = __import__("inherited_limits")  # from this directory; the program is not part of the package
    try:
        set_parent_death_signal(int(parent))
        os.umask(0o022)
        as_root = kernel_uid != "-"
        if as_root != (os.getuid() == 0) or kernel_uid == "0":
            raise ValueError("a sandbox that root starts must have a separate kernel uid")
        unshare_namespaces(as_root)
        limit_kernel_objects()
        configure_loopback()
        sockets = open_listeners([int(port) for port in ports.split(",") if port]) + open_sock_diag()
        expose_entries(
            list(zip(words[::3], words[1::3], words[2::3], strict=True)), int(kernel_uid) if as_root else None
        )
        mount_devpts()
        create_devices()
        inherited_limits.apply_process_limits()
        # Send the sockets as root: with the sandbox's uid, files in transit from an earlier sandbox could prevent that.
        send_sockets(control, sockets)
        if files_uid != "-":
            uids = {0: int(kernel_uid), 1000: int(files_uid)}  # 1000: the agent's uid, see interfaces/runtime.py
            unshare_user_namespace(uids, int(kernel_uid))
            switch_to_uid(0)
            # gVisor's kernel can trace the programs inside without this capability. With it, a program that has taken
            # over gVisor's kernel could also trace runsc, which sees the host's files and may make most system calls.
            check_errno(_prctl(PR_CAPBSET_DROP, CAP_SYS_PTRACE, 0, 0, 0), "capbset")
        elif as_root:
            unshare_user_namespace({int(kernel_uid): int(kernel_uid)}, int(kernel_uid))
            switch_to_uid(int(kernel_uid))
        # Not earlier: the limit also applies to files in transit, and other programs of root may have many of them.
        limit = inherited_limits.limit_open_files if filter_number == "-" else inherited_limits.limit_host_program_files
        limit()
        set_parent_death_signal(int(parent))
        if filter_number != "-":
            install_seccomp_filter(os.pread(int(filter_number), 65536, 0))
            os.close(int(filter_number))
        control.send(b"ready")
        serve(control)
    except Exception as error:
        control.send(f"error {error}".encode(errors="replace")[:4096])
        sys.exit(1)
