"""Watches the host while attacks run inside a sandbox: what they must not change there.

Attacks that succeed leave a marker in what they make (a mount, a file, a key, a control group), and hold it for
HOLD_SECONDS, so that a sample sees it while it lasts. Each witness is a method of HostWatch that returns the changes
that it sees in one sample.
"""

import contextlib
import os
import threading
import time
from pathlib import Path

from doubles.leftovers import processes
from escape import host_facts

INTERVAL_SECONDS = 0.4
HOLD_SECONDS = 6.0
"""Long enough for a whole sample on a busy machine; where it was not, nothing is proven."""

TERMINALS_MAX, KEYS_MAX = 16, 0
"""What a sandbox has of the host's: terminals of its own programs, and no key."""

AIO_EVENTS = 20_000
"""An attack asks its kernel for as many, far more than other programs of the machine begin to use meanwhile."""


BUFFERS_BYTES, FILTERS_BYTES = 400 << 20, 12 << 20
"""What attacks try to have the kernel hold in buffers of sockets and in compiled filters: more than all else does."""


class HostWatch:
    """Enter it before the attacks.

    marker: in everything that attacks make · others: ids of processes of the host that no attack may reach
    data_dir: of the server whose attempts are watched · samples: begin and end of each.
    """

    def __init__(self, marker, others, data_dir):
        self._marker, self._others, self._data_dir = marker, tuple(others), Path(data_dir)
        self._found = {}
        self._settled = {}
        self.samples = []
        self._failure = None
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self):
        self._before = {pid: host_facts.read_process(pid) for pid in self._others}
        assert None not in self._before.values(), f"not all of {self._others} are there"
        self._roots = {pid: Path("/proc", str(pid), "root") for pid in self._others}
        self._etc = {pid: host_facts.read_etc(root) for pid, root in self._roots.items()}
        self._settings, self._aio_events = host_facts.read_settings(), host_facts.aio_events()
        self._buffer_bytes, self._filter_bytes = host_facts.socket_buffer_bytes(), host_facts.filter_bytes()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def settle(self):
        """A sandbox is up: from here on its processes get no more rights on the host."""
        with self._lock:
            self._settled.update(self._attempt())

    def changes(self):
        """`{witness: changes}`; without witnesses that never looked."""
        if self._failure is not None:
            raise self._failure
        return {name: sorted(found) for name, found in self._found.items()}

    def look(self):
        """Take one sample."""
        begin = time.time()
        with self._lock:
            attempt = self._attempt()
            pairs = list(self._pairs(attempt))
            for name, witness in WITNESSES.items():
                if self._settled or name not in OF_SANDBOXES:
                    self._found.setdefault(name, set()).update(witness(self, attempt, pairs))
            self.samples.append((begin, time.time()))

    def _watch(self):
        # Ahead of the attacks, which take all processors that they can get.
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_FIFO, os.sched_param(1))
        try:
            while not self._stop.wait(INTERVAL_SECONDS):
                self.look()
        except Exception as error:
            self._failure = error

    def _attempt(self):
        found = ((pid, host_facts.read_process(pid)) for pid, _ in processes(self._data_dir))
        return {pid: process for pid, process in found if process is not None and pid not in self._others}

    def _pairs(self, attempt):
        """(id, before, now) of every process that must stay as it is; a process of a sandbox may end."""
        for pid, before in self._before.items():
            yield pid, before, host_facts.read_process(pid)
        for pid, before in self._settled.items():
            if pid in attempt and attempt[pid].start == before.start:
                yield pid, before, attempt[pid]

    def _processes(self, _, pairs):
        return {f"process {pid} ended" for pid, was, now in pairs if now is None or now.start != was.start}

    def _mounts(self, _, pairs):
        for pid, was, now in pairs:
            if now is not None and (now.mounts, now.root) != (was.mounts, was.root):
                yield f"process {pid} has {now.root}, {sorted(now.mounts ^ was.mounts)}"
        for pid in host_facts.mount_namespaces().values():
            yield from (line for line in host_facts.mount_table(pid) if self._marker in line)

    def _namespaces(self, _, pairs):
        return {
            f"process {pid} is in {sorted(now.namespaces.items() - was.namespaces.items())}"
            for pid, was, now in pairs
            if now is not None and now.namespaces != was.namespaces
        }

    def _files(self, *_):
        for pid, root in self._roots.items():
            if host_facts.read_etc(root) != self._etc[pid]:
                yield f"process {pid} sees another /etc"
            yield from (path for path in host_facts.names_below(root) if self._marker in path)

    def _kernel_settings(self, *_):
        now = host_facts.read_settings()
        return {f"{path}: {value!r}" for path, value in now.items() - self._settings.items()}

    def _aio_contexts(self, *_):
        more = host_facts.aio_events() - self._aio_events
        return {f"{more} more events"} if more >= AIO_EVENTS else set()

    def _socket_buffers(self, *_):
        more = host_facts.socket_buffer_bytes() - self._buffer_bytes
        return {f"{more >> 20} MiB more"} if more >= BUFFERS_BYTES * 3 // 4 else set()

    def _compiled_filters(self, *_):
        more = host_facts.filter_bytes() - self._filter_bytes
        return {f"{more >> 20} MiB more"} if more >= FILTERS_BYTES * 3 // 4 else set()

    def _scores(self, _, pairs):
        for pid, was, now in pairs:
            if now is not None and now.score < was.score:
                yield f"process {pid} has {now.score}, and had {was.score}"

    def _keys(self, attempt, _):
        for uid in {process.uid for process in attempt.values()} - {process.uid for process in self._before.values()}:
            if (count := host_facts.keys_of(uid)) > KEYS_MAX:
                yield f"uid {uid} has {count} keys"
        yield from (line for line in host_facts.key_names() if self._marker in line)

    def _control_groups(self, _, pairs):
        for pid, was, now in pairs:
            if now is not None and now.groups != was.groups:
                yield f"process {pid} is in {now.groups}"
        yield from (path for path in host_facts.control_groups() if self._marker in path)

    def _priorities(self, attempt, pairs):
        lowest = min(process.nice for process in self._settled.values())
        for pid, process in attempt.items():
            if process.nice < lowest or process.policies:
                yield f"process {pid} has {process.nice}, {sorted(process.policies)}"
        for pid, was, now in pairs:
            if now is not None and (now.nice < was.nice or now.policies != was.policies):
                yield f"process {pid} has {now.nice}, {sorted(now.policies)}"

    def _terminals(self, attempt, _):
        count = sum(process.terminals for process in attempt.values())
        return {f"{count} terminals of the host"} if count > TERMINALS_MAX else set()


WITNESSES = {
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
    "scores": HostWatch._scores,
}
"""By the names under which attacks declare them."""

OF_SANDBOXES = {"namespaces", "keys", "control groups", "priorities", "terminals", "scores"}
"""Those that say something only once a sandbox is up."""
