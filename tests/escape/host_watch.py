"""Watches the host for changes while attacks run inside a sandbox.

If an attack succeeds, it creates an object (a mount, a file, a key, a control group) whose name contains a marker. The
attack keeps that object for HOLD_SECONDS, so that a sample is taken while the object exists. Each observer is a method
of HostWatch that returns the changes it finds in one sample.
"""

import contextlib
import os
import threading
import time
from pathlib import Path

from doubles.leftovers import processes
from escape import host_state
from sandbox.runtimes.limits.kernel_time import NESTED_EPOLL_LOCK, NETWORK_LOCK, TERMINAL_LOCK
from sandbox.runtimes.programs.launcher import PTYS_MAX

INTERVAL_SECONDS = 0.4
HOLD_SECONDS = 6.0
"""The time for which an attack keeps its effects: long enough for a complete sample, even on a busy machine."""

TERMINAL_DESCRIPTORS_MAX, KEYS_MAX = 2 * PTYS_MAX + 16, 0
"""Limits for a sandbox's host resources: descriptors for both ends of the terminals that it may open, and no keys."""

AIO_EVENTS = 20_000
"""The number of AIO events that an attack requests: far more than other programs on the machine use."""


SOCKET_BUFFERS_BYTES, COMPILED_FILTERS_BYTES = 400 << 20, 12 << 20
"""Kernel memory that attacks try to use for socket buffers and compiled filters: more than all other programs use."""

SEMAPHORES = 1_100_000
"""The number of System V semaphores that an attack requests: more than a sandbox may have."""


LONG_CALLS = ("do_exit", "pagemap_read", "proc_sys_call_handler", "dev_ifconf", "ovl_iterate", "ksys_sync")
"""Functions of the kernel that attacks delay.

Meanwhile, ending processes and readers of procfs files keep memory, and programs that list interfaces or directories,
or sync all file systems, keep locks.
"""

LONG_CALL_SECONDS = 3.0
"""A thread that executes one of LONG_CALLS for this time counts as a change. Ordinary calls take milliseconds."""


REPORTED_LOCK_WAIT_SECONDS = 15.0
"""A program on the host that waits for a lock of the kernel for this time counts as a change.

Without a limit, the attacks make it wait for more than a minute. The runner needs some seconds to end a sandbox.
"""


class HostLockProbe:
    """A context manager. Its thread takes a lock of the host's kernel repeatedly and measures how long it waits."""

    def __init__(self, take):
        self._take, self._stop, self._thread = take, threading.Event(), threading.Thread(target=self._run, daemon=True)
        self._asked_at, self._longest_seconds = None, 0.0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def longest_wait_seconds(self):
        """Return the longest wait so far, which includes the current one."""
        asked_at = self._asked_at
        return max(self._longest_seconds, 0.0 if asked_at is None else time.monotonic() - asked_at)

    def _run(self):
        _raise_thread_priority()
        while not self._stop.wait(0.1):
            self._asked_at = time.monotonic()
            self._take()
            self._longest_seconds, self._asked_at = self.longest_wait_seconds(), None


def _raise_thread_priority():
    """Give this thread priority over the attacks, which use all available CPUs."""
    _set_policy(threading.get_native_id(), os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, 1)


@contextlib.contextmanager
def _priority_of_all_threads():
    """Give all current threads of this process priority over the attacks, but not the programs that they start.

    Otherwise, a thread that holds Python's global lock but gets no processor would delay the samples for seconds.
    """
    ordinary = [thread for thread in _thread_ids() if _policy(thread) == os.SCHED_OTHER]
    for thread in ordinary:
        _set_policy(thread, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, 1)
    try:
        yield
    finally:
        for thread in set(ordinary) & set(_thread_ids()):
            _set_policy(thread, os.SCHED_OTHER, 0)


def _thread_ids():
    return [int(path.name) for path in Path("/proc/self/task").iterdir()]


def _policy(thread):
    with contextlib.suppress(ProcessLookupError):
        return os.sched_getscheduler(thread)
    return None


def _set_policy(thread, policy, priority):
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.sched_setscheduler(thread, policy, os.sched_param(priority))


PROBED_LOCKS = {lock.name: lock.acquire_and_release for lock in (TERMINAL_LOCK, NETWORK_LOCK, NESTED_EPOLL_LOCK)}
"""Functions that take a lock of the host's kernel, keyed by the lock's name."""


class HostWatch:
    """A context manager, to be entered before the attacks.

    has_own_kernel: whether the sandboxes have their own kernel. If so, the host's kernel must not execute LONG_CALLS.
    marker: a part of the name of every object that an attack creates. protected_pids: host processes that must not be
    affected. data_dir: the data directory of the server whose attempts are watched. samples: the start and end of each
    sample.
    """

    def __init__(self, marker, protected_pids, data_dir, *, has_own_kernel=False):
        self._has_own_kernel, self._calls = has_own_kernel, {}
        self._marker, self._protected_pids, self._data_dir = marker, tuple(protected_pids), Path(data_dir)
        self._changes = {}
        self._ready_processes = {}
        self.samples = []
        self._failure = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._lock_probes = {name: HostLockProbe(take) for name, take in PROBED_LOCKS.items()}
        self._exit_stack = contextlib.ExitStack()

    def __enter__(self):
        self._before = {pid: host_state.read_process(pid) for pid in self._protected_pids}
        assert None not in self._before.values(), f"not all of {self._protected_pids} exist"
        self._roots = {pid: Path("/proc", str(pid), "root") for pid in self._protected_pids}
        self._etc = {pid: host_state.read_etc(root) for pid, root in self._roots.items()}
        self._settings, self._aio_events = host_state.read_settings(), host_state.aio_events()
        self._buffer_bytes, self._bpf_filter_bytes = host_state.socket_buffer_bytes(), host_state.bpf_filter_bytes()
        self._exit_stack.enter_context(_priority_of_all_threads())
        for probe in self._lock_probes.values():
            self._exit_stack.enter_context(probe)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._exit_stack.close()

    def mark_sandbox_ready(self):
        """Record the current processes of sandboxes. From now on, they must not gain privileges on the host."""
        with self._lock:
            self._ready_processes.update(self._sandbox_processes())

    def changes(self):
        """Return `{observer: changes}` for the observers that have run."""
        if self._failure is not None:
            raise self._failure
        return {name: sorted(found) for name, found in self._changes.items()}

    def sample(self):
        begin = time.time()
        Path("/dev/full").open("rb", 0).close()  # an attack tries to watch the host's use of this file
        with self._lock:
            sandbox_processes = self._sandbox_processes()
            process_comparisons = list(self._process_comparisons(sandbox_processes))
            for name, observe in OBSERVERS.items():
                if self._ready_processes or name not in SANDBOX_OBSERVERS:
                    self._changes.setdefault(name, set()).update(observe(self, sandbox_processes, process_comparisons))
            self.samples.append((begin, time.time()))

    def _watch(self):
        _raise_thread_priority()
        try:
            while not self._stop.wait(INTERVAL_SECONDS):
                self.sample()
        except Exception as error:
            self._failure = error

    def _sandbox_processes(self):
        found = ((pid, host_state.read_process(pid)) for pid, _ in processes(self._data_dir))
        return {pid: process for pid, process in found if process is not None and pid not in self._protected_pids}

    def _process_comparisons(self, sandbox_processes):
        """Yield (pid, old, new) for every process that must not change; ended sandbox processes are omitted."""
        for pid, before in self._before.items():
            yield pid, before, host_state.read_process(pid)
        for pid, before in self._ready_processes.items():
            if pid in sandbox_processes and sandbox_processes[pid].start == before.start:
                yield pid, before, sandbox_processes[pid]

    def _processes(self, _, process_comparisons):
        ended = (pid for pid, old, new in process_comparisons if new is None or new.start != old.start)
        return {f"process {pid} ended" for pid in ended}

    def _mounts(self, _, process_comparisons):
        for pid, old, new in process_comparisons:
            if new is not None and (new.mounts, new.root) != (old.mounts, old.root):
                yield f"process {pid} has {new.root}, {sorted(new.mounts ^ old.mounts)}"
        for pid in host_state.mount_namespaces().values():
            yield from (line for line in host_state.mount_table(pid) if self._marker in line)

    def _namespaces(self, _, process_comparisons):
        return {
            f"process {pid} is in {sorted(new.namespaces.items() - old.namespaces.items())}"
            for pid, old, new in process_comparisons
            if new is not None and new.namespaces != old.namespaces
        }

    def _files(self, *_):
        for pid, root in self._roots.items():
            if host_state.read_etc(root) != self._etc[pid]:
                yield f"process {pid} has a different /etc"
            yield from (path for path in host_state.list_watched_directories(root) if self._marker in path)

    def _kernel_settings(self, *_):
        new = host_state.read_settings()
        return {f"{path}: {value!r}" for path, value in new.items() - self._settings.items()}

    def _aio_contexts(self, *_):
        growth = host_state.aio_events() - self._aio_events
        return {f"{growth} more events"} if growth >= AIO_EVENTS else set()

    def _socket_buffers(self, *_):
        growth = host_state.socket_buffer_bytes() - self._buffer_bytes
        return {f"{growth >> 20} MiB more"} if growth >= SOCKET_BUFFERS_BYTES * 3 // 4 else set()

    def _compiled_filters(self, *_):
        growth = host_state.bpf_filter_bytes() - self._bpf_filter_bytes
        return {f"{growth >> 20} MiB more"} if growth >= COMPILED_FILTERS_BYTES * 3 // 4 else set()

    def _semaphores(self, sandbox_processes, _):
        namespaces = {process.namespaces["ipc"]: pid for pid, process in sandbox_processes.items()}
        counts = [host_state.semaphore_count(pid) for pid in namespaces.values()]
        return {f"{count} semaphores" for count in counts if count >= SEMAPHORES}

    def _oom_scores(self, _, process_comparisons):
        for pid, old, new in process_comparisons:
            if new is not None and new.oom_score < old.oom_score:
                yield f"process {pid} has {new.oom_score}, and had {old.oom_score}"

    def _keys(self, sandbox_processes, _):
        for uid in {process.uid for process in sandbox_processes.values()} - {
            process.uid for process in self._before.values()
        }:
            if (count := host_state.key_count(uid)) > KEYS_MAX:
                yield f"uid {uid} has {count} keys"
        yield from (line for line in host_state.key_names() if self._marker in line)

    def _control_groups(self, _, process_comparisons):
        for pid, old, new in process_comparisons:
            if new is not None and new.cgroups != old.cgroups:
                yield f"process {pid} is in {new.cgroups}"
        yield from (path for path in host_state.control_groups() if self._marker in path)

    def _priorities(self, sandbox_processes, process_comparisons):
        nice_min = min(process.nice for process in self._ready_processes.values())
        processors = frozenset().union(*(process.processors for process in self._ready_processes.values()))
        for pid, process in sandbox_processes.items():
            if process.nice < nice_min or process.policies:
                yield f"process {pid} has {process.nice}, {sorted(process.policies)}"
            if selected := process.processors - processors:
                yield f"process {pid} runs on {sorted(selected)}"
        for pid, old, new in process_comparisons:
            if new is not None and (new.nice < old.nice or new.policies != old.policies):
                yield f"process {pid} has {new.nice}, {sorted(new.policies)}"

    def _long_calls(self, *_):
        if not self._has_own_kernel:
            return set()
        now, earlier, self._calls = time.monotonic(), self._calls, {}
        for pid, _ in processes(self._data_dir):
            for call in host_state.calls_in_progress(pid, LONG_CALLS):
                self._calls[call] = earlier.get(call, now)
        return {f"thread {thread}: {function}" for (thread, function), since in self._calls.items()
                if now - since >= LONG_CALL_SECONDS}  # fmt: skip

    def _locks(self, *_):
        waits = {name: probe.longest_wait_seconds() for name, probe in self._lock_probes.items()}
        return {f"{name}: {seconds:.0f} s" for name, seconds in waits.items() if seconds >= REPORTED_LOCK_WAIT_SECONDS}

    def _terminals(self, sandbox_processes, _):
        count = sum(process.terminals for process in sandbox_processes.values())
        return {f"{count} descriptors of terminals"} if count > TERMINAL_DESCRIPTORS_MAX else set()


OBSERVERS = {
    "processes": HostWatch._processes,
    "mounts": HostWatch._mounts,
    "namespaces": HostWatch._namespaces,
    "files": HostWatch._files,
    "settings": HostWatch._kernel_settings,
    "AIO contexts": HostWatch._aio_contexts,
    "keys": HostWatch._keys,
    "control groups": HostWatch._control_groups,
    "priorities": HostWatch._priorities,
    "terminals": HostWatch._terminals,
    "socket buffers": HostWatch._socket_buffers,
    "compiled filters": HostWatch._compiled_filters,
    "semaphores": HostWatch._semaphores,
    "scores": HostWatch._oom_scores,
    "long calls": HostWatch._long_calls,
    "locks": HostWatch._locks,
}
"""The observers, keyed by the names that attack declarations use."""

SANDBOX_OBSERVERS = {"namespaces", "keys", "control groups", "priorities", "terminals", "scores", "semaphores"}
"""Observers that need a running sandbox."""
