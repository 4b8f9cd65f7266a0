"""Ways to the server's keys, to other processes and to more rights, each beside its twin."""

from escape.attack import Attack

PRELUDE = r"""
import ctypes, glob, os, pathlib, socket, subprocess, sys

libc = ctypes.CDLL(None, use_errno=True)

def through(): print("THROUGH")

def holds(path, needle):
    try:
        return needle in pathlib.Path(path).read_bytes()
    except OSError:
        return False

def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def run(*argv):
    return subprocess.run(argv, capture_output=True, text=True, timeout=10)

# What packages bring is the same on every machine, large, and nothing that a server writes to.
BROUGHT = {"/opt/node", "/opt/npm", "/run/sandbox/bin/claude"}

def search(needle, places=("/etc", "/home", "/run", "/tmp", "/var", "/workspace", "/opt", "/dev/shm")):
    for place in places:
        for directory, inner, names in os.walk(place):
            inner[:] = [name for name in inner if os.path.join(directory, name) not in BROUGHT]
            for name in names:
                path = os.path.join(directory, name)
                if path not in BROUGHT and os.path.isfile(path) and holds(path, needle): return path
"""

OWN_ENVIRONMENT = """
child = subprocess.Popen(["sleep", "20"], env={"TWIN": "twin-value"})
while b"sleep" not in pathlib.Path(f"/proc/{child.pid}/cmdline").read_bytes(): pass
if holds(f"/proc/{child.pid}/environ", b"twin-value"): through()
child.kill()"""
OWN_SIGNAL = """
child = subprocess.Popen(["sleep", "20"])
child.terminate()
if child.wait(10) == -15: through()"""
OWN_FILE = "pathlib.Path('/tmp/twin').write_text('x'); through()"
OWN_THREAD = "import threading; t = threading.Thread(target=through); t.start(); t.join()"
READ_ETC = "if 'agent' in pathlib.Path('/etc/passwd').read_text(): through()"
# On x86-64 and aarch64 the numbers differ.
NUMBERS = """
import platform
arm = platform.machine() == "aarch64"
N = dict(ptrace=117, add_key=217, keyctl=219, bpf=280, perf=241, userfaultfd=282, io_uring=425, unshare=97, setns=268,
    mount=40, pivot_root=41, init_module=105, kexec=104, open_by_handle=265, process_vm_readv=270, pidfd_getfd=438) if arm else \\
    dict(ptrace=101, add_key=248, keyctl=250, bpf=321, perf=298, userfaultfd=323, io_uring=425, unshare=272, setns=308,
    mount=165, pivot_root=155, init_module=175, kexec=246, open_by_handle=304, process_vm_readv=310, pidfd_getfd=438)
"""


def credential_attacks():
    """All of them."""
    yield from _keys()
    yield from _other_processes()
    yield from _more_rights()


def _keys():
    yield Attack("the server's key in any environment", "if any(holds(p, NEEDLE) for p in glob.glob('/proc/[0-9]*/environ')): through()", OWN_ENVIRONMENT)  # fmt: skip
    yield Attack("the server's key in any argument list", "if any(holds(p, NEEDLE) for p in glob.glob('/proc/[0-9]*/cmdline')): through()", OWN_ENVIRONMENT)  # fmt: skip
    yield Attack("the server's key in any file", "if search(NEEDLE): through()", "pathlib.Path('/dev/shm/needle').write_bytes(b'tw' + b'in-needle')\nif search(b'tw' + b'in-needle') == '/dev/shm/needle': through()")  # fmt: skip
    yield Attack("the server's key in any memory", """
import re
for maps in glob.glob("/proc/[0-9]*/maps"):
    pid = maps.split("/")[2]
    # The battery's own processes know what they look for.
    if holds(f"/proc/{pid}/cmdline", b"battery") or holds(f"/proc/{pid}/cmdline", b"reversed("): continue
    try:
        with open(maps) as lines, open(f"/proc/{pid}/mem", "rb", 0) as memory:
            for line in lines:
                begin, end = (int(n, 16) for n in line.split()[0].split("-"))
                if "r" not in line.split()[1] or end - begin > 64 << 20: continue
                try:
                    memory.seek(begin)
                    if NEEDLE in memory.read(end - begin): through()
                except (OSError, ValueError, OverflowError): pass
    except OSError: pass""", OWN_ENVIRONMENT)  # fmt: skip
    yield Attack("the host's shadow file", "if 'root:' in pathlib.Path('/etc/shadow').read_text(): through()", READ_ETC)
    yield Attack(
        "root's home",
        "os.listdir('/root/.ssh'); through()",
        "os.listdir(os.environ.get('HOME', '/home/agent')); through()",
    )
    yield Attack("the server's data", "os.listdir(DATA_DIR); through()", "os.listdir('/workspace'); through()")
    yield Attack("a file of the host beside it", "pathlib.Path(CANARY).read_text(); through()", READ_ETC)
    yield Attack("a credential helper or agent of the host", "if os.environ.get('SSH_AUTH_SOCK') or run('git', 'config', '--get', 'credential.helper').stdout: through()", "if run('git', 'config', '--get', 'user.name').stdout: through()")  # fmt: skip
    yield Attack("a container engine's socket", "line = socket.socket(socket.AF_UNIX); line.connect('/var/run/docker.sock'); through()", OWN_FILE)  # fmt: skip


def _other_processes():
    yield Attack("a signal to a process of the host", "os.kill(SERVER_PID, 0); through()", OWN_SIGNAL)
    yield Attack(
        "ptrace of the first process inside", NUMBERS + "call(N['ptrace'], 16, 1, 0, 0); through()", OWN_SIGNAL
    )
    yield Attack("the memory of the first process inside", "open('/proc/1/mem', 'r+b', 0); through()", "open('/proc/self/mem', 'rb', 0); through()")  # fmt: skip
    yield Attack("the descriptors of the first process inside", "if os.listdir('/proc/1/fd'): through() if not OWN_KERNEL else print('the agent itself')", "if os.listdir('/proc/self/fd'): through()")  # fmt: skip
    yield Attack("the root of the first process inside", "os.listdir('/proc/1/root/'); through()", "os.listdir('/proc/self/root/'); through()")  # fmt: skip
    yield Attack("the kernel's keyring", NUMBERS + """
key = call(N["add_key"], b"user", b"sandbox-battery", b"x", 1, -4)
through() if not OWN_KERNEL else print("a keyring of the sandbox's own kernel")""", OWN_FILE)  # fmt: skip


def _more_rights():
    yield Attack("uid 0", "os.setuid(0); through()", "os.setuid(os.getuid()); through()")
    yield Attack("a setuid program", """
for name in subprocess.run(["find", "/usr/bin", "/usr/sbin", "-type", "f", "-perm", "/6000"], capture_output=True, text=True).stdout.split():
    if "/su" in name and run(name, "-c", "id -u").stdout.strip() == "0": through()
libc.prctl(39, 0, 0, 0, 0) == 1 or through()""", "if run('id', '-u').stdout.strip() == '1000': through()")  # fmt: skip
    yield Attack("a capability", "if int([l for l in open('/proc/self/status') if l.startswith('CapEff')][0].split()[1], 16): through()", OWN_THREAD)  # fmt: skip
    for name, code in (
        ("a user namespace", "call(N['unshare'], 0x10000000)"),
        ("a mount namespace", "call(N['unshare'], 0x00020000)"),
        ("another process's namespace", "call(N['setns'], os.open('/proc/1/ns/net', os.O_RDONLY), 0)"),
    ):
        yield Attack(
            name, f"{NUMBERS}{code}\nthrough() if not OWN_KERNEL else print('of a kernel of its own')", OWN_THREAD
        )
    for name, code in (
        ("a mount", "call(N['mount'], b'none', b'/tmp', b'tmpfs', 0, 0)"),
        ("another root", "call(N['pivot_root'], b'/tmp', b'/tmp')"),
        ("a kernel module", "call(N['init_module'], b'', 0, b'')"),
        ("a new kernel", "call(N['kexec'], 0, 0, 0, 0)"),
        ("a BPF program", "call(N['bpf'], 0, b'\\0' * 72, 72)"),
        ("performance counters", "call(N['perf'], b'\\0' * 120, 0, -1, -1, 0)"),
        ("userfaultfd", "call(N['userfaultfd'], 0)"),
        ("io_uring", "call(N['io_uring'], 8, b'\\0' * 120)"),
        ("a file by its handle", "call(N['open_by_handle'], -100, b'\\0' * 128, 0)"),
    ):
        yield Attack(name, f"{NUMBERS}{code}\nthrough()", OWN_THREAD)
    yield Attack("characters into a terminal (TIOCSTI)", """
import fcntl, pty
leader, follower = pty.openpty()
fcntl.ioctl(follower, 0x5412, b"x")
through()""", "import pty; pty.openpty(); through()")  # fmt: skip
    for path in (
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sysrq-trigger",
        "/sys/kernel/uevent_helper",
    ):
        yield Attack(
            f"writing {path}",
            f"os.open({path!r}, os.O_WRONLY)\nthrough() if not OWN_KERNEL else print('of its own kernel')",
            OWN_FILE,
        )
    yield Attack("a cgroup", """
for top in ("/sys/fs/cgroup", "/tmp/cg"):
    for path in glob.glob(top + "/**/cgroup.procs", recursive=True):
        with open(path, "w") as file: file.write(str(os.getpid()))
        through() if not OWN_KERNEL else None""", OWN_FILE)  # fmt: skip
    yield Attack("the host's memory or disks", """
for path in ("/dev/mem", "/dev/kmem", "/proc/kcore", *glob.glob("/dev/sd*"), *glob.glob("/dev/vd*"), *glob.glob("/dev/loop*")):
    try:
        if open(path, "rb").read(16): through()
    except OSError: pass""", "if open('/dev/urandom', 'rb').read(16): through()")  # fmt: skip
    yield Attack("the kernel's log", "os.open('/dev/kmsg', os.O_RDONLY); through()", OWN_FILE)
    yield Attack("writing to the image", "pathlib.Path('/usr/bin/evil').write_text('x'); through()", OWN_FILE)
    yield Attack("writing to /etc", "pathlib.Path('/etc/ld.so.preload').write_text('x'); through()", OWN_FILE)
