"""Every observer reports its kind of change. A real process makes the change in place of a sandbox."""

import contextlib
import ctypes
import os
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from escape import host_state, host_watch
from escape.attack import Evidence
from escape.host_watch import HOLD_SECONDS, OBSERVERS, SEMAPHORES, TERMINAL_DESCRIPTORS_MAX, HostWatch

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change the host")

UID = 64_777
PROGRAM = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
print("up", flush=True)
for line in sys.stdin:
    exec(eval(line))
    print("done", flush=True)
"""


class ScriptedProcess:
    """A process that runs the given code. With the data directory as an argument, it counts as a sandbox process."""

    def __init__(self, *arguments):
        command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._popen.pid
        assert self._popen.stdout.readline() == "up\n"

    def run(self, code):
        self._popen.stdin.write(repr(code) + "\n")
        self._popen.stdin.flush()
        assert self._popen.stdout.readline() == "done\n"

    def end(self):
        self._popen.kill()
        self._popen.communicate()


@pytest.fixture
def marker():
    return f"battery-{secrets.token_hex(6)}"


@pytest.fixture
def sandbox(tmp_path):
    process = ScriptedProcess(tmp_path / "data")
    yield process
    process.end()


@pytest.fixture
def unrelated_process():
    process = ScriptedProcess()
    yield process
    process.end()


@pytest.fixture
def watch(marker, unrelated_process, sandbox, tmp_path):
    with HostWatch(marker, (unrelated_process.pid,), tmp_path / "data") as watch:
        watch.mark_sandbox_ready()
        yield watch


def changed_observers(watch):
    """Take a sample; return the observers that found a change."""
    watch.sample()
    changes = watch.changes()
    assert set(changes) == set(OBSERVERS)
    return {name for name, found in changes.items() if found}


def test_observers_report_nothing_without_a_change(watch, sandbox):
    sandbox.run("os.nice(1); held = os.openpty(); open('/dev/null').close()")
    assert changed_observers(watch) == set()


def test_ended_process_is_reported(watch, unrelated_process):
    unrelated_process.end()
    assert "processes" in changed_observers(watch)


def test_marked_mount_is_reported_in_any_namespace(watch, sandbox, marker, tmp_path):
    (tmp_path / "target").mkdir()
    sandbox.run("libc.unshare(0x20000); libc.mount(b'none', b'/', None, 0x44000, None)")
    sandbox.run(f"libc.mount({marker.encode()!r}, {os.fsencode(tmp_path / 'target')!r}, b'tmpfs', 0, None)")
    assert changed_observers(watch) == {"mounts", "namespaces"}


def test_changed_root_is_reported(watch, unrelated_process, tmp_path):
    unrelated_process.run(f"os.chroot({str(tmp_path)!r})")
    assert "mounts" in changed_observers(watch)


@pytest.mark.parametrize("has_own_kernel", [True, False])
def test_long_call_is_reported_if_sandboxes_have_their_own_kernel(
    marker, unrelated_process, sandbox, tmp_path, monkeypatch, has_own_kernel
):
    monkeypatch.setattr(host_watch, "LONG_CALLS", ("hrtimer_nanosleep",))
    monkeypatch.setattr(host_watch, "LONG_CALL_SECONDS", 0.2)
    sandbox.run("import threading, time; threading.Thread(target=time.sleep, args=[600], daemon=True).start()")
    with HostWatch(marker, (unrelated_process.pid,), tmp_path / "data", has_own_kernel=has_own_kernel) as watch:
        ends_at = time.monotonic() + (20 if has_own_kernel else 1)
        while not watch.changes().get("long calls") and time.monotonic() < ends_at:
            time.sleep(0.05)
    assert bool(watch.changes()["long calls"]) == has_own_kernel


@pytest.mark.parametrize("flag", [0x4000000, 0x2000000, 0x8000000])
def test_changed_namespace_is_reported(watch, sandbox, flag):
    sandbox.run(f"libc.unshare({flag})")
    assert "namespaces" in changed_observers(watch)


def test_marked_file_is_reported(watch, marker):
    path = Path("/tmp", marker)
    path.write_text("x")
    try:
        assert changed_observers(watch) == {"files"}
    finally:
        path.unlink()


def test_changed_file_in_etc_is_reported(watch, unrelated_process, tmp_path):
    (tmp_path / "passwd").write_text("root::0:0::/:/bin/sh\n")
    unrelated_process.run("libc.unshare(0x20000); libc.mount(b'none', b'/', None, 0x44000, None)")
    unrelated_process.run(f"libc.mount({os.fsencode(tmp_path / 'passwd')!r}, b'/etc/passwd', None, 4096, None)")
    assert "files" in changed_observers(watch)


def test_changed_setting_is_reported(marker, unrelated_process, tmp_path, monkeypatch):
    setting = tmp_path / "core_pattern"
    setting.write_text("core\n")
    monkeypatch.setattr(host_state, "KERNEL_SETTING_FILES", (str(setting),))
    with HostWatch(marker, (unrelated_process.pid,), tmp_path / "data") as watch:
        setting.write_text("|/tmp/evil\n")
        watch.sample()
    assert watch.changes()["settings"]


def test_many_aio_contexts_are_reported(watch, monkeypatch):
    # This number is below the threshold at which a concurrent attack run would report an escape.
    monkeypatch.setattr(host_watch, "AIO_EVENTS", 5000)
    libc, context = ctypes.CDLL(None, use_errno=True), ctypes.c_ulong(0)
    call = 0 if os.uname().machine == "aarch64" else 206
    assert libc.syscall(call, 6000, ctypes.byref(context)) == 0
    try:
        assert changed_observers(watch) == {"AIO contexts"}
    finally:
        libc.syscall(call + 1, context)


def test_key_of_a_sandbox_is_reported(watch, sandbox):
    add_key = 217 if os.uname().machine == "aarch64" else 248
    sandbox.run(f"os.setgroups([]); os.setgid({UID}); os.setuid({UID})")
    sandbox.run(f"libc.syscall({add_key}, b'user', b'a key', b'x', 1, -4)")
    assert "keys" in changed_observers(watch)


def test_marked_control_group_is_reported(watch, marker):
    parents = [path for path in Path("/sys/fs/cgroup").glob("*/") if (path / "cgroup.procs").exists()]
    group = (parents or [Path("/sys/fs/cgroup")])[0] / marker
    group.mkdir()
    try:
        assert changed_observers(watch) == {"control groups"}
    finally:
        group.rmdir()


RAISE_THREAD_PRIORITY_PROGRAM = """
import threading
up = threading.Event()
def work():
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -5)
    up.set()
    threading.Event().wait()
threading.Thread(target=work, daemon=True).start()
up.wait()
"""


@pytest.mark.parametrize(
    "code",
    [
        "os.setpriority(os.PRIO_PROCESS, 0, -5)",
        RAISE_THREAD_PRIORITY_PROGRAM,
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    ],
)
def test_process_that_raises_its_priority_is_reported(watch, sandbox, code):
    sandbox.run(code)
    try:
        assert changed_observers(watch) == {"priorities"}
    finally:
        sandbox.run("os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))")


def test_process_that_selects_its_processor_is_reported(watch, sandbox):
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("there is only one processor")
    sandbox.run("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})")
    assert changed_observers(watch) == {"priorities"}


def test_many_terminals_are_reported(watch, sandbox):
    sandbox.run(f"held = [os.openpty() for _ in range({TERMINAL_DESCRIPTORS_MAX // 2 + 1})]")
    assert changed_observers(watch) == {"terminals"}


def test_long_wait_for_a_lock_is_reported(marker, unrelated_process, tmp_path, monkeypatch):
    held, free = threading.Lock(), threading.Lock()
    locks = {"held": lambda: held.acquire() and held.release(), "free": lambda: free.acquire() and free.release()}
    monkeypatch.setattr(host_watch, "PROBED_LOCKS", locks)
    monkeypatch.setattr(host_watch, "REPORTED_LOCK_WAIT_SECONDS", 0.5)
    with HostWatch(marker, (unrelated_process.pid,), tmp_path / "data") as watch:
        time.sleep(0.7)
        watch.sample()
        assert watch.changes()["locks"] == []
        with held:
            time.sleep(0.7)
        watch.sample()
        assert [change.partition(":")[0] for change in watch.changes()["locks"]] == ["held"]


def test_many_semaphores_in_another_namespace_are_reported(watch, sandbox):
    sandbox.run("libc.unshare(0x08000000)")  # CLONE_NEWIPC
    sandbox.run(f"arrays = [libc.semget(0, 32000, 0o1600) for _ in range({SEMAPHORES // 32000})]")
    assert changed_observers(watch) == {"namespaces"}
    sandbox.run("arrays.append(libc.semget(0, 32000, 0o1600))")
    assert changed_observers(watch) == {"namespaces", "semaphores"}


def test_short_lived_change_is_reported_by_the_watch_thread(watch, marker):
    path = Path("/tmp", marker)
    path.write_text("x")
    time.sleep(HOLD_SECONDS / 2)
    path.unlink()
    assert watch.changes()["files"]


def test_sandbox_observers_do_not_run_without_a_sandbox(marker, unrelated_process, tmp_path):
    with HostWatch(marker, (unrelated_process.pid,), tmp_path / "data") as watch:
        watch.sample()
    machine_observers = {"AIO contexts", "socket buffers", "compiled filters", "long calls", "locks"}
    assert set(watch.changes()) == {"processes", "mounts", "files", "settings"} | machine_observers


def test_evidence_covers_only_times_with_a_complete_sample(watch, monkeypatch):
    begin = time.time()
    time.sleep(HOLD_SECONDS)
    end = time.time()
    assert Evidence({}, samples=tuple(watch.samples)).has_sample_between(begin, end)
    monkeypatch.setattr(host_state, "read_settings", lambda: time.sleep(HOLD_SECONDS) or {})
    time.sleep(HOLD_SECONDS)
    assert not Evidence({}, samples=tuple(watch.samples)).has_sample_between(end, time.time())


def test_error_in_the_watch_thread_is_raised(marker, unrelated_process, tmp_path, monkeypatch):
    with HostWatch(marker, (unrelated_process.pid,), tmp_path / "data") as watch:
        monkeypatch.setattr(host_state, "aio_events", lambda: 1 // 0)
        time.sleep(1)
    with pytest.raises(ZeroDivisionError):
        watch.changes()


def test_watch_rejects_a_missing_process(marker, tmp_path):
    with pytest.raises(AssertionError):
        HostWatch(marker, (2**22 + 1,), tmp_path).__enter__()


def test_zombie_process_counts_as_ended():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert host_state.read_process(child.pid) is None
    child.wait()
    assert host_state.read_process(os.getpid()).oom_score == int(Path("/proc/self/oom_score_adj").read_text())


def test_socket_buffers_and_filters_of_the_whole_machine_are_counted():
    before = host_state.socket_buffer_bytes()
    listener = socket.create_server(("127.0.0.1", 0))
    pairs = [(socket.create_connection(listener.getsockname()), listener.accept()[0]) for _ in range(40)]
    for ours, _ in pairs:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
    assert host_state.socket_buffer_bytes() - before > 20 << 20
    for each in (listener, *(end for pair in pairs for end in pair)):
        each.close()
    filters = host_state.bpf_filter_bytes()
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 1))
    sockets = [socket.socket() for _ in range(500)]
    for each in sockets:
        each.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxP", 1, ctypes.addressof(code)))
    assert host_state.bpf_filter_bytes() - filters > 1 << 20
    for each in sockets:
        each.close()


def test_threads_have_priority_during_the_watch_but_programs_do_not(marker, unrelated_process, sandbox, tmp_path):
    with HostWatch(marker, (unrelated_process.pid,), tmp_path / "data"):
        assert os.sched_getscheduler(0) == os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
        started = ScriptedProcess()
        assert os.sched_getscheduler(started.pid) == os.SCHED_OTHER
        started.end()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
