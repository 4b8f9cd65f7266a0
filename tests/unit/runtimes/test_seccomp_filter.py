"""The filter is run here on a small interpreter, so that both processors' tables are tried on either."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.runtimes import seccomp

ALLOW, KILL = 0x7FFF0000, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
UNSHARE = {"x86_64": 272, "aarch64": 97}
SOCKET = {"x86_64": 41, "aarch64": 198}
IOCTL = {"x86_64": 16, "aarch64": 29}
PERSONALITY = {"x86_64": 135, "aarch64": 92}
PTRACE = {"x86_64": 101, "aarch64": 117}
READ = {"x86_64": 0, "aarch64": 63}
EXECVE = {"x86_64": 59, "aarch64": 221}
IO_SETUP = {"x86_64": 206, "aarch64": 0}
IO_DESTROY = {"x86_64": 207, "aarch64": 1}
machines = pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)


def judge(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the kernel would do: ALLOW, KILL or an errno."""
    given = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, AUDIT[machine] if audit is None else audit, 0, *given)
    program = list(struct.iter_unpack("=HBBI", seccomp.assemble_filter(machine)))
    accumulator, at = 0, 0
    while True:
        code, when_true, when_false, value = program[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return value & 0xFFFF if value >> 16 == 5 else value
        else:
            holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x45: bool(accumulator & value)}[code]
            at += when_true if holds else when_false


@machines
def test_ordinary_calls_pass(machine: str):
    for number in (READ[machine], EXECVE[machine]):
        assert judge(machine, number, 1, 2, 3) == ALLOW


@machines
def test_another_processors_calls_kill(machine: str):
    other = next(audit for name, audit in AUDIT.items() if name != machine)
    assert judge(machine, READ[machine], audit=other) == KILL
    assert judge(machine, READ[machine], audit=0x40000003) == KILL  # 32-bit x86


@machines
@pytest.mark.parametrize("number", [425, 426, 427, 435, 463, 500, 0x40000000, 0x40000000 + 59, 0xFFFFFFFF])
def test_what_has_another_way_or_is_unknown_does_not_exist(machine: str, number: int):
    assert judge(machine, number) == errno.ENOSYS


@machines
def test_no_context_of_aio_is_made_because_the_machine_has_so_many_for_all(machine: str):
    assert judge(machine, IO_SETUP[machine], 1, 0x1000) == errno.ENOSYS
    assert judge(machine, IO_DESTROY[machine], 0x1000) == ALLOW
    other = next(number for name, number in IO_SETUP.items() if name != machine)
    assert judge(machine, other, 3, 0x1000, 8) == ALLOW  # sendto on aarch64, read on x86_64


@machines
def test_denied_calls_are_refused(machine: str):
    table = {**seccomp.ARCHITECTURES[machine].denied, "mount_setattr": 442, "pidfd_getfd": 438}
    assert {judge(machine, number) for number in table.values()} == {errno.EPERM}
    assert judge(machine, PTRACE[machine]) == errno.EPERM


@machines
@given(number=st.integers(0, 462))
def test_every_known_call_is_either_allowed_or_in_a_table(machine: str, number: int):
    architecture = seccomp.ARCHITECTURES[machine]
    absent = {425, 426, 427, 435, IO_SETUP[machine]}
    refused = {*architecture.denied.values(), *range(428, 434), 438, 442, 443, 450, *absent}
    harmless = {architecture.socket: 1}.get(number, 0)
    assert (judge(machine, number, harmless) == ALLOW) == (number not in refused)


@machines
@pytest.mark.parametrize("flag", [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000])
def test_no_new_namespace(machine: str, flag: int):
    assert judge(machine, CLONE[machine], flag | 17) == errno.EPERM
    assert judge(machine, UNSHARE[machine], flag) == errno.EPERM


@machines
def test_threads_and_processes_can_be_made(machine: str):
    assert judge(machine, CLONE[machine], 0x3D0F00) == ALLOW  # a thread of the C library
    assert judge(machine, CLONE[machine], 0x1200011) == ALLOW  # a fork of it
    assert judge(machine, UNSHARE[machine], 0x400) == ALLOW
    assert judge(machine, UNSHARE[machine], 0x80) == errno.EPERM  # a new time namespace


@machines
def test_socket_families(machine: str):
    passed = {family for family in range(64) if judge(machine, SOCKET[machine], family, 1, 0) == ALLOW}
    assert passed == {1, 2, 10, 16}
    assert judge(machine, SOCKET[machine], 16, 3, 12) == errno.EPROTONOSUPPORT
    assert judge(machine, SOCKET[machine], 2, 1, 6) == ALLOW
    assert judge(machine, SOCKET[machine], 17, 3, 0) == errno.EAFNOSUPPORT


@machines
def test_high_halves_of_arguments_do_not_matter(machine: str):
    assert judge(machine, SOCKET[machine], (1 << 32) | 17, 3, 0) == errno.EAFNOSUPPORT
    assert judge(machine, IOCTL[machine], 0, (7 << 32) | 0x5412) == errno.EPERM


@machines
def test_terminals(machine: str):
    assert [judge(machine, IOCTL[machine], 0, request) for request in (0x5412, 0x541C)] == [errno.EPERM] * 2
    assert judge(machine, IOCTL[machine], 0, 0x5413) == ALLOW


@machines
def test_personalities(machine: str):
    assert judge(machine, PERSONALITY[machine], 0xFFFFFFFF) == ALLOW
    assert judge(machine, PERSONALITY[machine], 0x0040000) == errno.EPERM  # no address randomisation


def test_an_unknown_processor_has_no_filter():
    with pytest.raises(KeyError):
        seccomp.assemble_filter("riscv64")
