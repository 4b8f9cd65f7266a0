"""Every witness sees the change that it is there for: each is made for real, by a process that plays a sandbox."""

import contextlib
import ctypes
import os
import secrets
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from escape import host_facts, host_watch
from escape.attack import Evidence
from escape.host_watch import HOLD_SECONDS, TERMINALS_MAX, WITNESSES, HostWatch

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the host")

UID = 64_777
PLAYED = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
print("up", flush=True)
for line in sys.stdin:
    exec(eval(line))
    print("done", flush=True)
"""


class Played:
    """A process that does what it is told; with the data directory in its arguments it is of a sandbox."""

    def __init__(self, *arguments):
        command = [sys.executable, "-c", PLAYED, *map(str, arguments)]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._popen.pid
        assert self._popen.stdout.readline() == "up\n"

    def do(self, code):
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
    played = Played(tmp_path / "data")
    yield played
    played.end()


@pytest.fixture
def other():
    played = Played()
    yield played
    played.end()


@pytest.fixture
def watch(marker, other, sandbox, tmp_path):
    with HostWatch(marker, (other.pid,), tmp_path / "data") as watch:
        watch.settle()
        yield watch


def seen(watch):
    """The witnesses that saw a change."""
    watch.look()
    changes = watch.changes()
    assert set(changes) == set(WITNESSES)
    return {name for name, found in changes.items() if found}


def test_nothing_is_seen_where_nothing_changes(watch, sandbox):
    sandbox.do("os.nice(1); held = os.openpty(); open('/dev/null').close()")
    assert seen(watch) == set()


def test_a_process_that_ended_is_seen(watch, other):
    other.end()
    assert "processes" in seen(watch)


def test_a_mount_with_the_marker_is_seen_in_any_namespace(watch, sandbox, marker, tmp_path):
    (tmp_path / "target").mkdir()
    sandbox.do("libc.unshare(0x20000); libc.mount(b'none', b'/', None, 0x44000, None)")
    sandbox.do(f"libc.mount({marker.encode()!r}, {os.fsencode(tmp_path / 'target')!r}, b'tmpfs', 0, None)")
    assert seen(watch) == {"mounts", "namespaces"}


def test_another_root_is_seen(watch, other, tmp_path):
    other.do(f"os.chroot({str(tmp_path)!r})")
    assert "mounts" in seen(watch)


@pytest.mark.parametrize("flag", [0x4000000, 0x2000000, 0x8000000])
def test_another_namespace_is_seen(watch, sandbox, flag):
    sandbox.do(f"libc.unshare({flag})")
    assert "namespaces" in seen(watch)


def test_a_file_with_the_marker_is_seen(watch, marker):
    path = Path("/tmp", marker)
    path.write_text("x")
    try:
        assert seen(watch) == {"files"}
    finally:
        path.unlink()


def test_another_etc_is_seen(watch, other, tmp_path):
    (tmp_path / "passwd").write_text("root::0:0::/:/bin/sh\n")
    other.do("libc.unshare(0x20000); libc.mount(b'none', b'/', None, 0x44000, None)")
    other.do(f"libc.mount({os.fsencode(tmp_path / 'passwd')!r}, b'/etc/passwd', None, 4096, None)")
    assert "files" in seen(watch)


def test_a_changed_setting_is_seen(marker, other, tmp_path, monkeypatch):
    setting = tmp_path / "core_pattern"
    setting.write_text("core\n")
    monkeypatch.setattr(host_facts, "SETTINGS", (str(setting),))
    with HostWatch(marker, (other.pid,), tmp_path / "data") as watch:
        setting.write_text("|/tmp/evil\n")
        watch.look()
    assert watch.changes()["settings"]


def test_many_contexts_for_aio_are_seen(watch, monkeypatch):
    # Fewer than those for which a battery that runs at the same time would be told that something escaped.
    monkeypatch.setattr(host_watch, "AIO_EVENTS", 5000)
    libc, context = ctypes.CDLL(None, use_errno=True), ctypes.c_ulong(0)
    call = 0 if os.uname().machine == "aarch64" else 206
    assert libc.syscall(call, 6000, ctypes.byref(context)) == 0
    try:
        assert seen(watch) == {"AIO contexts"}
    finally:
        libc.syscall(call + 1, context)


def test_a_key_of_a_sandbox_is_seen(watch, sandbox):
    add_key = 217 if os.uname().machine == "aarch64" else 248
    sandbox.do(f"os.setgroups([]); os.setgid({UID}); os.setuid({UID})")
    sandbox.do(f"libc.syscall({add_key}, b'user', b'a key', b'x', 1, -4)")
    assert "keys" in seen(watch)


def test_a_control_group_is_seen(watch, marker):
    parents = [path for path in Path("/sys/fs/cgroup").glob("*/") if (path / "cgroup.procs").exists()]
    group = (parents or [Path("/sys/fs/cgroup")])[0] / marker
    group.mkdir()
    try:
        assert seen(watch) == {"control groups"}
    finally:
        group.rmdir()


RAISED_THREAD = """
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
        RAISED_THREAD,
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    ],
)
def test_a_higher_priority_is_seen(watch, sandbox, code):
    sandbox.do(code)
    try:
        assert seen(watch) == {"priorities"}
    finally:
        sandbox.do("os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))")


def test_many_terminals_are_seen(watch, sandbox):
    sandbox.do(f"held = [os.openpty() for _ in range({TERMINALS_MAX})]")
    assert seen(watch) == {"terminals"}


def test_what_lasts_only_as_long_as_it_is_held_is_seen_by_the_thread(watch, marker):
    path = Path("/tmp", marker)
    path.write_text("x")
    time.sleep(HOLD_SECONDS / 2)
    path.unlink()
    assert watch.changes()["files"]


def test_without_a_sandbox_what_is_about_sandboxes_is_not_said(marker, other, tmp_path):
    with HostWatch(marker, (other.pid,), tmp_path / "data") as watch:
        watch.look()
    of_the_machine = {"AIO contexts", "socket buffers", "compiled filters"}
    assert set(watch.changes()) == {"processes", "mounts", "files", "settings"} | of_the_machine


def test_a_watch_covers_the_time_in_which_it_looked_and_no_other(watch, monkeypatch):
    begin = time.time()
    time.sleep(HOLD_SECONDS)
    end = time.time()
    assert Evidence({}, samples=tuple(watch.samples)).covers(begin, end)
    monkeypatch.setattr(host_facts, "read_settings", lambda: time.sleep(HOLD_SECONDS) or {})
    time.sleep(HOLD_SECONDS)
    assert not Evidence({}, samples=tuple(watch.samples)).covers(end, time.time())


def test_a_watch_that_broke_is_an_error(marker, other, tmp_path, monkeypatch):
    with HostWatch(marker, (other.pid,), tmp_path / "data") as watch:
        monkeypatch.setattr(host_facts, "aio_events", lambda: 1 // 0)
        time.sleep(1)
    with pytest.raises(ZeroDivisionError):
        watch.changes()


def test_it_does_not_begin_without_the_processes_that_it_is_to_watch(marker, tmp_path):
    with pytest.raises(AssertionError):
        HostWatch(marker, (2**22 + 1,), tmp_path).__enter__()


def test_a_process_that_has_ended_is_gone_although_nobody_collected_it():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert host_facts.read_process(child.pid) is None
    child.wait()
    assert host_facts.read_process(os.getpid()).score == int(Path("/proc/self/oom_score_adj").read_text())


def test_buffers_of_sockets_and_compiled_filters_are_those_of_the_whole_machine():
    before = host_facts.socket_buffer_bytes()
    door = socket.create_server(("127.0.0.1", 0))
    pairs = [(socket.create_connection(door.getsockname()), door.accept()[0]) for _ in range(40)]
    for ours, _ in pairs:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
    assert host_facts.socket_buffer_bytes() - before > 20 << 20
    for one in (door, *(end for pair in pairs for end in pair)):
        one.close()
    filters = host_facts.filter_bytes()
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 1))
    held = [socket.socket() for _ in range(500)]
    for one in held:
        one.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxP", 1, ctypes.addressof(code)))
    assert host_facts.filter_bytes() - filters > 1 << 20
    for one in held:
        one.close()
