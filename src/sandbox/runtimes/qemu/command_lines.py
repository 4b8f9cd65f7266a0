"""Command lines of QEMU and virtiofsd."""

import ctypes
import mmap
import os
import resource
import time
from collections.abc import Sequence
from enum import StrEnum
from functools import cache
from typing import NamedTuple

from sandbox.interfaces.runtime import SandboxSpec
from sandbox.runtimes.qemu.guest_components import QEMU

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
