"""Version 1 and version 2 control groups, on directory trees that imitate the kernel's."""

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest

from sandbox.interfaces.runtime import Stats
from sandbox.model.fixed_limits import OOM_KILLS_MAX, VMA_BYTES_MAX
from sandbox.runtimes.limits import cgroups
from sandbox.runtimes.limits.cgroups import ControlGroup, Hierarchies
from sandbox.runtimes.limits.files_without_descriptors import ClosingFilesMeter
from sandbox.runtimes.limits.kernel_memory import GroupUsage, SlabMeter, SlabUsage
from sandbox.runtimes.limits.memory_mappings import MappingMeter, SandboxProcesses
from sandbox.runtimes.limits.usage_limits import KernelUsage

CGROUP2_FILES = ("memory.max", "memory.swap.max", "pids.max", "cpu.max", "cgroup.procs", "cgroup.kill")
CGROUP1_FILES = {
    "memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.kmem.tcp.limit_in_bytes"),
    "pids": ("pids.max",),
    "cpu": ("cpu.cfs_period_us", "cpu.cfs_quota_us"),
    "cpuacct": (),
}


def _mountinfo(folder: Path, *mounts: tuple[str, Path, str]) -> Path:
    lines = [f"30 20 0:26 / {point} rw,nosuid shared:9 - {kind} {kind} rw,{options}" for kind, point, options in mounts]
    path = folder / "mountinfo"
    path.write_text("\n".join(["22 1 8:1 / / rw - ext4 /dev/sda1 rw", *lines, ""]))
    return path


def _own_cgroup(folder: Path, line: str) -> Path:
    path = folder / "own"
    path.write_text(f"{line}\n")
    return path


def _unified(folder: Path) -> tuple[Path, ControlGroup]:
    """Create a version 2 tree whose group already has its files."""
    root = folder / "unified"
    group = root / "sandbox" / "attempt"
    group.mkdir(parents=True)
    for directory in (root, root / "sandbox"):
        (directory / "cgroup.subtree_control").touch()
        (directory / "cgroup.procs").touch()
    for name in CGROUP2_FILES:
        (group / name).touch()
    return root, Hierarchies([root]).group("attempt")


class DropCachesHarness:
    """A control group with files of cgroup v1 or v2, on a machine with cached names of nonexistent files."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, reclaim_file: str) -> None:
        self._reclaim_file = directory / reclaim_file
        self._reclaim_file.write_text("")
        (directory / "memory.current").write_text("900000000\n")
        self._charge = directory / "memory.kmem.usage_in_bytes"
        self._monkeypatch = monkeypatch
        self._group = ControlGroup([directory])

    def drop(self, negative_dentries: int, kernel_bytes: int, negative_dentries_before: int = 100_000) -> str:
        self._monkeypatch.setattr(cgroups, "count_negative_dentries", lambda: negative_dentries)
        self._charge.write_text(f"{kernel_bytes}\n")
        self._group.reclaim_if_many_negative_dentries(negative_dentries_before)
        return self._reclaim_file.read_text()


@pytest.mark.parametrize(("reclaim_file", "written"), [("memory.force_empty", "0"), ("memory.reclaim", "900000000")])
def test_caches_with_many_negative_dentries_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reclaim_file: str, written: str
):
    harness = DropCachesHarness(tmp_path, monkeypatch, reclaim_file)
    assert harness.drop(5_000_000, 900_000_000) == written


def test_caches_with_few_negative_dentries_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    harness = DropCachesHarness(tmp_path, monkeypatch, "memory.force_empty")
    assert harness.drop(500_000, 900_000_000) == ""
    assert harness.drop(5_000_000, 20_000_000) == ""
    assert harness.drop(5_000_000, 900_000_000, negative_dentries_before=4_900_000) == ""


def test_caches_are_kept_if_the_kernel_cannot_drop_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    harness = DropCachesHarness(tmp_path, monkeypatch, "memory.force_empty")
    monkeypatch.setattr(ControlGroup, "_write", _refuse_write)
    assert harness.drop(5_000_000, 900_000_000) == ""
    ControlGroup([]).reclaim_if_many_negative_dentries(0)


def test_memory_charged_to_the_group_does_not_count_as_uncharged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cgroups, "count_machine_unreclaimable_bytes", lambda: 900_000_000)
    assert cgroups.count_kernel_bytes_outside_cgroup(ControlGroup([tmp_path])) is None
    (tmp_path / "memory.stat").write_text("anon 5\nkernel 200000000\n")
    assert cgroups.count_kernel_bytes_outside_cgroup(ControlGroup([tmp_path])) == 700_000_000
    (tmp_path / "memory.stat").write_text("anon 5\nkernel 200000000\nslab_reclaimable 150000000\n")
    assert cgroups.count_kernel_bytes_outside_cgroup(ControlGroup([tmp_path])) == 850_000_000
    monkeypatch.setattr(cgroups, "count_machine_unreclaimable_bytes", lambda: None)
    assert cgroups.count_kernel_bytes_outside_cgroup(ControlGroup([tmp_path])) is None


@pytest.mark.parametrize(("line", "reclaimable"), [("slab_reclaimable 150000000\n", 150_000_000), ("", 0)])
def test_reclaimable_part_of_the_charge_is_read(tmp_path: Path, line: str, reclaimable: int):
    (tmp_path / "memory.stat").write_text(f"anon 5\nkernel 200000000\n{line}")
    assert ControlGroup([tmp_path])._group_usage() == GroupUsage(200_000_000, reclaimable_bytes=reclaimable)


def _refuse_write(*_: object) -> bool:
    raise OSError(errno.EBUSY, "busy")


def test_cgroup_v2_limits_are_written(tmp_path: Path):
    root, group = _unified(tmp_path)
    group.create(cpus=3, memory_bytes=1 << 30, processes_max=99)
    group_directory = root / "sandbox" / "attempt"
    assert {name: (group_directory / name).read_text() for name in CGROUP2_FILES[:4]} == {
        "memory.max": str(1 << 30),
        "memory.swap.max": "0",
        "pids.max": "99",
        "cpu.max": "300000 100000",
    }
    assert group.limits() == {"memory", "cpus", "processes", "sockets"}


def test_cgroup_v2_has_no_socket_limit_with_nosocket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, group = _unified(tmp_path)
    line = tmp_path / "cmdline"
    monkeypatch.setattr(cgroups, "_KERNEL_COMMAND_LINE", line)
    for option, is_limited in (
        ("quiet", True),
        ("cgroup.memory=nokmem,nosocket quiet", False),
        ("cgroup.memory=nokmem", True),
    ):
        line.write_text(f"root=/dev/vda {option}\n")
        assert ("sockets" in group.limits()) == is_limited


def test_cgroup_v2_reports_socket_buffers_with_a_limit(tmp_path: Path):
    root, group = _unified(tmp_path)
    (root / "sandbox" / "attempt" / "memory.stat").write_text("anon 5\nsock 7340032\nshmem 9\n")
    usage = group.kernel_usage(os.getpid(), 1 << 30)
    assert (usage.buffer_bytes, usage.buffer_bytes_max) == (7 << 20, 128 << 20)


@pytest.mark.parametrize(
    ("memory_mib", "sockets", "is_bounded"),
    [(64, 8, True), (64, 9, False), (1024, 64, True), (1024, 65, False), (8192, 64, True), (8192, 65, False)],
)
def test_usage_of_sockets_that_may_receive_too_much_data_is_not_bounded_while_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_mib: int, sockets: int, is_bounded: bool
):
    """The gateway sends data while no program of the sandbox runs. With cgroup v2, the runner enforces the limit."""
    _, group = _unified(tmp_path)
    monkeypatch.setattr(cgroups.socket_memory, "count_sockets", lambda _pid: sockets)
    assert group.kernel_usage(os.getpid(), memory_mib << 20).is_bounded_while_idle is is_bounded


@pytest.mark.parametrize(("sockets", "is_bounded"), [(64, True), (65, False)])
def test_usage_of_few_sockets_is_bounded_while_idle_if_the_kernel_limits_their_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sockets: int, is_bounded: bool
):
    group = Hierarchies([tmp_path / "memory"]).group("attempt")
    monkeypatch.setattr(cgroups.socket_memory, "count_sockets", lambda _pid: sockets)
    assert group.kernel_usage(os.getpid(), 64 << 20).is_bounded_while_idle is is_bounded


@pytest.mark.parametrize(("grown_bytes", "is_bounded"), [(VMA_BYTES_MAX, True), (VMA_BYTES_MAX + 1, False)])
def test_usage_is_not_bounded_while_idle_if_mappings_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grown_bytes: int, is_bounded: bool
):
    monkeypatch.setattr(cgroups.socket_memory, "count_sockets", lambda _pid: 1)

    class FixedMeter(SlabMeter):
        def measure(self, *_: object) -> SlabUsage | None:
            return SlabUsage(0, 0, vma_bytes_upper_bound=grown_bytes)

    _, group = _unified(tmp_path)
    usage = group.kernel_usage(os.getpid(), 1 << 30, slab_meter=FixedMeter(lambda: None))
    assert usage.is_bounded_while_idle is is_bounded


@pytest.mark.parametrize(("memory_mib", "mib"), [(64, 16), (512, 64), (1024, 128), (8192, 256)])
def test_socket_buffer_limit_is_an_eighth_of_memory_within_bounds(memory_mib: int, mib: int):
    assert cgroups.socket_buffer_bytes_max(memory_mib << 20) == mib << 20


def test_cgroup_v2_controllers_are_enabled_from_the_root_downwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, group = _unified(tmp_path)
    written: list[tuple[str, str]] = []

    def refuse_cpu(path: Path, text: str) -> bool:
        if text == "+cpu":
            raise OSError(16, "busy")
        written.append((str(path.relative_to(root)), text))
        return True

    monkeypatch.setattr(cgroups, "_write", refuse_cpu)
    group.create(cpus=1, memory_bytes=1, processes_max=1)
    names = ("cgroup.subtree_control", "sandbox/cgroup.subtree_control")
    assert written[:4] == [(name, text) for name in names for text in ("+memory", "+pids")]


def test_cgroup_v2_kills_all_processes_with_one_write(tmp_path: Path):
    root, group = _unified(tmp_path)
    group.kill()
    assert (root / "sandbox" / "attempt" / "cgroup.kill").read_text() == "1"


def test_cgroup_v2_reports_oom_kills_and_stats(tmp_path: Path):
    root, group = _unified(tmp_path)
    group_directory = root / "sandbox" / "attempt"
    (group_directory / "memory.events").write_text("low 0\noom 1\noom_kill 0\noom_group_kill 7\n")
    assert not group.was_oom_killed()
    (group_directory / "memory.events").write_text("low 0\noom 1\noom_kill 2\noom_group_kill 0\n")
    assert group.was_oom_killed()
    assert group.kernel_usage(os.getpid(), 1 << 30).oom_kills == 2
    (group_directory / "memory.current").write_text("5000\n")
    (group_directory / "memory.stat").write_text("anon 1\ninactive_file 1000\n")
    (group_directory / "pids.current").write_text("4\n")
    (group_directory / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    assert group.stats() == Stats(cpu_seconds=2.5, memory_bytes=4000, processes=4, oom_kills=2)


def test_cgroup_v2_without_controllers_counts_only_processes(tmp_path: Path):
    group_directory = tmp_path / "sandbox" / "attempt"
    group_directory.mkdir(parents=True)
    (group_directory / "cgroup.procs").write_text("11\n12\n")
    group = ControlGroup([group_directory])
    group.create(cpus=1, memory_bytes=1, processes_max=1)
    assert group.limits() == frozenset()
    assert group.stats() == Stats(cpu_seconds=None, memory_bytes=None, processes=2)


def test_cgroup_v1_limits_are_written_in_each_hierarchy(tmp_path: Path):
    for controller, names in CGROUP1_FILES.items():
        directory = tmp_path / controller / "sandbox" / "attempt"
        directory.mkdir(parents=True)
        for name in (*names, "cgroup.procs"):
            (directory / name).touch()
    group = Hierarchies([tmp_path / controller for controller in CGROUP1_FILES]).group("attempt")
    group.create(cpus=2, memory_bytes=4096, processes_max=7)
    group.add(4711)
    written = {
        f"{controller}/{name}": (tmp_path / controller / "sandbox" / "attempt" / name).read_text()
        for controller, names in CGROUP1_FILES.items()
        for name in (*names, "cgroup.procs")
    }
    assert written == {
        "memory/memory.limit_in_bytes": "4096",
        "memory/memory.memsw.limit_in_bytes": "4096",
        "memory/memory.kmem.tcp.limit_in_bytes": str(16 << 20),
        "pids/pids.max": "7",
        "cpu/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "200000",
        **{f"{controller}/cgroup.procs": "4711" for controller in CGROUP1_FILES},
    }
    assert group.process_ids() == {4711}


@pytest.mark.parametrize(
    ("pressure_pages", "group_bytes"),
    [(2000, 16 << 20), (200_000, 100_000 // 8 * os.sysconf("SC_PAGE_SIZE")), (800_000, 128 << 20)],
)
def test_cgroup_v1_limits_socket_buffers_in_total_and_per_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pressure_pages: int, group_bytes: int
):
    """The total is half of the TCP pressure limit. Each sandbox can use an eighth of the total, within bounds."""
    for directory in (tmp_path / "memory" / "sandbox", tmp_path / "memory" / "sandbox" / "attempt"):
        directory.mkdir(parents=True)
        (directory / "memory.kmem.tcp.limit_in_bytes").touch()
    tcp_memory = tmp_path / "tcp_mem"
    tcp_memory.write_text(f"1000\t{pressure_pages}\t900000\n")
    monkeypatch.setattr(cgroups, "_TCP_MEM_SYSCTL", tcp_memory)
    group = Hierarchies([tmp_path / "memory"]).group("attempt")
    group.create(cpus=1, memory_bytes=1 << 30, processes_max=7)
    limit = tmp_path / "memory" / "sandbox" / "memory.kmem.tcp.limit_in_bytes"
    assert limit.read_text() == str(pressure_pages // 2 * os.sysconf("SC_PAGE_SIZE"))
    assert (limit.parent / "attempt" / limit.name).read_text() == str(group_bytes)
    assert group.limits() == {"sockets"}


def _write_group(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_slab_meter_gets_the_usage_of_the_group_and_of_its_siblings(tmp_path: Path, version: int):
    for name, kernel_bytes, cpu_seconds in (("attempt", 100, 3), ("neighbour", 700, 5)):
        if version == 1:
            _write_group(tmp_path / "memory/sandbox" / name, {"memory.kmem.usage_in_bytes": f"{kernel_bytes}\n"})
            _write_group(tmp_path / "cpuacct/sandbox" / name, {"cpuacct.usage": f"{cpu_seconds}000000000\n"})
        else:
            files = {
                "memory.stat": f"anon 5\nkernel {kernel_bytes}\n",
                "cpu.stat": f"usage_usec {cpu_seconds}000000\n",
            }
            _write_group(tmp_path / "unified/sandbox" / name, files)
    roots = [tmp_path / "memory", tmp_path / "cpuacct"] if version == 1 else [tmp_path / "unified"]
    seen = []

    class RecordingMeter(SlabMeter):
        def measure(
            self, usage: GroupUsage | None, usage_of_others: Callable[[], Mapping[str, GroupUsage]]
        ) -> SlabUsage | None:
            seen.append((usage, usage_of_others()))
            return None

    Hierarchies(roots).group("attempt").kernel_usage(os.getpid(), 1 << 30, slab_meter=RecordingMeter(lambda: None))
    assert seen == [(GroupUsage(100, 3.0), {"neighbour": GroupUsage(700, 5.0)})]


@pytest.mark.parametrize("kernel_file", ["memory.kmem.usage_in_bytes", "memory.stat"])
def test_mapping_meter_gets_the_processes_of_the_group_and_of_its_siblings(tmp_path: Path, kernel_file: str):
    for name, kernel_bytes in (("attempt", 100), ("neighbour", 700)):
        line = f"kernel {kernel_bytes}\n" if kernel_file == "memory.stat" else f"{kernel_bytes}\n"
        _write_group(tmp_path / "memory/sandbox" / name, {kernel_file: line, "cgroup.procs": f"{kernel_bytes + 1}\n"})
    slabs, seen = SlabUsage(0, 0, vma_bytes_upper_bound=1 << 40), []

    class FixedMeter(SlabMeter):
        def measure(
            self, usage: GroupUsage | None, usage_of_others: Callable[[], Mapping[str, GroupUsage]]
        ) -> SlabUsage | None:
            return slabs

    class RecordingMeter(MappingMeter):
        def measure(
            self,
            slabs: SlabUsage,
            process_ids: Callable[[], Collection[int]],
            sandboxes: Callable[[], Iterable[SandboxProcesses]],
        ) -> int:
            seen.append((slabs, process_ids(), sorted(sandboxes(), key=lambda sandbox: sandbox.kernel_bytes)))
            return 77

    group = Hierarchies([tmp_path / "memory"]).group("attempt")
    usage = group.kernel_usage(
        os.getpid(), 1 << 30, slab_meter=FixedMeter(lambda: slabs), mapping_meter=RecordingMeter()
    )
    assert usage.vma_bytes == 77
    assert seen == [(slabs, {101}, [SandboxProcesses({101}, 100), SandboxProcesses({701}, 700)])]


@pytest.mark.parametrize("name", ["tasks", "cgroup.threads"])
def test_meter_of_closing_files_gets_the_threads_of_the_group(tmp_path: Path, name: str):
    """The first thread of a process may have ended. The kernel does not list the process while its last thread ends."""
    _write_group(tmp_path / "memory/sandbox/attempt", {"cgroup.procs": "", name: "7\n8\n"})

    class RecordingMeter(ClosingFilesMeter):
        def measure(self, thread_ids: Callable[[], Collection[int]]) -> int | None:
            return sum(thread_ids())

    group = Hierarchies([tmp_path / "memory"]).group("attempt")
    assert group.kernel_usage(os.getpid(), 1 << 30, closing_files_meter=RecordingMeter()).closing_files_bytes == 7 + 8


def test_cgroup_v1_socket_limit_without_tcp_mem_is_a_share_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    group_directory = tmp_path / "memory" / "sandbox" / "attempt"
    group_directory.mkdir(parents=True)
    for directory in (group_directory, group_directory.parent):
        (directory / "memory.kmem.tcp.limit_in_bytes").touch()
    monkeypatch.setattr(cgroups, "_TCP_MEM_SYSCTL", tmp_path / "not there")
    Hierarchies([tmp_path / "memory"]).group("attempt").create(cpus=1, memory_bytes=1 << 30, processes_max=7)
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    bound = int((group_directory.parent / "memory.kmem.tcp.limit_in_bytes").read_text())
    assert memory_bytes // 33 <= bound <= memory_bytes // 32
    assert (group_directory / "memory.kmem.tcp.limit_in_bytes").read_text() == str(
        min(max(bound // 8, 16 << 20), 128 << 20)
    )


@pytest.mark.parametrize(("code", "is_refused"), [(errno.EBUSY, False), (errno.EIO, True)])
def test_cgroup_v1_ignores_ebusy_when_it_sets_the_socket_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, is_refused: bool
):
    group_directory = tmp_path / "memory" / "sandbox" / "attempt"
    group_directory.mkdir(parents=True)
    for name in CGROUP1_FILES["memory"]:
        (group_directory / name).touch()
    write = cgroups._write

    def refuse_sockets(path: Path, text: str) -> bool:
        if path.name.startswith("memory.kmem.tcp"):
            raise OSError(code, os.strerror(code))
        return write(path, text)

    monkeypatch.setattr(cgroups, "_write", refuse_sockets)
    group = Hierarchies([tmp_path / "memory"]).group("attempt")
    with pytest.raises(OSError, match=os.strerror(code)) if is_refused else nullcontext():
        group.create(cpus=1, memory_bytes=4096, processes_max=7)
    assert (group_directory / "memory.limit_in_bytes").read_text() == ("" if is_refused else "4096")


def test_cgroup_v1_reports_socket_buffers_without_a_limit(tmp_path: Path):
    (tmp_path / "memory.kmem.tcp.usage_in_bytes").write_text("8192\n")
    usage = ControlGroup([tmp_path]).kernel_usage(os.getpid(), 1 << 30)
    assert (usage.buffer_bytes, usage.buffer_bytes_max) == (8192, None)


def test_cgroup_v1_reports_oom_kills_and_stats(tmp_path: Path):
    memory, account = tmp_path / "memory", tmp_path / "cpuacct"
    for directory in (memory, account):
        directory.mkdir()
    (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    (memory / "memory.usage_in_bytes").write_text("900\n")
    (memory / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 400\n")
    (account / "cpuacct.usage").write_text("1500000000\n")
    group = ControlGroup([memory, account])
    assert group.was_oom_killed()
    assert group.kernel_usage(os.getpid(), 1 << 30).oom_kills == 1
    assert group.stats() == Stats(cpu_seconds=1.5, memory_bytes=500, processes=0, oom_kills=1)


@pytest.mark.parametrize(
    ("statistics", "expected"),
    [
        ("shmem 1\ntotal_shmem 4096\ntotal_shmem_other 7\n", (4096, 0)),  # v1
        ("shmem 7\ntotal_shmem 0\n", (0, 0)),
        ("anon 1\nkernel 500\nshmem 8192\nshmem_thp 7\n", (8192, 500)),  # v2
        ("", (0, 0)),
    ],
)
def test_unreclaimable_memory_is_read_from_the_statistics(tmp_path: Path, statistics: str, expected: tuple[int, int]):
    (tmp_path / "memory.stat").write_text(statistics)
    assert cgroups.read_shared_and_kernel_bytes(ControlGroup([tmp_path])) == expected


def test_removal_is_idempotent_and_reports_failure(tmp_path: Path):
    group_directory = tmp_path / "sandbox" / "attempt"
    (group_directory / "busy").mkdir(parents=True)
    group = ControlGroup([group_directory])
    assert not group.remove()
    (group_directory / "busy").rmdir()
    assert group.remove()
    assert group.remove()


def test_cgroup_v1_hierarchies_are_found(tmp_path: Path):
    points = [tmp_path / name for name in ("memory", "cpu,cpuacct", "freezer", "unified")]
    for point in points:
        point.mkdir()
        (point / "cgroup.procs").touch()
    mounts = [("cgroup", point, point.name) for point in points[:3]] + [("cgroup2", points[3], "nsdelegate")]
    hierarchies = cgroups.find_hierarchies(_mountinfo(tmp_path, *mounts), _own_cgroup(tmp_path, "0::/"))
    assert list(hierarchies.roots) == points[:2]


def test_cgroup_v2_uses_the_highest_writable_ancestor_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "unified"
    delegated = root / "user.slice" / "user@1000.service"
    own_group = delegated / "app.slice" / "server.scope"
    own_group.mkdir(parents=True)
    for directory in (root, root / "user.slice", delegated, delegated / "app.slice", own_group):
        (directory / "cgroup.procs").touch()
    monkeypatch.setattr(cgroups, "_is_writable", lambda directory: directory.is_relative_to(delegated))
    line = f"0::/{own_group.relative_to(root)}"
    hierarchies = cgroups.find_hierarchies(
        _mountinfo(tmp_path, ("cgroup2", root, "nsdelegate")), _own_cgroup(tmp_path, line)
    )
    assert list(hierarchies.roots) == [delegated]


def test_no_hierarchies_are_found_if_nothing_is_writable(tmp_path: Path):
    hierarchies = cgroups.find_hierarchies(_mountinfo(tmp_path), _own_cgroup(tmp_path, "0::/"))
    assert list(hierarchies.roots) == []
    assert hierarchies.group("attempt").limits() == frozenset()
    assert hierarchies.attempt_ids() == frozenset()


def test_attempt_ids_of_all_hierarchies_are_listed(tmp_path: Path):
    (tmp_path / "memory" / "sandbox" / "one").mkdir(parents=True)
    (tmp_path / "pids" / "sandbox" / "two").mkdir(parents=True)
    hierarchies = Hierarchies([tmp_path / "memory", tmp_path / "pids", tmp_path / "cpu"])
    assert hierarchies.attempt_ids() == {"one", "two"}


def test_control_group_line_is_parsed_back_and_other_paths_are_rejected():
    group = Hierarchies([Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/pids")]).group("attempt")
    assert cgroups.parse_control_group(cgroups.format_control_group(group)) == group
    assert cgroups.parse_control_group("") == ControlGroup([])
    for line in ("/sys/fs/cgroup/memory", "sandbox/attempt", "/sys/fs/cgroup/sandbox/../../etc"):
        with pytest.raises(ValueError, match="not the control group"):
            cgroups.parse_control_group(line)


def test_oom_kills_above_the_limit_are_a_violation():
    assert not KernelUsage().find_exceeded_limit()
    assert not KernelUsage(oom_kills=OOM_KILLS_MAX).find_exceeded_limit()
    assert "1001 times" in KernelUsage(oom_kills=OOM_KILLS_MAX + 1).find_exceeded_limit()


def test_creation_and_removal_of_other_groups_are_changes(tmp_path: Path):
    groups = [Hierarchies([tmp_path]).group(name) for name in ("own", "other")]
    own, other = groups
    own.create(cpus=1, memory_bytes=1, processes_max=1)
    alone = cgroups.read_sibling_stamp(own)
    assert alone is not None
    assert cgroups.read_sibling_stamp(own) == alone
    other.create(cpus=1, memory_bytes=1, processes_max=1)
    assert cgroups.read_sibling_stamp(own) is None
    shutil.rmtree(other.directories[0])
    assert cgroups.read_sibling_stamp(own) not in (None, alone)
    assert cgroups.read_sibling_stamp(ControlGroup([])) is None
    shutil.rmtree(own.directories[0].parent)
    assert cgroups.read_sibling_stamp(own) is None
