"""Attacks on privileges: other users, namespaces, mounts, kernel interfaces; each with its control.

A sandbox with its own kernel may allow some of the attacks; those are declared `allowed_inside`. The names of the
objects that the attacks create contain MARKER.
"""

from escape.attack import PERMISSION_ERRORS, Attack

THREAD_CONTROL = "t = threading.Thread(target=succeeded); t.start(); t.join()"
FILE_CONTROL = "pathlib.Path('/tmp/control').write_text('x'); succeeded()"
FORK_CONTROL = """
child = os.fork()
if child == 0: os._exit(3)
if os.waitpid(child, 0)[1] >> 8 == 3: succeeded()"""

_CLONE_NEWUSER, _CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWCGROUP = 0x10000000, 0x00020000, 0x04000000, 0x02000000
_NAMESPACE_ROOT_FUNCTIONS = f"""
def become_root(extra_flags=0):
    # The first call gives capabilities in the new namespaces, even if no ids can be mapped.
    uid, gid = os.getuid(), os.getgid()
    call("unshare", {_CLONE_NEWUSER} | extra_flags)
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {{uid}} 1"), ("gid_map", f"0 {{gid}} 1")):
        try: pathlib.Path("/proc/self", name).write_text(line)
        except OSError as error: print(name, error)

def mount(target, kind, options=""):
    os.makedirs(target, exist_ok=True)
    if libc.mount(MARKER.encode(), target.encode(), kind.encode(), ctypes.c_ulong(0), options.encode()) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""

_UNSUPPORTED_BY_GVISOR = {"core_pattern in a new procfs", "a device node"}
"""Attacks that need features that gVisor's kernel does not support or denies to every process."""


def privilege_attacks():
    """Yield all attacks on privileges."""
    yield from _users()
    yield from _namespaces()
    yield from _root_of_a_namespace()
    yield from _kernel_calls()
    yield from _kernel_files()


def _users():
    yield Attack("uid 0", "os.setuid(0); succeeded()", "os.setuid(os.getuid()); succeeded()", ("EPERM", "EINVAL"))
    yield Attack("a setuid program", """
found = run("find", "/usr/bin", "/usr/sbin", "/usr/local", "-type", "f", "-perm", "/6000").stdout.split()
ways = {"su": ("-c", "id -u"), "sudo": ("-n", "id", "-u"), "pkexec": ("id", "-u"), "mount": ("-t", "tmpfs", "none", "/mnt")}
for path in found:
    if os.path.basename(path) not in ways: continue
    done = run(path, *ways[os.path.basename(path)])
    if done.returncode == 0 and done.stdout.strip() in {"0", ""}: succeeded()
if libc.prctl(39, 0, 0, 0, 0) != 1: succeeded()
refused("no new privileges")""", "if run('id', '-u').stdout.strip() == '1000': succeeded()", ("no new privileges",))  # fmt: skip
    yield Attack("a capability", """
sets = [line.split() for line in open("/proc/self/status") if line.startswith("Cap")]
if not sets: sys.exit()
held = {name for name, value in sets if int(value, 16) and name != "CapBnd:"}
succeeded() if held else refused("absent")""", THREAD_CONTROL, ("absent",))  # fmt: skip


def _namespaces():
    yield Attack("a new user namespace", f"call('unshare', {_CLONE_NEWUSER}); succeeded()", THREAD_CONTROL, allowed_inside=("gvisor",), unchanged_observers=("namespaces",))  # fmt: skip
    yield Attack("a new mount namespace", f"call('unshare', {_CLONE_NEWNS}); succeeded()", THREAD_CONTROL, unchanged_observers=("namespaces",))  # fmt: skip
    yield Attack(
        "the namespace of another process",
        """
try_calls(*[
    lambda path=f"{path}/ns/{kind}", own=os.readlink(f"/proc/self/ns/{kind}"): call("setns", os.open(path, os.O_RDONLY), 0)
    for path in other_processes() for kind in ("net", "mnt", "user", "pid")])""",
        THREAD_CONTROL,
        (*PERMISSION_ERRORS, "ENOENT", "EINVAL"),
        unchanged_observers=("namespaces",),
        host_paths=("/proc/1",),
    )
    yield Attack("a mount", _NAMESPACE_ROOT_FUNCTIONS + "mount('/tmp', 'tmpfs'); succeeded()", THREAD_CONTROL, unchanged_observers=("mounts",))  # fmt: skip
    yield Attack("pivot_root", "call('pivot_root', b'/tmp', b'/tmp', errnos_after_check=(16, 22)); succeeded()", THREAD_CONTROL, unchanged_observers=("mounts",))  # fmt: skip
    yield Attack("chroot", "os.chroot('/tmp'); succeeded()", "os.chdir('/tmp'); succeeded()", unchanged_observers=("mounts",))  # fmt: skip
    yield Attack("sethostname", "call('sethostname', MARKER.encode(), len(MARKER)); succeeded()", "if os.uname().nodename: succeeded()", unchanged_observers=("settings",))  # fmt: skip


def _root_of_a_namespace():
    for name, code, observers in (
        ("uid 0", "become_root(); os.setuid(0)\nif os.geteuid() == 0: succeeded()", ("namespaces", "processes")),
        ("a new mount namespace", f"become_root({_CLONE_NEWNS}); succeeded()", ("namespaces", "mounts")),
        ("a mount over /etc", f"""
become_root({_CLONE_NEWNS})
mount("/etc", "tmpfs")
pathlib.Path("/etc/ld.so.preload").write_text(MARKER)
if pathlib.Path("/etc/ld.so.preload").read_text() == MARKER: succeeded()""", ("files", "mounts")),
        ("pivot_root", f"""
become_root({_CLONE_NEWNS})
mount("/tmp/new-root", "tmpfs")
os.mkdir("/tmp/new-root/old")
call("pivot_root", b"/tmp/new-root", b"/tmp/new-root/old")
os.chdir("/")
pathlib.Path("/", MARKER).write_text("x")
if set(os.listdir("/")) == {{"old", MARKER}}: succeeded()""", ("files", "mounts", "namespaces")),
        ("core_pattern in a new procfs", f"""
become_root({_CLONE_NEWNS} | 0x20000000)
child = os.fork()
if child == 0:
    try:
        mount("/tmp/proc", "proc")
        os.open("/tmp/proc/sys/kernel/core_pattern", os.O_WRONLY)
    except OSError as error: os._exit(error.errno)
    os._exit(0)
number = os.waitpid(child, 0)[1] >> 8
if number: raise OSError(number, os.strerror(number))
succeeded()""", ("mounts", "settings")),
        ("sethostname", f"""
become_root({_CLONE_NEWUTS})
call("sethostname", MARKER.encode(), len(MARKER))
if os.uname().nodename == MARKER: succeeded()""", ("settings", "namespaces")),
        ("a new control group", f"""
become_root({_CLONE_NEWNS} | {_CLONE_NEWCGROUP})
def make(kind, options):
    target = "/tmp/" + kind + options
    mount(target, kind, options)
    os.mkdir(os.path.join(target, MARKER))
try_calls(lambda: make("cgroup2", ""), *[
    lambda options=options: make("cgroup", options) for options in ("", "memory", "pids", "none,name=own")])""", ("control groups", "mounts")),
        ("a device node", """
become_root()
os.mknod("/tmp/" + MARKER, 0o20600, os.makedev(1, 1))
succeeded()""", ("files",)),
    ):  # fmt: skip
        yield Attack(
            f"{name}, as root of a user namespace",
            _NAMESPACE_ROOT_FUNCTIONS + code,
            FORK_CONTROL,
            (*PERMISSION_ERRORS, "ENODEV", "EBUSY", "ENOENT") if name in _UNSUPPORTED_BY_GVISOR else PERMISSION_ERRORS,
            allowed_inside=("gvisor",) if name not in _UNSUPPORTED_BY_GVISOR else (),
            unchanged_observers=observers,
            host_paths=("/proc/sys/kernel/core_pattern",),
        )


def _kernel_calls():
    # `errnos_after_check` lists errors such as EINVAL, EFAULT and ENOEXEC. They show that the call has passed the permission check.
    yield Attack("the kernel keyring", """
call("add_key", b"user", MARKER.encode(), b"x", 1, -4)
succeeded()""", FILE_CONTROL, unchanged_observers=("keys",))  # fmt: skip
    for name, code, extra_words in (
        ("a kernel module", "call('init_module', b'', 0, b'', errnos_after_check=(8, 14, 22))", ()),
        ("kexec", "call('kexec', 0, 0, 0, 0, errnos_after_check=(16, 22))", ()),
        ("a BPF program", """
program = ctypes.create_string_buffer(b"\\xb7\\0\\0\\0\\0\\0\\0\\0\\x95\\0\\0\\0\\0\\0\\0\\0")
license = ctypes.create_string_buffer(b"GPL")
attributes = struct.pack("=IIQQ", 1, 2, ctypes.addressof(program), ctypes.addressof(license)).ljust(128, b"\\0")
call("bpf", 5, attributes, 128, errnos_after_check=(7, 22))""", ()),
        ("a BPF map", "call('bpf', 0, struct.pack('=IIII', 2, 4, 4, 1).ljust(128, b'\\0'), 128, errnos_after_check=(7, 22))", ()),
        ("performance counters (perf_event_open)", "call('perf', struct.pack('=IIQ', 1, 128, 0).ljust(128, b'\\0'), 0, -1, -1, 0, errnos_after_check=(22, 2))", ("ENODEV",)),
        ("userfaultfd", "call('userfaultfd', 0)", ()),
        ("io_uring", "call('io_uring', 8, bytes(120))", ()),
        ("a file by handle (open_by_handle_at)", """
handle, mount_id = ctypes.create_string_buffer(struct.pack("=Ii", 120, 0) + bytes(120)), ctypes.c_int()
directory = os.open("/", os.O_RDONLY)
handle = ctypes.create_string_buffer(struct.pack("=Iiq", 8, 1, 2) + bytes(120))
call("open_by_handle", directory, handle, 0, errnos_after_check=(22, 116))""", ("ENOTSUP",)),
    ):  # fmt: skip
        yield Attack(name, f"{code}\nsucceeded()", THREAD_CONTROL, (*PERMISSION_ERRORS, *extra_words))
    yield Attack("terminal input injection (TIOCSTI)", """
with setup(): leader, follower = pty.openpty()
fcntl.ioctl(follower, 0x5412, b"x")
succeeded()""", "pty.openpty(); succeeded()", (*PERMISSION_ERRORS, "ENOTTY"))  # fmt: skip


def _kernel_files():
    for name, paths in (
        ("core_pattern", ("/proc/sys/kernel/core_pattern",)),
        ("memory settings", ("/proc/sys/vm/overcommit_memory", "/proc/sys/vm/drop_caches")),
        ("settings that start programs", ("/proc/sys/kernel/modprobe", "/sys/kernel/uevent_helper", "/proc/sys/kernel/core_pattern")),
        ("settings that halt the machine", ("/proc/sysrq-trigger", "/sys/power/state", "/proc/sys/kernel/panic", "/proc/sys/kernel/sysrq")),
        ("huge page settings", ("/sys/kernel/mm/transparent_hugepage/enabled", "/proc/sys/vm/nr_hugepages")),
    ):  # fmt: skip
        yield Attack(
            f"writing {name}",
            f"try_calls(*[lambda path=path: os.open(path, os.O_WRONLY) for path in {paths!r}])",
            FILE_CONTROL,
            ("EACCES", "EPERM", "EROFS", "ENOENT"),
            unchanged_observers=("settings",),
            host_paths=paths,
        )
    yield Attack("an existing or new control group", """
def make(path): os.mkdir(os.path.join(path, MARKER))
def enter(path): pathlib.Path(path).write_text(str(os.getpid()))
try_calls(lambda: make("/sys/fs/cgroup"), *[lambda path=path: enter(path) for path in glob.glob("/sys/fs/cgroup/**/cgroup.procs", recursive=True)])""", FILE_CONTROL, ("EACCES", "EPERM", "EROFS", "ENOENT"), unchanged_observers=("control groups",), host_paths=("/sys/fs/cgroup",))  # fmt: skip
    yield Attack("the host's memory or disk devices", """
devices = ("/dev/mem", "/dev/kmem", "/proc/kcore", *glob.glob("/dev/sd*"), *glob.glob("/dev/vd*"), *glob.glob("/dev/loop*"), *glob.glob("/dev/dm-*"))
def read(path):
    with open(path, "rb") as device: device.read(16)
try_calls(*[lambda path=path: read(path) for path in devices])""", "open('/dev/urandom', 'rb').read(16); succeeded()", ("EACCES", "EPERM", "ENOENT", "ENXIO"), host_paths=("/dev/loop0", "/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/mem", "/proc/kcore"))  # fmt: skip
    yield Attack("a device node of a host disk (mknod)", "os.mknod('/tmp/' + MARKER, 0o60600, os.makedev(7, 0)); succeeded()", "os.mkfifo('/tmp/control-fifo'); succeeded()", unchanged_observers=("files",))  # fmt: skip
    yield Attack("the kernel log", "os.open('/dev/kmsg', os.O_RDONLY); succeeded()", FILE_CONTROL, ("EACCES", "EPERM", "ENOENT"), host_paths=("/dev/kmsg",))  # fmt: skip
