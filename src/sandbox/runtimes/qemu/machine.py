"""QEMU's and virtiofsd's command lines."""

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
from sandbox.runtimes.qemu.parts import QEMU

KERNEL = "/boot/vmlinuz"
"""In the cage."""

_MEBIBYTE = 1024 * 1024
GUEST_BYTES = 160 * _MEBIBYTE
"""Memory of the guest beside the command's: its kernel, its agent, what tmpfs holds."""

JAIL_BYTES = GUEST_BYTES + 384 * _MEBIBYTE
"""Memory of the host beside the command's: the same, and QEMU with its cache of translations, and virtiofsd."""

JAIL_TASKS = 160
"""Threads of QEMU and virtiofsd."""

_TB_CACHE_MEBIBYTES = 128
_CACHED_FILES_MAX = 500_000
_KERNEL_PARAMETERS = "root=share rootfstype=virtiofs rw init=/start console=ttyS0 loglevel=4 reboot=t panic=-1"
_EMULATED_KERNEL_PARAMETERS = (
    # The counter is the host's. A watchdog compares it with ticks, which come late on a busy host, and gives it up.
    "tsc=reliable",
    "nowatchdog",
    # What runs is QEMU's translation, which jumps and returns in a way of its own: these guards guard nothing there.
    "mitigations=off",
    # Tests of ciphers, signatures of modules that the host lays there, keys, and policies that nobody gives to a guest.
    "cryptomgr.notests",
    "initcall_blacklist=jent_mod_init,init_encrypted,load_system_certificate_list",
    "lsm=landlock,yama",
)
"""What a kernel leaves out that is emulated, for which each new path of its code is dear."""
_EMULATED_CPU = "max,-la57"
"""All that QEMU can, but for the fifth level of page tables, which every walk pays for."""


class Accelerator(StrEnum):
    """How the guest's instructions are carried out: by the processor, or by emulating it."""

    KVM = "kvm"
    TCG = "tcg"

    @property
    def device(self) -> str:
        """What QEMU must be given of it."""
        return "/dev/kvm" if self is Accelerator.KVM else "/dev/null"


class QemuDescriptors(NamedTuple):
    """Descriptors: the listening socket of virtiofsd, QEMU's connection to it, QEMU's end of the channel, KVM's device.

    The last is there in any case, opened or not, so that the numbers are always the same.
    """

    files_listener: int
    files_connection: int
    channel: int
    accelerator: int


def qemu_arguments(spec: SandboxSpec, accelerator: Accelerator, descriptors: QemuDescriptors) -> Sequence[str]:
    """For the one machine that every guest is."""
    mebibytes = -(-(spec.memory_bytes + GUEST_BYTES) // _MEBIBYTE)
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
        # Its user network dials from the network namespace that QEMU is in, where nothing but the gateway is.
        *("-netdev", "user,id=net,ipv6=off", "-device", "virtio-net-pci,netdev=net,romfile="),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
    ]


def virtiofsd_arguments(program: str, directory: str, descriptors: QemuDescriptors) -> Sequence[str]:
    """Nothing but the guest changes the files as long as it lives, so that it may keep what it knows of them.

    virtiofsd is confined by the cage: it has one uid and no capability, so it need not make a sandbox of its own.
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
    """How many files a guest may keep in mind: virtiofsd holds each of them open, and another half is for what it opens
    before the guest has looked again."""
    _, open_files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        _CACHED_FILES_MAX if open_files_max == resource.RLIM_INFINITY else min(open_files_max // 2, _CACHED_FILES_MAX)
    )


def _accelerator_arguments(accelerator: Accelerator, descriptors: QemuDescriptors) -> Sequence[str]:
    if accelerator is Accelerator.KVM:
        # Opened by root, because the uid that QEMU has must not be able to.
        return ("-add-fd", f"fd={descriptors.accelerator},set=1", "-accel", "kvm,device=/dev/fdset/1", "-cpu", "host")
    return ("-accel", f"tcg,thread=multi,tb-size={_TB_CACHE_MEBIBYTES}", "-cpu", _EMULATED_CPU)


def _kernel_command_line(accelerator: Accelerator) -> str:
    """The kernel cannot find out how fast an emulated processor counts, and often waits for ever when it tries."""

    if accelerator is Accelerator.KVM:
        return _KERNEL_PARAMETERS
    return " ".join((_KERNEL_PARAMETERS, *_EMULATED_KERNEL_PARAMETERS, f"tsc_early_khz={measure_tsc_khz()}"))


_RDTSC_CODE = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
_MEASURE_SECONDS = 0.02


@cache
def measure_tsc_khz() -> int:
    """Measured, because /proc tells how fast the processor is at the moment. Raises OSError."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_RDTSC_CODE)
        code = ctypes.c_char.from_buffer(page)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))
        started_at, first = time.perf_counter_ns(), read()
        time.sleep(_MEASURE_SECONDS)
        ended, last = time.perf_counter_ns(), read()
        del code, read
    return int((last - first) * 1_000_000 / (ended - started_at))
