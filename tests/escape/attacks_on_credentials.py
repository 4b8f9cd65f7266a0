"""Attacks on the server's keys and on other processes, each with its control.

The attacks on privileges are in attacks_on_privileges.py.
"""

from escape.attack import Attack
from escape.attacks_on_privileges import FILE_CONTROL, privilege_attacks

PRELUDE = r"""
import ctypes, fcntl, glob, os, pathlib, platform, pty, re, signal, socket, struct, subprocess, sys, threading, time

libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"
SYSCALL_NUMBERS = dict(ptrace=117, add_key=217, keyctl=219, bpf=280, perf=241, userfaultfd=282, io_uring=425,
    unshare=97, setns=268, mount=40, pivot_root=41, init_module=105, kexec=104, name_to_handle=264,
    open_by_handle=265, process_vm_readv=270, process_vm_writev=271, pidfd_open=434, pidfd_getfd=438, sethostname=161) if ARM else \
    dict(ptrace=101, add_key=248, keyctl=250, bpf=321, perf=298, userfaultfd=323, io_uring=425, unshare=272, setns=308,
    mount=165, pivot_root=155, init_module=175, kexec=246, name_to_handle=303, open_by_handle=304, process_vm_readv=310,
    process_vm_writev=311, pidfd_open=434, pidfd_getfd=438, sethostname=170)

def call(name, *arguments, errnos_after_check=()):
    # An errno in `errnos_after_check` occurs only after the permission check, so the call was allowed.
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = libc.syscall(ctypes.c_long(SYSCALL_NUMBERS[name]), *words)
    if result < 0 and ctypes.get_errno() not in errnos_after_check: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def run(*argv):
    return subprocess.run(argv, capture_output=True, text=True, timeout=100)

def report_found(found, searched):
    # If nothing could be searched, finding nothing proves nothing.
    if found: succeeded()
    elif searched: refused("absent")

def search(needle, paths):
    found = searched = 0
    for path in paths:
        try: found += needle in pathlib.Path(path).read_bytes()
        except OSError: continue
        searched += 1
    report_found(found, searched)

# Installed packages are not searched: they are large, and the server does not write to them.
PACKAGED = {"/opt/node", "/opt/npm", "/run/sandbox/bin/claude"}

def files(places=("/etc", "/home", "/run", "/tmp", "/var", "/workspace", "/opt", "/dev/shm")):
    for place in places:
        for directory, inner, names in os.walk(place):
            inner[:] = [name for name in inner if os.path.join(directory, name) not in PACKAGED]
            for name in names:
                path = os.path.join(directory, name)
                if path not in PACKAGED and os.path.isfile(path): yield path

def search_memory(needle):
    found = searched = 0
    for maps in glob.glob("/proc/[0-9]*/maps"):
        process = os.path.dirname(maps)
        try:
            # The attacks themselves have the needle in memory, so their processes are skipped.
            if re.search(b"sandbox_attack_runner|reversed", pathlib.Path(process, "cmdline").read_bytes()): continue
            with open(maps) as lines, open(f"{process}/mem", "rb", 0) as memory:
                for line in lines:
                    begin, end = (int(n, 16) for n in line.split()[0].split("-"))
                    if "r" not in line.split()[1] or end - begin > 64 << 20: continue
                    try:
                        memory.seek(begin)
                        found += needle in memory.read(end - begin)
                        searched += 1
                    except (OSError, ValueError, OverflowError): pass
        except OSError: pass
    report_found(found, searched)

def child(**environment):
    # A running program, recognizable by its argument.
    started = subprocess.Popen(["sleep", "27"], env=environment)
    while b"sleep" not in pathlib.Path(f"/proc/{started.pid}/cmdline").read_bytes(): pass
    return started

def other_processes():
    # All visible processes except this one and its children.
    own = os.getpid()
    return [path for path in glob.glob("/proc/[0-9]*") if int(os.path.basename(path)) < own]
"""

SIGNAL_CONTROL = """
started = subprocess.Popen(["sleep", "20"])
started.terminate()
if started.wait(10) == -15: succeeded()"""
PROCESS_ACCESS_ERRORS = ("EPERM", "EACCES", "ENOSYS", "ENOENT", "ESRCH")
"""The errors for an inaccessible or invisible process. A process with the attacked pid exists on the host."""


def credential_attacks():
    """Yield all attacks on credentials and privileges."""
    yield from _keys()
    yield from _files()
    yield from _other_processes()
    yield from privilege_attacks()


def _keys():
    absent = {"denial_words": ("absent",)}
    yield Attack("the server's key in process environments", "search(NEEDLE, glob.glob('/proc/[0-9]*/environ'))", "child(CONTROL='control-value'); search(b'control-value', glob.glob('/proc/[0-9]*/environ'))", **absent)  # fmt: skip
    yield Attack("the server's key in process arguments", "search(NEEDLE, glob.glob('/proc/[0-9]*/cmdline'))", "child(); search(b'sleep\\x0027', glob.glob('/proc/[0-9]*/cmdline'))", **absent)  # fmt: skip
    yield Attack("the server's key in files", "search(NEEDLE, files())", "pathlib.Path('/dev/shm/needle').write_bytes(b'tw' + b'in-needle'); search(b'tw' + b'in-needle', files())", **absent)  # fmt: skip
    yield Attack("the server's key in process memory", "child(); search_memory(NEEDLE)", "child(CONTROL='control-value'); search_memory(b'control-value')", **absent)  # fmt: skip
    yield Attack(
        "a credential helper or SSH agent of the host",
        """
if not {"SSH_AUTH_SOCK", "GIT_ASKPASS"} & os.environ.keys() and not run("git", "config", "--get", "credential.helper").stdout:
    refused("absent")
else: succeeded()""",
        "if run('git', 'config', '--get', 'user.name').stdout: succeeded()",
        denial_words=("absent",),
        host_paths=("CREDENTIALS",),
    )


def _files():
    for name, path, control in (
        ("the host's /etc/shadow", "/etc/shadow", "/etc/passwd"),
        ("root's home directory", "/root", "/home/agent"),
        ("the server's data directory", "DATA_DIR", "/workspace"),
        ("another file of the host", "CANARY", "/etc/passwd"),
    ):
        source = path if path.isupper() else repr(path)
        yield Attack(
            name,
            f"path = {source}\n(os.listdir if os.path.isdir(path) else open)(path); succeeded()",
            f"path = {control!r}\n(os.listdir if os.path.isdir(path) else open)(path); succeeded()",
            denial_words=("ENOENT", "EACCES", "EPERM"),
            host_paths=(path,),
        )
    yield Attack("writing to the image", "pathlib.Path('/usr/bin', MARKER).write_text('x'); succeeded()", FILE_CONTROL, ("EROFS", "EACCES"), unchanged_observers=("files",))  # fmt: skip
    yield Attack("writing to /etc", "pathlib.Path('/etc', MARKER).write_text('x'); succeeded()", FILE_CONTROL, ("EROFS", "EACCES"), unchanged_observers=("files",))  # fmt: skip


UNIX_SOCKET_CONTROL = """
server = socket.socket(socket.AF_UNIX); server.bind("/tmp/control.sock"); server.listen()
socket.socket(socket.AF_UNIX).connect("/tmp/control.sock"); succeeded()"""


def _other_processes():
    yield Attack("a signal to a host process", "os.kill(SERVER_PID, 15); succeeded()", SIGNAL_CONTROL, ("ESRCH",), unchanged_observers=("processes",))  # fmt: skip
    yield Attack("a socket of a runner or container engine", """
def connect(path): socket.socket(socket.AF_UNIX).connect(path)
found = [os.path.join(top, name) for top, _, names in os.walk("/run") for name in names if name.endswith((".sock", "_socket", ".socket"))]
usual = ("/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/podman/podman.sock", "/run/dbus/system_bus_socket")
try_calls(*[lambda path=path: connect(path) for path in (*usual, *found)])""", UNIX_SOCKET_CONTROL, ("ENOENT", "EACCES", "ECONNREFUSED"), host_paths=("/run/sandbox",))  # fmt: skip
    yield Attack("ptrace of the init process", "call('ptrace', 16, 1, 0, 0); succeeded()", SIGNAL_CONTROL)
    yield Attack(
        "the memory of the init process",
        """
# An invalid address is only detected after the permission check.
space = ctypes.create_string_buffer(8)
local = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(space), 8))
remote = ctypes.create_string_buffer(struct.pack("=QQ", 4096, 8))
try_calls(lambda: open("/proc/1/mem", "r+b", 0), *[
    lambda name=name: call(name, 1, local, 1, remote, 1, 0, errnos_after_check=(14,)) for name in ("process_vm_readv", "process_vm_writev")])""",
        "open('/proc/self/mem', 'rb', 0); succeeded()",
        PROCESS_ACCESS_ERRORS,
        host_paths=("/proc/1",),
    )
    for name, path in (
        ("the file descriptors", "fd"),
        ("the root directory", "root/"),
        ("the working directory", "cwd/"),
    ):
        yield Attack(
            f"{name} of the init process",
            f"os.listdir('/proc/1/{path}'); succeeded()",
            f"os.listdir('/proc/self/{path}'); succeeded()",
            PROCESS_ACCESS_ERRORS,
            allowed_inside=("gvisor",) if path == "fd" else (),
            unchanged_observers=("processes",),
            host_paths=("/proc/1",),
        )
    yield Attack("the output of the init process", "try_calls(*[lambda number=number: os.open(f'/proc/1/fd/{number}', os.O_WRONLY | os.O_NONBLOCK) for number in (1, 2)])", "os.close(os.open('/proc/self/fd/1', os.O_WRONLY)); succeeded()", (*PROCESS_ACCESS_ERRORS, "ENXIO"), host_paths=("/proc/1",))  # fmt: skip
    yield Attack("a file descriptor of another process", """
def take(path):
    process = call("pidfd_open", int(os.path.basename(path)), 0)
    call("pidfd_getfd", process, 1, 0)
try_calls(*[lambda path=path: take(path) for path in other_processes()])""", "os.dup(1); succeeded()", PROCESS_ACCESS_ERRORS, host_paths=("/proc/1",))  # fmt: skip
