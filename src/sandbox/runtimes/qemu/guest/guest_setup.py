"""Prepares the guest before a command may run: mounts, network, control group.

The guest's root contains the host's tools and is mounted over virtiofs. COMMAND_ROOT in it is the command's root.
"""

import _socket
import ctypes
import fcntl
import os
import resource
import struct
from _collections_abc import Sequence

COMMAND_ROOT = "/inside"
COMMAND_CGROUP = "/sys/fs/cgroup/command"
_MODULES, _PROGRAMS, _EXECUTE_ONLY_OVERLAY = "/modules", "/programs", "/run/hidden"
_DISK = "/disk"
DISK_DIRECTORIES = ("workspace", "home/agent", "tmp")
"""Directories of the disk. They have the same paths in the command's root directory."""

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 0x1000
_FINIT_MODULE, _COMPRESSED = 313, 4
_SIOCADDRT, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x890B, 0x8914, 0x8916, 0x891C
_IFF_UP, _RTF_UP, _RTF_GATEWAY = 1, 1, 2
_GUEST_ADDRESS, _HOST_ADDRESS = "10.0.2.15", "10.0.2.2"
_EXECUTE_ONLY_MODE = 0o111
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "core": "/proc/kcore",
    "ptmx": "pts/ptmx",
}

libc = ctypes.CDLL(None, use_errno=True)


def check_errno(result: int, operation: str) -> int:
    """Return the result of a C function. Raises OSError if it is -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{operation}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    """Call mount(2). Raises OSError."""
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    check_errno(libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def prepare(settings: list[str]) -> None:
    """Prepare everything that does not need the command's pid namespace. Raises OSError.

    `settings` contains, in this order:
    - Host name.
    - Limits: bytes of memory, number of processes, bytes of /dev/shm.
    - Ports of the gateway, separated by commas.
    - Number of files to cache, which this function ignores.
    - Soft and hard limit on open files per process.
    - Path of each execute-only program.
    """
    host_name, memory, processes, shm_bytes, ports, _, files_soft, files_hard, *execute_only_paths = settings
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(files_soft), int(files_hard)))
    # Later mounts under /, including submounts of the host, inherit the flags.
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV)
    mount("proc", "/proc", "proc")
    mount("sysfs", "/sys", "sysfs")
    mount("devtmpfs", "/dev", "devtmpfs")
    mount("tmpfs", "/run", "tmpfs")
    check_errno(libc.sethostname(host_name.encode(), len(host_name)), "sethostname")
    for name in sorted(os.listdir(_MODULES)):  # noqa: PTH208
        _load_module(f"{_MODULES}/{name}")
    _configure_network()
    _create_cgroup(memory, processes)
    _redirect_to_gateway(COMMAND_CGROUP, [int(port) for port in ports.split(",")], _HOST_ADDRESS)
    _create_devices(shm_bytes)
    for name in DISK_DIRECTORIES:
        mount(f"{_DISK}/{name}", f"{COMMAND_ROOT}/{name}", None, MS_BIND)
    _make_execute_only(execute_only_paths)


def mount_proc() -> None:
    """Mount the command's /proc. Called by the init of the command's pid namespace."""
    target = f"{COMMAND_ROOT}/proc"
    mount("proc", target, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount(f"{target}/sys", f"{target}/sys", None, MS_BIND)
    mount("none", f"{target}/sys", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("tmpfs", f"{target}/1", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "mode=0555")


def drop_file_caches(files_max: int) -> None:
    """Drop unused cached files if there are more than `files_max`, because the host keeps every cached file open."""
    if int(read("/proc/sys/fs/inode-nr").split()[0]) > files_max:
        write("/proc/sys/vm/drop_caches", "3")


def _load_module(path: str) -> None:
    file = os.open(path, os.O_RDONLY)
    flags = 0 if path.endswith(".ko") else _COMPRESSED
    check_errno(libc.syscall(_FINIT_MODULE, file, b"", flags), f"module {path}")
    os.close(file)


def _configure_network() -> None:
    """Bring both interfaces up. The gateway listens on the host's side of the network, at _HOST_ADDRESS."""
    interface = next(name for name in os.listdir("/sys/class/net") if name != "lo").encode()  # noqa: PTH208
    network, mask = _socket_address("198.18.0.0"), _socket_address("255.254.0.0")
    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    fcntl.ioctl(any_socket, _SIOCSIFADDR, struct.pack("16s16s8x", interface, _socket_address(_GUEST_ADDRESS)))
    fcntl.ioctl(any_socket, _SIOCSIFNETMASK, struct.pack("16s16s8x", interface, _socket_address("255.255.255.0")))
    for name in (b"lo", interface):
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", name, _IFF_UP))
    route = (0, network, _socket_address(_HOST_ADDRESS), mask, _RTF_UP | _RTF_GATEWAY, 0, 0, 0, 0, 0, 0, 0, 0)
    fcntl.ioctl(any_socket, _SIOCADDRT, struct.pack("@L16s16s16sHhLPhPLLH", *route))
    any_socket.close()


def _socket_address(text: str) -> bytes:
    return struct.pack("HH4s8x", _socket.AF_INET, 0, _socket.inet_aton(text))


def _create_cgroup(memory: str, processes: str) -> None:
    """Create the command's group, which excludes the memory of the guest's kernel and agent."""
    parent = os.path.dirname(COMMAND_CGROUP)  # noqa: PTH120
    mount("cgroup2", parent, "cgroup2")
    # Allow overcommitment. Otherwise, the kernel rejects allocations larger than the machine's memory before the limit
    # is reached and reported.
    write("/proc/sys/vm/overcommit_memory", "1")
    write(f"{parent}/cgroup.subtree_control", "+memory +pids")
    os.mkdir(COMMAND_CGROUP)  # noqa: PTH102
    write(f"{COMMAND_CGROUP}/memory.max", memory)
    write(f"{COMMAND_CGROUP}/pids.max", processes)


def write(path: str, text: str) -> None:
    """Write the data with a single system call, as kernel files require."""
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def read(path: str) -> str:
    """Read a kernel file."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 65536).decode()
    finally:
        os.close(file)


def _create_devices(shm_bytes: str) -> None:
    root = f"{COMMAND_ROOT}/dev"
    os.umask(0)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755")
    for name, (major, minor) in _DEVICES.items():
        os.mknod(f"{root}/{name}", 0o20666, os.makedev(major, minor))
    for name, target in _LINKS.items():
        os.symlink(target, f"{root}/{name}")  # noqa: PTH211
    for name in ("pts", "shm"):
        os.mkdir(f"{root}/{name}")  # noqa: PTH102
    mount("devpts", f"{root}/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=1000")
    mount("tmpfs", f"{root}/shm", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={shm_bytes}")


def _make_execute_only(paths: list[str]) -> None:
    """Make programs execute-only by mounting an overlay with the same content and a different mode over them."""
    if not paths:
        return
    for name in ("", "/upper", "/scratch", "/merged"):
        os.mkdir(_EXECUTE_ONLY_OVERLAY + name)  # noqa: PTH102
    upper, work = f"{_EXECUTE_ONLY_OVERLAY}/upper", f"{_EXECUTE_ONLY_OVERLAY}/scratch"
    layers = f"metacopy=on,lowerdir={_PROGRAMS},upperdir={upper},workdir={work}"
    mount("overlay", f"{_EXECUTE_ONLY_OVERLAY}/merged", "overlay", MS_NOSUID | MS_NODEV, layers)
    for index, path in enumerate(paths):
        os.chmod(f"{_EXECUTE_ONLY_OVERLAY}/merged/{index}", _EXECUTE_ONLY_MODE)  # noqa: PTH101
        mount(f"{_EXECUTE_ONLY_OVERLAY}/merged/{index}", COMMAND_ROOT + path, None, MS_BIND)


_BPF = 321
_PROG_LOAD, _PROG_ATTACH = 5, 8
_PROG_TYPE_CGROUP_SOCK_ADDR, _ATTACH_INET4_CONNECT = 18, 10
_LOAD_WORD, _STORE_WORD, _JUMP_UNEQUAL, _JUMP_EQUAL, _JUMP = 0x61, 0x63, 0x55, 0x15, 0x05
_SET, _EXIT = 0xB7, 0x95
_IP_OFFSET, _PORT_OFFSET = 4, 24  # in struct bpf_sock_addr, both in network order
_ATTRIBUTES_BYTES = 120


def _redirect_to_gateway(group: str, ports: Sequence[int], target: str) -> None:
    """Redirect connections by the group's processes to `target`, where the gateway listens.

    Only connections to `ports` on 127.0.0.1 are redirected. A small BPF program in the guest's kernel changes the
    address when a process connects. Raises OSError.
    """
    program = assemble_redirection(ports, target)
    instructions, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"GPL")
    addresses = ctypes.addressof(instructions), ctypes.addressof(licence)
    # Program type, instruction count, instructions, license; zeros for the log; the attach type at offset 68.
    load = struct.pack("IIQQ", _PROG_TYPE_CGROUP_SOCK_ADDR, len(program) // 8, *addresses).ljust(68, b"\0")
    loaded = _bpf(_PROG_LOAD, load + struct.pack("I", _ATTACH_INET4_CONNECT))
    directory = os.open(group, os.O_RDONLY)
    _bpf(_PROG_ATTACH, struct.pack("IIII", directory, loaded, _ATTACH_INET4_CONNECT, 0))
    os.close(directory)
    os.close(loaded)


def assemble_redirection(ports: Sequence[int], target: str) -> bytes:
    """Assemble a program that allows all connections and replaces 127.0.0.1 with `target` in connections to `ports`."""
    address, loopback = _address_number(target), _address_number("127.0.0.1")
    tests = [
        _instruction(_JUMP_EQUAL, 3, 0, len(ports) - index, _socket.htons(port)) for index, port in enumerate(ports)
    ]
    rewrite = [_instruction(_SET, 2, 0, 0, address), _instruction(_STORE_WORD, 1, 2, _IP_OFFSET, 0)]
    program = [
        _instruction(_LOAD_WORD, 2, 1, _IP_OFFSET, 0),
        _instruction(_JUMP_UNEQUAL, 2, 0, len(tests) + 2 + len(rewrite), loopback),
        _instruction(_LOAD_WORD, 3, 1, _PORT_OFFSET, 0),
        *tests,
        _instruction(_JUMP, 0, 0, len(rewrite), 0),
        *rewrite,
        _instruction(_SET, 0, 0, 0, 1),
        _instruction(_EXIT, 0, 0, 0, 0),
    ]
    return b"".join(program)


def _instruction(code: int, target: int, source: int, offset: int, value: int) -> bytes:
    return struct.pack("=BBhi", code, target | source << 4, offset, value)


def _address_number(address: str) -> int:
    return int.from_bytes(_socket.inet_aton(address), "little")


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES)
    return check_errno(libc.syscall(_BPF, command, buffer, _ATTRIBUTES_BYTES), "bpf")
