"""Runs a KVM guest with a few instructions: `kvm_selftest.py [INSTRUCTIONS IN HEX]`.

Exit code 0: the guest finished. Killed by SIGPROF: the guest was too slow. Any other result: the guest could not be
created, or stopped for another reason. In some virtual machines, KVM takes a microsecond per instruction, which is too
slow for any kernel to boot.
The numbers are those of the kernel's interface (Documentation/virt/kvm/api.rst), for x86_64.
"""

import ctypes
import fcntl
import mmap
import os
import signal
import struct
import sys

SELFTEST_CPU_SECONDS = 0.5
"""CPU time limit: thirty times the duration on a CPU that executes the loop directly."""

_COUNTDOWN_CODE = bytes.fromhex("b900000001 49 75fd f4")  # mov ecx, 1 << 24; dec ecx; jnz; hlt
_MEMORY_BYTES, _CODE_ADDRESS = 0x10000, 0x1000
_CREATE_VM, _MAPPED_BYTES, _CREATE_VCPU, _RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
_SET_MEMORY, _GET_SYSTEM, _SET_SYSTEM, _SET_REGISTERS = 0x4020AE46, 0x8138AE83, 0x4138AE84, 0x4090AE82
_SYSTEM_BYTES, _REGISTERS_BYTES = 312, 144
_SEGMENT, _CODE, _DATA, _DATA_SEGMENTS = struct.Struct("=QIH10B"), 0xB, 0x3, range(1, 6)
_CONTROL, _PROTECTED = 224, 1
_PROGRAM_COUNTER, _FLAGS, _RESET_FLAGS = 16 * 8, 17 * 8, 2
_EXIT_REASON, _HALTED = 8, 5


def main(instructions: bytes) -> int:
    """Run the instructions in a guest. Raises OSError."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SELFTEST_CPU_SECONDS)
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
    memory = mmap.mmap(-1, _MEMORY_BYTES)
    memory[_CODE_ADDRESS : _CODE_ADDRESS + len(instructions)] = instructions
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, _SET_MEMORY, struct.pack("IIQQQ", 0, 0, 0, _MEMORY_BYTES, address))
    vcpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
    state = mmap.mmap(vcpu, fcntl.ioctl(kvm, _MAPPED_BYTES, 0))
    system = bytearray(_SYSTEM_BYTES)
    fcntl.ioctl(vcpu, _GET_SYSTEM, system)
    _set_protected_mode(system)
    fcntl.ioctl(vcpu, _SET_SYSTEM, system)
    registers = bytearray(_REGISTERS_BYTES)
    struct.pack_into("Q", registers, _PROGRAM_COUNTER, _CODE_ADDRESS)
    struct.pack_into("Q", registers, _FLAGS, _RESET_FLAGS)
    fcntl.ioctl(vcpu, _SET_REGISTERS, registers)
    fcntl.ioctl(vcpu, _RUN, 0)
    (reason,) = struct.unpack_from("I", state, _EXIT_REASON)
    return 0 if reason == _HALTED else 1


def _set_protected_mode(system: bytearray) -> None:
    """Enter protected mode with all memory in each segment. Every version of KVM executes such code on the CPU."""
    for index, selector, kind in [(0, 8, _CODE), *((index, 16, _DATA) for index in _DATA_SEGMENTS)]:
        _SEGMENT.pack_into(system, index * _SEGMENT.size, 0, 0xFFFFFFFF, selector, kind, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    (control,) = struct.unpack_from("Q", system, _CONTROL)
    struct.pack_into("Q", system, _CONTROL, control | _PROTECTED)


if __name__ == "__main__":
    sys.exit(main(bytes.fromhex(sys.argv[1]) if len(sys.argv) > 1 else _COUNTDOWN_CODE))
