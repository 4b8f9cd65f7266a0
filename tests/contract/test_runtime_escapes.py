"""Escape attempts that must fail, each paired with a legitimate use that must work."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import has_own_kernel, read_until, ready_sandbox, run_in, run_python, run_shell
from doubles.sandbox_scripts import CONNECT_OUTPUT, CONNECT_SCRIPT, accept_connection, respond_to_query
from sandbox.interfaces.runtime import Command, Runtime
from sandbox.model.failure import AttemptError

# Files


def test_host_files_are_not_visible(runtime: Runtime, disk: Path, tmp_path: Path):
    canary = tmp_path / "canary"
    canary.write_text("of the host")
    canary.chmod(0o644)
    (disk / "workspace").mkdir()
    (disk / "workspace" / "control").write_text("of the task")
    result = run_shell(runtime, disk, f"cat {canary}; ls -d /root /boot /mnt /etc/shadow {tmp_path}; cat control")
    assert result.output == "of the task"
    assert result.errors.count("No such file or directory") == 6


def test_host_devices_are_not_listed(runtime: Runtime, disk: Path):
    result = run_shell(runtime, disk, "cd /sys && find . -path './block/*' -o -path './bus/*/devices/*'")
    host_devices = {path.name for path in Path("/sys").glob("bus/*/devices/*")} | {
        path.name for path in Path("/sys/block").iterdir()
    }
    visible_devices = {Path(line).name for line in result.output.splitlines()}
    assert "No such file or directory" in result.errors or has_own_kernel(runtime)
    assert not visible_devices & host_devices


def test_symlink_to_a_host_file_is_dangling_and_its_target_is_unchanged(runtime: Runtime, disk: Path, tmp_path: Path):
    if os.getuid() != 0:
        pytest.skip("only root can change the owner of a file")
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("of the host")
    for path in (canary, canary / "file"):
        os.chown(path, 12345, 12345)
    script = f"ln -s {canary} directory; ln -s {canary}/file file; touch control; cat directory/file file"
    assert run_shell(runtime, disk, script).output == ""
    assert {path.stat().st_uid for path in (canary, canary / "file")} == {12345}
    workspace = disk / "workspace"
    assert {path.lstat().st_uid for path in workspace.iterdir()} == {os.getuid()}


def test_hard_links_work_within_the_workspace_only(runtime: Runtime, disk: Path):
    result = run_shell(runtime, disk, "ln /usr/bin/true stolen; ln /etc/passwd stolen; touch a; ln a b && echo linked")
    assert result.output == "linked\n"
    assert "Invalid cross-device link" in result.errors


def test_hard_linked_host_file_is_not_chowned(runtime: Runtime, disk: Path, tmp_path: Path):
    if os.getuid() != 0:
        pytest.skip("only root can change the owner of a file")
    (disk / "workspace").mkdir()
    canary = tmp_path / "canary"
    canary.write_text("of the host")
    (disk / "workspace" / "link").hardlink_to(canary)
    with pytest.raises(AttemptError, match="hard link"):
        run_shell(runtime, disk, "true")
    assert canary.stat().st_uid == os.getuid()


def test_owner_of_a_very_deep_tree_is_restored(runtime: Runtime, disk: Path):
    source = "import os\nfor _ in range(1500):\n os.mkdir('deeper'); os.chdir('deeper')\nopen('file', 'w').close()"
    try:
        assert run_python(runtime, disk, source).code == 0
        directory = os.open(disk / "workspace", os.O_RDONLY)
        for _ in range(1500):
            child = os.open("deeper", os.O_RDONLY, dir_fd=directory)
            os.close(directory)
            directory = child
        assert os.stat("file", dir_fd=directory).st_uid == os.fstat(directory).st_uid == os.getuid()
        os.close(directory)
    finally:
        # Do not use shutil.rmtree: it is recursive, like pytest's cleanup, and would fail at this depth.
        subprocess.run(["/usr/bin/rm", "-rf", str(disk)], check=True, timeout=30)


def test_image_is_read_only_and_work_directories_are_writable(runtime: Runtime, disk: Path):
    script = """for place in / /usr /usr/bin /etc /run /var /proc/sys/kernel; do touch $place/file && echo $place; done
        for place in /workspace /home/agent /tmp /var/tmp /dev/shm; do touch $place/file || echo not $place; done"""
    result = run_shell(runtime, disk, script)
    assert result.output == ""
    assert result.errors.count("touch:") == 7


def test_sysctls_are_read_only(runtime: Runtime, disk: Path):
    source = """
import os
for name in ("kernel/core_pattern", "kernel/modprobe", "vm/overcommit_memory", "net/ipv4/ip_forward"):
    try:
        os.open(f"/proc/sys/{name}", os.O_WRONLY)
        print("opened", name)
    except OSError:
        pass
print(open("/proc/sys/vm/overcommit_memory").read().strip().isdigit())
"""
    assert run_python(runtime, disk, source).output == "True\n"


def test_only_harmless_devices_exist(runtime: Runtime, disk: Path):
    script = "ls /dev; mknod /tmp/disk b 254 0 && echo made; echo gone > /dev/null; head -c 4 /dev/zero | wc -c"
    result = run_shell(runtime, disk, script)
    *devices, count = result.output.split()
    harmless = {"core", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty"}
    # FUSE in the sandbox's kernel is harmless to the host.
    assert set(devices) <= harmless | {"urandom", "zero"} | ({"fuse"} if has_own_kernel(runtime) else set())
    assert (count, "mknod" in result.errors) == ("4", True)


# Processes


def test_only_sandbox_processes_are_visible(runtime: Runtime, disk: Path):
    script = "sleep 30 & for p in /proc/[0-9]*; do echo ${p#/proc/} $(tr '\\0' ' ' < $p/cmdline); done; kill $!"
    result = run_shell(runtime, disk, script)
    lines = result.output.splitlines()
    assert any("sleep 30" in line for line in lines)
    assert all(int(line.split()[0]) < 50 for line in lines)
    assert not any(f"sandbox:{name}" in result.output for name in ("", "python"))


async def test_host_environment_is_not_visible_in_proc(runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SERVER_SECRET", "server-secret-value")
    async with ready_sandbox(runtime, disk) as sandbox:
        result = await run_in(
            sandbox,
            ["/bin/bash", "-c", "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'"],
            {"TASK_VALUE": "task-value", "PATH": "/usr/bin"},
        )
        assert "server-secret-value" not in result.output
        assert str(disk) not in result.output
        assert "TASK_VALUE=task-value" in result.output


async def test_environment_is_not_in_host_command_lines(runtime: Runtime, disk: Path):
    async with ready_sandbox(runtime, disk) as sandbox:
        environment = {"TASK_VALUE": "a-value-that-is-secret", "PATH": "/usr/bin"}
        script = "echo up $TASK_VALUE; sleep 30"
        output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], environment, "/workspace"))
        assert b"a-value-that-is-secret" in await read_until(output, b"\n")
        command_lines = b""
        for listing in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                command_lines += listing.read_bytes()
        assert sandbox.handle.attempt_id.encode() in command_lines
        assert b"a-value-that-is-secret" not in command_lines


def test_init_process_cannot_be_inspected(runtime: Runtime, disk: Path):
    script = """for name in mem environ fd/1 cmdline; do : < /proc/1/$name; done
        tr '\\0\\n' '  ' < /proc/$$/cmdline; echo; echo $$"""
    result = run_shell(runtime, disk, script)
    *_, shell_pid = result.output.splitlines()
    # If the command is process 1 itself, there is no separate init process to inspect.
    assert shell_pid == "1" or result.errors.count("No such file or directory") == 4
    assert result.output.startswith("/bin/bash -c")


def test_command_output_can_be_inherited_but_not_reopened(runtime: Runtime, disk: Path):
    script = """(exec > file; for n in 1 2; do echo forged > /proc/$$/fd/$n; done)
        bash -c 'echo inherited'; cat file"""
    result = run_shell(runtime, disk, script)
    assert result.output == "inherited\n"
    assert result.errors.count("No such device or address") == 2


_INSPECT_PROCESSES = """for name in environ mem fd/0 exe; do head -c 0 /proc/$$/$name && echo $name; done
    head -c 0 $0 && echo itself; :"""


def test_memory_of_an_unreadable_program_is_protected(runtime: Runtime, disk: Path, tmp_path: Path):
    unreadable = Path(shutil.copy("/usr/bin/bash", tmp_path / "hidden"))
    unreadable.chmod(0o111)

    async def scenario(program: str) -> str:
        async with ready_sandbox(runtime, disk, programs={unreadable: "/opt/agent/hidden"}) as sandbox:
            return (await run_in(sandbox, [program, "-c", _INSPECT_PROCESSES, program])).output

    readable = asyncio.run(scenario("/opt/agent/hidden")).split()
    # gVisor runs only readable programs, and its probe reports this limitation. The memory is still protected.
    assert "mem" not in readable if runtime.name == "gvisor" else not readable
    assert {"environ", "fd/0", "itself"} <= set(asyncio.run(scenario("/usr/bin/bash")).split())


# System calls


def _try_calls(calls: str) -> str:
    """Return a program that prints `works` or the name of the error for each call."""
    return f"""
import ctypes, errno, os, socket, fcntl, signal
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")
def attempt(name, action):
    try:
        action()
        print(name, "works")
    except OSError as error:
        print(name, errno.errorcode[error.errno])
X86 = os.uname().machine == "x86_64"
{calls}
"""


def _parse_results(output: str) -> dict[str, str]:
    return dict(line.split() for line in output.splitlines())


def test_privileged_calls_are_denied(runtime: Runtime, disk: Path):
    source = _try_calls("""
attempt("own_uid", lambda: os.setuid(1000))
attempt("own_directory", lambda: os.chdir("/workspace"))
pid = os.fork()
if pid == 0:
    os._exit(0)
attempt("fork_and_wait", lambda: os.waitpid(pid, 0))
attempt("mount", lambda: call(165 if X86 else 40, b"none", b"/tmp", b"tmpfs", 0, 0))
attempt("unshare_user", lambda: call(272 if X86 else 97, 0x10000000))
attempt("unshare_net", lambda: call(272 if X86 else 97, 0x40000000))
attempt("clone_user", lambda: call(56 if X86 else 220, 0x10000000 | 17, 0, 0, 0, 0))
attempt("chroot", lambda: os.chroot("/tmp"))
attempt("ptrace", lambda: call(101 if X86 else 117, 0, 0, 0, 0))
attempt("keyctl", lambda: call(250 if X86 else 219, 0, -3, 0))
attempt("bpf", lambda: call(321 if X86 else 280, 0, 0, 0))
attempt("perf", lambda: call(298 if X86 else 241, 0, 0, -1, -1, 0))
attempt("open_by_handle", lambda: call(304 if X86 else 265, -1, 0, 0))
attempt("pidfd_getfd", lambda: call(438, 0, 0, 0))
attempt("io_uring", lambda: call(425, 1, 0))
attempt("clone3", lambda: call(435, 0, 0))
attempt("settime", lambda: call(227 if X86 else 112, 0, 0))
attempt("setuid", lambda: os.setuid(0))
attempt("setgroups", lambda: os.setgroups([0]))
""")
    results = _parse_results(run_python(runtime, disk, source).output)
    permitted = {name: results.pop(name) for name in ("own_uid", "own_directory", "fork_and_wait")}
    assert set(permitted.values()) == {"works"}
    if has_own_kernel(runtime):
        # These calls affect only the sandbox's kernel; see test_root_in_a_user_namespace_cannot_change_the_host.
        own_kernel_calls = {"unshare_user", "unshare_net", "clone_user", "chroot", "ptrace", "keyctl"}
        assert "works" not in {outcome for name, outcome in results.items() if name not in own_kernel_calls}, results
        return
    assert (results.pop("io_uring"), results.pop("clone3"), results.pop("setuid")) == ("ENOSYS", "ENOSYS", "EINVAL")
    assert set(results.values()) == {"EPERM"}, results


_CHANGE_HOST_AS_NAMESPACE_ROOT = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
print("unshare", libc.unshare(0x10000000 | 0x00020000 | 0x04000000))
for name, text in (("setgroups", "deny"), ("uid_map", "0 1000 1"), ("gid_map", "0 1000 1")):
    try:
        open(f"/proc/self/{name}", "w").write(text)
    except OSError:
        pass
actions = {
    "name": lambda: socket.sethostname("stolen"),
    "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    "setting": lambda: open("/proc/sys/kernel/core_pattern", "w").write("|/stolen"),
    "time": lambda: os.utime("/usr/bin/true"),
    "file": lambda: open("/usr/bin/stolen", "w"),
    "owner": lambda: os.chown("/workspace/own", 0, 0),
    "control": lambda: os.mkdir("/workspace/own"),
}
for name in ("control", *actions):
    try:
        actions[name]()
    except OSError:
        pass
"""


def test_root_in_a_user_namespace_cannot_change_the_host(runtime: Runtime, disk: Path):
    def host_state() -> tuple[object, ...]:
        pattern = Path("/proc/sys/kernel/core_pattern").read_text()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return os.uname().nodename, pattern, len(mounts), Path("/usr/bin/true").stat().st_mtime

    before = host_state()
    run_python(runtime, disk, _CHANGE_HOST_AS_NAMESPACE_ROOT)
    assert host_state() == before
    assert not Path("/usr/bin/stolen").exists()
    assert (disk / "workspace" / "own").stat().st_uid == os.getuid()


def test_dangerous_socket_families_are_denied(runtime: Runtime, disk: Path):
    source = _try_calls("""
attempt("packet", lambda: socket.socket(17, 3, 0))
attempt("vsock", lambda: socket.socket(40, 1, 0))
attempt("alg", lambda: socket.socket(38, 5, 0))
attempt("bluetooth", lambda: socket.socket(31, 3, 0))
attempt("netfilter", lambda: socket.socket(16, 3, 12))
attempt("raw", lambda: socket.socket(2, 3, 1))
for name, family, kind in (("unix", 1, 1), ("inet", 2, 1), ("inet6", 10, 2), ("route", 16, 3)):
    attempt(name, lambda: socket.socket(family, kind, 0).close())
""")
    results = _parse_results(run_python(runtime, disk, source).output)
    assert {name for name, outcome in results.items() if outcome == "works"} == {"unix", "inet", "inet6", "route"}
    if not has_own_kernel(runtime):
        assert {results[name] for name in ("packet", "vsock", "alg", "bluetooth")} == {"EAFNOSUPPORT"}
        assert (results["netfilter"], results["raw"]) == ("EPROTONOSUPPORT", "EPERM")


def test_crash_does_not_start_the_core_dump_program_of_the_host(runtime: Runtime, disk: Path):
    # If core_pattern names a program, the kernel runs it as root unless the limit is exactly one byte.
    source = """
import os, resource
core = resource.RLIMIT_CORE
resource.setrlimit(core, (0, 0))
try:
    resource.prlimit(os.getpid(), core, (0, 0))
except PermissionError:
    pass
os.system("ulimit -c 0")
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
print(resource.getrlimit(core), resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    result = run_python(runtime, disk, source)
    assert result.code == 0, result.errors
    core_limits = "(0, 0)" if has_own_kernel(runtime) else "(1, 1)"
    assert result.output == f"{core_limits} (100, 200)\n"


def test_terminal_input_injection_is_denied(runtime: Runtime, disk: Path):
    source = _try_calls("""
master, slave = os.openpty()
attempt("sti", lambda: fcntl.ioctl(slave, 0x5412, b"x"))
attempt("linux", lambda: fcntl.ioctl(slave, 0x541C, b"x"))
attempt("size", lambda: fcntl.ioctl(slave, 0x5413, bytes(8)))
""")
    refusal = "ENOTTY" if runtime.name == "gvisor" else "EPERM"
    assert _parse_results(run_python(runtime, disk, source).output) == {
        "sti": refusal,
        "linux": refusal,
        "size": "works",
    }


def test_process_has_no_privileges(runtime: Runtime, disk: Path):
    result = run_shell(runtime, disk, "grep -E '^(Cap|NoNewPrivs|Seccomp:|Groups)' /proc/self/status")
    results = dict(line.split(":") for line in result.output.splitlines())
    assert {int(value, 16) for name, value in results.items() if name.startswith("Cap")} == {0}
    if not has_own_kernel(runtime):
        assert (results["NoNewPrivs"].strip(), results["Seccomp"].strip()) == ("1", "2")


# Network


async def test_loopback_reaches_the_gateway_but_not_the_host(runtime: Runtime, disk: Path):
    with socket.create_server(("127.0.0.1", 0)) as host_listener:
        async with ready_sandbox(runtime, disk) as sandbox:
            port = host_listener.getsockname()[1]
            script = f"(: < /dev/tcp/127.0.0.1/{port}) || echo refused; (: < /dev/tcp/127.0.0.1/8123) && echo reached"
            result = await run_in(sandbox, ["/bin/bash", "-c", script])
            assert result.output == "refused\nreached\n"
            sandbox.listeners.model.accept()[0].close()
        host_listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            host_listener.accept()


def test_abstract_sockets_of_the_host_are_unreachable(runtime: Runtime, disk: Path):
    name = f"canary-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as host_listener:
        host_listener.bind(f"\0{name}")
        host_listener.listen()
        source = _try_calls(f"""
own = socket.socket(socket.AF_UNIX)
own.bind("\\0own"); own.listen()
attempt("host", lambda: socket.socket(socket.AF_UNIX).connect("\\0{name}"))
attempt("own", lambda: socket.socket(socket.AF_UNIX).connect("\\0own"))
""")
        assert _parse_results(run_python(runtime, disk, source).output) == {"host": "ECONNREFUSED", "own": "works"}


async def test_network_routes_lead_to_the_gateway_only(runtime: Runtime, disk: Path):
    async with ready_sandbox(runtime, disk) as sandbox:
        dns_answer = asyncio.create_task(respond_to_query(sandbox.listeners.dns_udp))
        result = await run_in(sandbox, ["/usr/bin/python3", "-c", CONNECT_SCRIPT])
        await dns_answer
        assert result.output.split() == CONNECT_OUTPUT, result
        accept_connection(sandbox.listeners.transparent[443])


_CONNECT_BY_PORT = """
import errno, socket
for port in (22, 5432, 443, 23):
    try:
        socket.create_connection(("198.18.3.4", port), timeout=5).close()
        print("open")
    except OSError as error:
        print(errno.errorcode.get(error.errno, type(error).__name__))
"""


async def test_only_requested_transparent_ports_are_open(runtime: Runtime, disk: Path):
    async with ready_sandbox(runtime, disk, transparent_ports=(443, 80, 22, 5432)) as sandbox:
        result = await run_in(sandbox, ["/usr/bin/python3", "-c", _CONNECT_BY_PORT])
        assert result.output.split()[:3] == ["open"] * 3, result
        assert result.output.split()[3] != "open", result
        for port in (22, 5432, 443):
            connection, _ = sandbox.listeners.transparent[port].accept()
            assert connection.getsockname() == ("198.18.3.4", port)
            connection.close()
