"""Command lines of QEMU, virtiofsd, and the jail around both: bubblewrap.

Code that breaks out of the guest is confined like a sandbox of the bubblewrap runtime: no privileges, no network except
the gateway's, and no files other than the guest's. The guest's root is SHARE_DIRECTORY, which contains the tools that
the guest agent needs. _COMMAND_ROOT under it is the root that the command sees.

The disk is a single mount, which the guest agent mounts at the directories of the command. If the jail had separate
mounts of the disk's directories, the kernel would check all parents of a directory at each `..` in a path, without
interruption (`path_connected` in fs/namei.c).
"""

import ctypes
import mmap
import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import msgspec

from sandbox.interfaces.gateway import MODEL_PORT, PROXY_PORT
from sandbox.interfaces.runtime import SandboxSpec
from sandbox.model.fixed_limits import SOCKETS_MAX
from sandbox.runtimes import bubblewrap_confinement, sandbox_filesystem, seccomp_filter
from sandbox.runtimes.launcher_client import ProgramSpec, create_memfd
from sandbox.runtimes.programs import inherited_limits, launcher
from sandbox.runtimes.qemu.guest_components import (
    GUEST_AGENT_PATH,
    QEMU,
    GuestComponents,
    build_start_script,
    compile_guest_agent,
)
from sandbox.runtimes.sandbox_filesystem import DISK_DIRECTORIES

KERNEL = "/boot/vmlinuz"
"""Path of the guest's kernel in the jail."""

_MEBIBYTE = 1024 * 1024
GUEST_OVERHEAD_BYTES = 160 * _MEBIBYTE
"""Memory of the guest in addition to the command's: the kernel, the guest agent, and the content of tmpfs."""

JAIL_OVERHEAD_BYTES = GUEST_OVERHEAD_BYTES + 384 * _MEBIBYTE
"""Host memory in addition to the command's: GUEST_OVERHEAD_BYTES, QEMU with its translation cache, and virtiofsd."""

JAIL_THREADS = 160
"""Maximum total number of threads of QEMU and virtiofsd."""

_TB_CACHE_MEBIBYTES = 128
_CACHED_FILES_MAX = 500_000
_KERNEL_PARAMETERS = "root=share rootfstype=virtiofs rw init=/start console=ttyS0 loglevel=4 reboot=t panic=-1"
_EMULATED_KERNEL_PARAMETERS = (
    # The TSC is the host's. A watchdog would compare it with timer ticks, which are late on a busy host, and reject it.
    "tsc=reliable",
    "nowatchdog",
    # Mitigations for speculative execution have no effect in code that QEMU translates; the host's stay active.
    "mitigations=off",
    # Skip cipher self-tests, module-signing keys (the host provides the modules) and unused security modules.
    "cryptomgr.notests",
    "initcall_blacklist=jent_mod_init,init_encrypted,load_system_certificate_list",
    "lsm=landlock,yama",
)
"""Parameters that save work in an emulated kernel, where each new code path is expensive."""
_EMULATED_CPU = "max,-la57"
"""All features of QEMU's CPU except five-level page tables, which make every page walk slower."""


class Accelerator(StrEnum):
    """How the guest's instructions are executed: by the CPU or by emulation."""

    KVM = "kvm"
    TCG = "tcg"

    @property
    def device(self) -> str:
        """Path of the device that QEMU needs."""
        return "/dev/kvm" if self is Accelerator.KVM else "/dev/null"


class QemuDescriptors(NamedTuple):
    """Descriptors: virtiofsd's listening socket, QEMU's connection to it, QEMU's end of the channel, KVM's device.

    The last one is always present, even if it is /dev/null, to keep the numbers the same.
    """

    files_listener: int
    files_connection: int
    channel: int
    accelerator: int


def qemu_arguments(spec: SandboxSpec, accelerator: Accelerator, descriptors: QemuDescriptors) -> Sequence[str]:
    """Return QEMU's argv. All guests have the same machine type."""
    mebibytes = -(-(spec.memory_bytes + GUEST_OVERHEAD_BYTES) // _MEBIBYTE)
    return [
        *(
            QEMU,
            "-M",
            "microvm,pcie=on,acpi=on,rtc=on,memory-backend=mem",
            *_accelerator_arguments(accelerator, descriptors),
        ),
        *("-smp", str(min(spec.cpus, os.cpu_count() or 1)), "-m", str(mebibytes)),
        *("-object", f"memory-backend-memfd,id=mem,size={mebibytes}M,share=on"),
        *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-monitor", "none", "-serial", "stdio"),
        *("-kernel", KERNEL, "-append", _kernel_command_line(accelerator)),
        *(
            "-chardev",
            f"socket,id=files,fd={descriptors.files_connection}",
            "-device",
            "vhost-user-fs-pci,chardev=files,tag=share",
        ),
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={descriptors.channel}"),
        *("-device", "virtserialport,chardev=agent,name=agent"),
        # The user network dials from QEMU's network namespace, in which only the gateway listens.
        *("-netdev", "user,id=net,ipv6=off", "-device", "virtio-net-pci,netdev=net,romfile="),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
    ]


def virtiofsd_arguments(program: str, directory: str, descriptors: QemuDescriptors) -> Sequence[str]:
    """Return virtiofsd's argv.

    Only the guest changes the files while it runs, so virtiofsd may cache everything. The jail confines virtiofsd to
    one uid without capabilities, so it needs no sandbox.
    """
    return [
        *(
            program,
            f"--fd={descriptors.files_listener}",
            f"--shared-dir={directory}",
            "--sandbox=none",
            "--cache=always",
        ),
        *("--inode-file-handles=never", "--log-level=error"),
    ]


def cached_files_max() -> int:
    """Return how many files a guest may cache.

    virtiofsd keeps each of them open. Half of virtiofsd's limit is left for files that it opens before the guest checks
    its cache again.
    """
    _, open_files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        _CACHED_FILES_MAX if open_files_max == resource.RLIM_INFINITY else min(open_files_max // 2, _CACHED_FILES_MAX)
    )


def _accelerator_arguments(accelerator: Accelerator, descriptors: QemuDescriptors) -> Sequence[str]:
    if accelerator is Accelerator.KVM:
        # Root opens the device, because QEMU's uid must not be able to open it.
        return ("-add-fd", f"fd={descriptors.accelerator},set=1", "-accel", "kvm,device=/dev/fdset/1", "-cpu", "host")
    return ("-accel", f"tcg,thread=multi,tb-size={_TB_CACHE_MEBIBYTES}", "-cpu", _EMULATED_CPU)


def _kernel_command_line(accelerator: Accelerator) -> str:
    """Return the kernel parameters. An emulated kernel gets the TSC frequency, because measuring it often hangs."""

    if accelerator is Accelerator.KVM:
        return _KERNEL_PARAMETERS
    return " ".join((_KERNEL_PARAMETERS, *_EMULATED_KERNEL_PARAMETERS, f"tsc_early_khz={measure_tsc_khz()}"))


_RDTSC_CODE = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
_MEASURE_SECONDS = 0.02


@cache
def measure_tsc_khz() -> int:
    """Measure the TSC frequency, because /proc shows only the current CPU frequency. Raises OSError."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_RDTSC_CODE)
        code = ctypes.c_char.from_buffer(page)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))
        started_at, first = time.perf_counter_ns(), read()
        time.sleep(_MEASURE_SECONDS)
        ended, last = time.perf_counter_ns(), read()
        del code, read
    return int((last - first) * 1_000_000 / (ended - started_at))


SHARE_DIRECTORY = "/share"
_COMMAND_ROOT = f"{SHARE_DIRECTORY}/inside"
_DISK = "disk"
_JAIL_SCRIPT = """
import ctypes, os, resource, struct, sys
listener, files, channel, accelerator, filter, files_max, count = map(int, sys.argv[1:8])
qemu, virtiofsd = sys.argv[8:8 + count], sys.argv[8 + count:]
text = os.read(filter, 65536)
code = ctypes.create_string_buffer(text, len(text))
def execute(arguments, *others):
    for one in (*others, filter):
        os.close(one)
    # PR_SET_SECCOMP, SECCOMP_MODE_FILTER, struct sock_fprog
    if ctypes.CDLL(None).prctl(22, 2, struct.pack("HxxxxxxP", len(text) // 8, ctypes.addressof(code)), 0, 0) == 0:
        os.execv(arguments[0], arguments)
    os._exit(1)
if os.fork() == 0:
    limit = min(files_max, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    execute(qemu, listener)
execute(virtiofsd, files, channel, accelerator)
"""
"""Starts QEMU and virtiofsd. Each inherits only the descriptors that it needs, and a seccomp filter that prevents it
from starting processes.

virtiofsd exits when QEMU exits, and the jail when virtiofsd exits. Their limits on open files differ: QEMU needs one
file for each connection of the guest, and virtiofsd one for each file that the guest caches.
"""

QEMU_FILES_MAX = SOCKETS_MAX + 1024
"""Maximum number of open files of QEMU: one for each connection of the guest, and some for itself.

With KVM, code in QEMU can create a kernel thread for each open file, and a file in transit in a socket is not counted.
"""

_GUEST_ROOT_DIRECTORIES = ("/dev", "/disk", "/modules", "/proc", "/programs", "/run", "/sys", "/tmp")  # noqa: S108


class GuestSpec(msgspec.Struct, frozen=True):
    """Describes one guest.

    execute_only_programs: programs that can be executed but not read. run_dir: a private directory.
    slow_reason: why the guest is slower than necessary (human-readable); None if it is not.
    """

    spec: SandboxSpec
    components: GuestComponents
    execute_only_programs: Mapping[Path, str]
    accelerator: Accelerator
    run_dir: Path
    slow_reason: str | None = None


def exposed_paths(guest_spec: GuestSpec) -> dict[str, Path]:
    """Return the host paths to expose, keyed by their names under the launcher's EXPOSED_DIRECTORY."""
    paths = _disk_paths(guest_spec.spec.disk)
    parts = sandbox_filesystem.describe_rootfs(guest_spec.spec).mounts
    paths.update(
        {f"part-{index}": path for index, path in enumerate(parts) if path not in guest_spec.execute_only_programs}
    )
    paths.update({f"module-{index}": path for index, path in enumerate(guest_spec.components.modules)})
    if guest_spec.spec.image is not None:
        paths["image"] = guest_spec.spec.image
    return {**paths, "kernel": guest_spec.components.kernel, "python": guest_spec.components.python}


def _disk_paths(disk: Path) -> dict[str, Path]:
    """Return the disk or, for a plain directory, its subdirectories: only its owner can enter the directory itself."""
    return {_DISK: disk} if os.path.ismount(disk) else {f"{_DISK}/{name}": disk / name for name in DISK_DIRECTORIES}


def exposed_program_entries(guest_spec: GuestSpec) -> list[tuple[str, str, str]]:
    """Return entries that expose the execute-only programs so that virtiofsd can read them."""
    return [("program", f"hidden-{index}", str(path)) for index, path in enumerate(guest_spec.execute_only_programs)]


def build_program_spec(
    program: str, guest_spec: GuestSpec, descriptors: QemuDescriptors, status_fd: int
) -> ProgramSpec:
    """Build the argv and descriptors of one boot.

    status_fd: descriptor for bubblewrap's reports. Ownership of it and of `descriptors` passes to the result.
    """

    def describe(program_spec: ProgramSpec) -> tuple[Iterator[str], Sequence[str]]:
        numbers = QemuDescriptors(*(int(program_spec.add_descriptor(one)) for one in descriptors))
        status = program_spec.add_descriptor(status_fd)
        thread_filter = create_memfd("filter", seccomp_filter.assemble_thread_filter(os.uname().machine))
        filter_number = program_spec.add_descriptor(thread_filter)
        qemu = qemu_arguments(guest_spec.spec, guest_spec.accelerator, numbers)
        virtiofsd = virtiofsd_arguments(guest_spec.components.virtiofsd, SHARE_DIRECTORY, numbers)
        interpreter = str(guest_spec.components.interpreter)
        counts = (*numbers, filter_number, QEMU_FILES_MAX, len(qemu))
        words = (interpreter, "-ISE", "-c", _JAIL_SCRIPT, *map(str, counts), *qemu, *virtiofsd)
        return _bwrap_arguments(program_spec, guest_spec, status), words

    return bubblewrap_confinement.build_program_spec(program, guest_spec.spec.attempt_id, describe)


def _bwrap_arguments(program_spec: ProgramSpec, guest_spec: GuestSpec, status: str) -> Iterator[str]:
    # QEMU and virtiofsd install seccomp filters for themselves, so they may add some. Programs in the guest cannot:
    # their calls reach the guest's kernel.
    machine = os.uname().machine
    guest_filter = seccomp_filter.assemble_filter(machine, allows_filters=True)
    jail_filter = seccomp_filter.assemble_filter(
        machine,
        allows_filters=True,
        allows_kvm=guest_spec.accelerator is Accelerator.KVM,
        polled_files_max=seccomp_filter.POLLED_FILES_OF_QEMU_MAX,
    )
    yield from bubblewrap_confinement.isolation_arguments(guest_spec.spec.attempt_id)
    yield from ("--json-status-fd", status)
    yield from bubblewrap_confinement.seccomp_arguments(program_spec, jail_filter)
    yield from _host_program_arguments(guest_spec, "")
    yield from (
        *bubblewrap_confinement.PROC_ARGUMENTS,
        *bubblewrap_confinement.READ_ONLY_PROC_ARGUMENTS,
        *bubblewrap_confinement.DEVICE_ARGUMENTS_WITHOUT_TERMINALS,
    )
    yield from ("--ro-bind", f"{launcher.EXPOSED_DIRECTORY}/kernel", KERNEL)
    yield from _guest_root_arguments(program_spec, guest_spec, guest_filter)
    yield from _command_root_arguments(program_spec, guest_spec)
    yield from ("--remount-ro", "/", "--chdir", "/", "--clearenv")


def _host_program_arguments(guest_spec: GuestSpec, root: str) -> Iterator[str]:
    yield from _usr_arguments(root)
    if not guest_spec.components.python.is_relative_to("/usr"):
        yield from ("--ro-bind", f"{launcher.EXPOSED_DIRECTORY}/python", f"{root}{guest_spec.components.python}")


def _usr_arguments(root: str) -> Iterator[str]:
    yield from ("--ro-bind", "/usr", f"{root}/usr")
    for link, target in sandbox_filesystem.HOST_LINKS.items():
        yield from ("--symlink", target, f"{root}{link}")
    for path in sandbox_filesystem.HOST_PATHS:
        yield from ("--ro-bind-try", path, f"{root}{path}")


def _guest_root_arguments(program_spec: ProgramSpec, guest_spec: GuestSpec, filter_: bytes) -> Iterator[str]:
    yield from ("--dir", SHARE_DIRECTORY)
    yield from _host_program_arguments(guest_spec, SHARE_DIRECTORY)
    for directory in _GUEST_ROOT_DIRECTORIES:
        yield from ("--perms", "0755", "--dir", f"{SHARE_DIRECTORY}{directory}")
    for name in _disk_paths(guest_spec.spec.disk):
        yield from ("--bind", f"{launcher.EXPOSED_DIRECTORY}/{name}", f"{SHARE_DIRECTORY}/{name}")
    for index, path in enumerate(guest_spec.components.modules):
        suffix = "".join(path.suffixes[-2:] if path.suffix == ".xz" else path.suffixes[-1:])
        yield from (
            "--ro-bind",
            f"{launcher.EXPOSED_DIRECTORY}/module-{index}",
            f"{SHARE_DIRECTORY}/modules/{index}{suffix}",
        )
    for index in range(len(guest_spec.execute_only_programs)):
        yield from ("--ro-bind", f"{launcher.EXPOSED_DIRECTORY}/hidden-{index}", f"{SHARE_DIRECTORY}/programs/{index}")
    files = {
        "/start": build_start_script(guest_spec.components.interpreter),
        GUEST_AGENT_PATH: compile_guest_agent(),
        "/filter": filter_,
        "/settings": _encode_settings(guest_spec),
    }
    for target, content in files.items():
        number = program_spec.add_descriptor(create_memfd(target.strip("/"), content))
        yield from ("--perms", "0755", "--file", number, f"{SHARE_DIRECTORY}{target}")


def _encode_settings(guest_spec: GuestSpec) -> bytes:
    spec = guest_spec.spec
    numbers = (spec.memory_bytes, spec.processes_max, spec.memory_bytes // 2)
    ports = f"{MODEL_PORT},{PROXY_PORT}"
    files = (cached_files_max(), inherited_limits.OPEN_FILES_SOFT_MAX, inherited_limits.OPEN_FILES_MAX)
    arguments = (
        spec.attempt_id,
        *map(str, numbers),
        ports,
        *map(str, files),
        *guest_spec.execute_only_programs.values(),
    )
    return "\0".join(arguments).encode(errors="surrogateescape")


def _command_root_arguments(program_spec: ProgramSpec, guest_spec: GuestSpec) -> Iterator[str]:
    root = sandbox_filesystem.describe_rootfs(guest_spec.spec)
    if root.image is not None:
        yield from ("--ro-bind", f"{launcher.EXPOSED_DIRECTORY}/image", _COMMAND_ROOT)
    for mount_path in root.tmpfs_mounts:
        yield from ("--perms", "0755", "--tmpfs", f"{_COMMAND_ROOT}{mount_path}")
    for directory in (*root.directories, *(() if root.image else ("", "/dev", "/proc"))):
        yield from ("--perms", "0755", "--dir", f"{_COMMAND_ROOT}{directory}")
    for link, target in root.links.items():
        yield from ("--symlink", target, f"{_COMMAND_ROOT}{link}")
    for path in root.host_paths:
        yield from ("--ro-bind-try", path, f"{_COMMAND_ROOT}{path}")
    for sandbox_path in DISK_DIRECTORIES.values() if root.image is None else ():
        yield from ("--perms", "0755", "--dir", f"{_COMMAND_ROOT}{sandbox_path}")
    yield from _file_arguments(program_spec, guest_spec, root)
    for mount_path in root.tmpfs_mounts:
        yield from ("--remount-ro", f"{_COMMAND_ROOT}{mount_path}")


def _file_arguments(
    program_spec: ProgramSpec, guest_spec: GuestSpec, root: sandbox_filesystem.RootFsSpec
) -> Iterator[str]:
    option = "--file" if root.image is None else "--ro-bind-data"
    for path, content in root.files.items():
        number = program_spec.add_descriptor(create_memfd(PurePosixPath(path).name, content))
        yield from ("--perms", "0644", option, number, f"{_COMMAND_ROOT}{path}")
    for index, (part, sandbox_path) in enumerate(root.mounts.items()):
        if part in guest_spec.execute_only_programs:
            # This file is only a mount point: the guest mounts the program there without read permission.
            yield from (
                "--perms",
                "0755",
                "--file",
                program_spec.add_descriptor(create_memfd("place", b"")),
                _COMMAND_ROOT + sandbox_path,
            )
        else:
            yield from ("--ro-bind", f"{launcher.EXPOSED_DIRECTORY}/part-{index}", f"{_COMMAND_ROOT}{sandbox_path}")
