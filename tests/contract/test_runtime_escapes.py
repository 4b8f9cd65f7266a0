"""Ways out of a sandbox that must be shut, each beside its legitimate twin that must work."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import has_own_kernel, living, read_until, run_in, run_python, run_story
from doubles.sandbox_queries import CONNECT, CONNECTED, answer, take_connection
from sandbox.interfaces.runtime import Command, Runtime
from sandbox.model.errors import AttemptError

# Files


def test_host_files_are_absent_and_the_workspace_is_there(runtime: Runtime, disk: Path, tmp_path: Path):
    canary = tmp_path / "canary"
    canary.write_text("of the host")
    canary.chmod(0o644)
    (disk / "workspace").mkdir()
    (disk / "workspace" / "twin").write_text("of the task")
    ended = run_story(runtime, disk, f"cat {canary}; ls -d /root /boot /mnt /etc/shadow {tmp_path}; cat twin")
    assert ended.output == "of the task"
    assert ended.errors.count("No such file or directory") == 6


def test_the_hosts_devices_are_not_told_of(runtime: Runtime, disk: Path):
    ended = run_story(runtime, disk, "cd /sys && find . -path './block/*' -o -path './bus/*/devices/*'")
    hosts = {path.name for path in Path("/sys").glob("bus/*/devices/*")} | {
        path.name for path in Path("/sys/block").iterdir()
    }
    found = {Path(line).name for line in ended.output.splitlines()}
    assert "No such file or directory" in ended.errors or has_own_kernel(runtime)
    assert not found & hosts


def test_a_link_out_of_the_workspace_leads_nowhere_inside_and_its_target_keeps_its_owner(
    runtime: Runtime, disk: Path, tmp_path: Path
):
    if os.getuid() != 0:
        pytest.skip("only root can give files to others")
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("of the host")
    for path in (canary, canary / "file"):
        os.chown(path, 12345, 12345)
    script = f"ln -s {canary} directory; ln -s {canary}/file file; touch twin; cat directory/file file"
    assert run_story(runtime, disk, script).output == ""
    assert {path.stat().st_uid for path in (canary, canary / "file")} == {12345}
    workspace = disk / "workspace"
    assert {path.lstat().st_uid for path in workspace.iterdir()} == {os.getuid()}


def test_a_hard_link_cannot_be_made_to_the_image_and_can_within_the_workspace(runtime: Runtime, disk: Path):
    ended = run_story(runtime, disk, "ln /usr/bin/true stolen; ln /etc/passwd stolen; touch a; ln a b && echo linked")
    assert ended.output == "linked\n"
    assert "Invalid cross-device link" in ended.errors


def test_a_workspace_with_a_hard_link_to_elsewhere_is_not_given_away(runtime: Runtime, disk: Path, tmp_path: Path):
    if os.getuid() != 0:
        pytest.skip("an ordinary user gives nothing away")
    (disk / "workspace").mkdir()
    canary = tmp_path / "canary"
    canary.write_text("of the host")
    (disk / "workspace" / "link").hardlink_to(canary)
    with pytest.raises(AttemptError, match="hard link"):
        run_story(runtime, disk, "true")
    assert canary.stat().st_uid == os.getuid()


def test_a_tree_deeper_than_any_path_is_given_back(runtime: Runtime, disk: Path):
    source = "import os\nfor _ in range(1500):\n os.mkdir('deeper'); os.chdir('deeper')\nopen('file', 'w').close()"
    try:
        assert run_python(runtime, disk, source).code == 0
        here = os.open(disk / "workspace", os.O_RDONLY)
        for _ in range(1500):
            there = os.open("deeper", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = there
        assert os.stat("file", dir_fd=here).st_uid == os.fstat(here).st_uid == os.getuid()
        os.close(here)
    finally:
        # shutil.rmtree recurses, and so would the test framework's own cleaning up
        subprocess.run(["/usr/bin/rm", "-rf", str(disk)], check=True, timeout=30)


def test_the_image_is_read_only_and_the_places_of_work_are_not(runtime: Runtime, disk: Path):
    script = """for place in / /usr /usr/bin /etc /run /var /proc/sys/kernel; do touch $place/file && echo $place; done
        for place in /workspace /home/agent /tmp /var/tmp /dev/shm; do touch $place/file || echo not $place; done"""
    ended = run_story(runtime, disk, script)
    assert ended.output == ""
    assert ended.errors.count("touch:") == 7


def test_kernel_settings_cannot_be_written_and_can_be_read(runtime: Runtime, disk: Path):
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


def test_only_harmless_devices_are_there(runtime: Runtime, disk: Path):
    script = "ls /dev; mknod /tmp/disk b 254 0 && echo made; echo gone > /dev/null; head -c 4 /dev/zero | wc -c"
    ended = run_story(runtime, disk, script)
    *devices, count = ended.output.split()
    harmless = {"core", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty"}
    # In a gVisor's kernel a file system by FUSE is its own affair.
    assert set(devices) <= harmless | {"urandom", "zero"} | ({"fuse"} if has_own_kernel(runtime) else set())
    assert (count, "mknod" in ended.errors) == ("4", True)


# Processes


def test_host_processes_are_not_seen_and_own_ones_are(runtime: Runtime, disk: Path):
    script = "sleep 30 & for p in /proc/[0-9]*; do echo ${p#/proc/} $(tr '\\0' ' ' < $p/cmdline); done; kill $!"
    ended = run_story(runtime, disk, script)
    words = ended.output.splitlines()
    assert any("sleep 30" in line for line in words)
    assert all(int(line.split()[0]) < 50 for line in words)
    assert not any(f"sandbox:{name}" in ended.output for name in ("", "python"))


def test_no_process_inside_tells_of_the_hosts_environment(
    runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SERVER_SECRET", "server-secret-value")

    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            ended = await run_in(
                sandbox,
                ["/bin/bash", "-c", "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'"],
                {"TASK_VALUE": "task-value", "PATH": "/usr/bin"},
            )
            assert "server-secret-value" not in ended.output
            assert str(disk) not in ended.output
            assert "TASK_VALUE=task-value" in ended.output

    asyncio.run(story())


def test_the_environment_is_in_no_argument_list_of_the_host(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            given = {"TASK_VALUE": "a-value-that-is-secret", "PATH": "/usr/bin"}
            script = "echo up $TASK_VALUE; sleep 30"
            output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], given, "/workspace"))
            assert b"a-value-that-is-secret" in await read_until(output, b"\n")
            words = b""
            for listing in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    words += listing.read_bytes()
            assert sandbox.handle.attempt_id.encode() in words
            assert b"a-value-that-is-secret" not in words

    asyncio.run(story())


def test_the_sandboxs_first_process_cannot_be_looked_into_and_others_can(runtime: Runtime, disk: Path):
    script = """for name in mem environ fd/1 cmdline; do : < /proc/1/$name; done
        tr '\\0\\n' '  ' < /proc/$$/cmdline; echo; echo $$"""
    ended = run_story(runtime, disk, script)
    *_, own_id = ended.output.splitlines()
    # Where the command itself is the first process, it alone could be forged by what it looks into.
    assert own_id == "1" or ended.errors.count("No such file or directory") == 4
    assert ended.output.startswith("/bin/bash -c")


def test_the_commands_output_cannot_be_opened_by_another_process_and_can_be_inherited(runtime: Runtime, disk: Path):
    script = """(exec > file; for n in 1 2; do echo forged > /proc/$$/fd/$n; done)
        bash -c 'echo inherited'; cat file"""
    ended = run_story(runtime, disk, script)
    assert ended.output == "inherited\n"
    assert ended.errors.count("No such device or address") == 2


_SPY = """for name in environ mem fd/0 exe; do head -c 0 /proc/$$/$name && echo $name; done
    head -c 0 $0 && echo itself; :"""


def test_a_program_that_is_laid_in_unreadable_hides_its_memory_from_its_children(
    runtime: Runtime, disk: Path, tmp_path: Path
):
    hidden = Path(shutil.copy("/usr/bin/bash", tmp_path / "hidden"))
    hidden.chmod(0o111)

    async def story(program: str) -> str:
        async with living(runtime, disk, programs={hidden: "/opt/agent/hidden"}) as sandbox:
            return (await run_in(sandbox, [program, "-c", _SPY, program])).output

    seen = asyncio.run(story("/opt/agent/hidden")).split()
    # gVisor runs only what can be read, and says so in its probe; still nobody gets at the memory.
    assert "mem" not in seen if runtime.name == "gvisor" else not seen
    assert {"environ", "fd/0", "itself"} <= set(asyncio.run(story("/usr/bin/bash")).split())


# System calls


def _attempt(calls: str) -> str:
    """A program that prints the error name of each expression, or `works`."""
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


def _told(output: str) -> dict[str, str]:
    return dict(line.split() for line in output.splitlines())


def test_privileged_calls_are_refused(runtime: Runtime, disk: Path):
    source = _attempt("""
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
    told = _told(run_python(runtime, disk, source).output)
    twins = {name: told.pop(name) for name in ("own_uid", "own_directory", "fork_and_wait")}
    assert set(twins.values()) == {"works"}
    if has_own_kernel(runtime):
        # Of its own: see the attempts of such a kernel's root below.
        own = {"unshare_user", "unshare_net", "clone_user", "chroot", "ptrace", "keyctl"}
        assert "works" not in {said for name, said in told.items() if name not in own}, told
        return
    assert (told.pop("io_uring"), told.pop("clone3"), told.pop("setuid")) == ("ENOSYS", "ENOSYS", "EINVAL")
    assert set(told.values()) == {"EPERM"}, told


_AS_ROOT = """
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
    "twin": lambda: os.mkdir("/workspace/own"),
}
for name in ("twin", *actions):
    try:
        actions[name]()
    except OSError:
        pass
"""


def test_whoever_becomes_root_of_users_inside_touches_nothing_of_the_host(runtime: Runtime, disk: Path):
    def look() -> tuple[object, ...]:
        pattern = Path("/proc/sys/kernel/core_pattern").read_text()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return os.uname().nodename, pattern, len(mounts), Path("/usr/bin/true").stat().st_mtime

    before = look()
    run_python(runtime, disk, _AS_ROOT)
    assert look() == before
    assert not Path("/usr/bin/stolen").exists()
    assert (disk / "workspace" / "own").stat().st_uid == os.getuid()


def test_socket_families_that_lead_to_the_kernel_or_host_are_refused(runtime: Runtime, disk: Path):
    source = _attempt("""
attempt("packet", lambda: socket.socket(17, 3, 0))
attempt("vsock", lambda: socket.socket(40, 1, 0))
attempt("alg", lambda: socket.socket(38, 5, 0))
attempt("bluetooth", lambda: socket.socket(31, 3, 0))
attempt("netfilter", lambda: socket.socket(16, 3, 12))
attempt("raw", lambda: socket.socket(2, 3, 1))
for name, family, kind in (("unix", 1, 1), ("inet", 2, 1), ("inet6", 10, 2), ("route", 16, 3)):
    attempt(name, lambda: socket.socket(family, kind, 0).close())
""")
    told = _told(run_python(runtime, disk, source).output)
    assert {name for name, said in told.items() if said == "works"} == {"unix", "inet", "inet6", "route"}
    if not has_own_kernel(runtime):
        assert {told[name] for name in ("packet", "vsock", "alg", "bluetooth")} == {"EAFNOSUPPORT"}
        assert (told["netfilter"], told["raw"]) == ("EPROTONOSUPPORT", "EPERM")


def test_nothing_can_be_typed_into_a_terminal_and_its_size_can_be_asked(runtime: Runtime, disk: Path):
    source = _attempt("""
master, slave = os.openpty()
attempt("sti", lambda: fcntl.ioctl(slave, 0x5412, b"x"))
attempt("linux", lambda: fcntl.ioctl(slave, 0x541C, b"x"))
attempt("size", lambda: fcntl.ioctl(slave, 0x5413, bytes(8)))
""")
    refusal = "ENOTTY" if runtime.name == "gvisor" else "EPERM"
    assert _told(run_python(runtime, disk, source).output) == {"sti": refusal, "linux": refusal, "size": "works"}


def test_no_privilege_is_held_or_can_be_gained(runtime: Runtime, disk: Path):
    ended = run_story(runtime, disk, "grep -E '^(Cap|NoNewPrivs|Seccomp:|Groups)' /proc/self/status")
    told = dict(line.split(":") for line in ended.output.splitlines())
    assert {int(value, 16) for name, value in told.items() if name.startswith("Cap")} == {0}
    if not has_own_kernel(runtime):
        assert (told["NoNewPrivs"].strip(), told["Seccomp"].strip()) == ("1", "2")


# Network


def test_the_hosts_loopback_is_not_reached_and_the_gateways_is(runtime: Runtime, disk: Path):
    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as of_the_host:
            async with living(runtime, disk) as sandbox:
                port = of_the_host.getsockname()[1]
                script = (
                    f"(: < /dev/tcp/127.0.0.1/{port}) || echo refused; (: < /dev/tcp/127.0.0.1/8123) && echo reached"
                )
                ended = await run_in(sandbox, ["/bin/bash", "-c", script])
                assert ended.output == "refused\nreached\n"
                sandbox.listeners.model.accept()[0].close()
            of_the_host.setblocking(False)
            with pytest.raises(BlockingIOError):
                of_the_host.accept()

    asyncio.run(story())


def test_the_hosts_abstract_sockets_are_not_reached_and_own_ones_are(runtime: Runtime, disk: Path):
    name = f"canary-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as of_the_host:
        of_the_host.bind(f"\0{name}")
        of_the_host.listen()
        source = _attempt(f"""
own = socket.socket(socket.AF_UNIX)
own.bind("\\0own"); own.listen()
attempt("host", lambda: socket.socket(socket.AF_UNIX).connect("\\0{name}"))
attempt("own", lambda: socket.socket(socket.AF_UNIX).connect("\\0own"))
""")
        assert _told(run_python(runtime, disk, source).output) == {"host": "ECONNREFUSED", "own": "works"}


def test_there_is_no_route_out_and_the_gateways_addresses_arrive_as_they_are(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            answering = asyncio.create_task(answer(sandbox.listeners.dns_udp))
            ended = await run_in(sandbox, ["/usr/bin/python3", "-c", CONNECT])
            await answering
            assert ended.output.split() == CONNECTED, ended
            take_connection(sandbox.listeners.transparent[443])

    asyncio.run(story())


_CONNECT_BY_PORT = """
import errno, socket
for port in (22, 5432, 443, 23):
    try:
        socket.create_connection(("198.18.3.4", port), timeout=5).close()
        print("open")
    except OSError as error:
        print(errno.errorcode.get(error.errno, type(error).__name__))
"""


def test_programs_without_proxy_support_find_the_ports_that_were_asked_for_and_no_others(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk, transparent_ports=(443, 80, 22, 5432)) as sandbox:
            ended = await run_in(sandbox, ["/usr/bin/python3", "-c", _CONNECT_BY_PORT])
            assert ended.output.split()[:3] == ["open"] * 3, ended
            assert ended.output.split()[3] != "open", ended
            for port in (22, 5432, 443):
                connection, _ = sandbox.listeners.transparent[port].accept()
                assert connection.getsockname() == ("198.18.3.4", port)
                connection.close()

    asyncio.run(story())
