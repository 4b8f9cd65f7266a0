"""Runs a seccomp filter without a kernel: classic BPF over `struct seccomp_data`, as seccomp(2) describes it."""

import struct

ALLOW, TRAP, ERRNO = 0x7FFF0000, 0x00030000, 0x00050000
_INSTRUCTIONS_MAX = 4096


def run_filter(program: bytes, *, audit_arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """Return the action for a call, including the action's data. Fail if the kernel would reject the program."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=IIQ6Q", number, audit_arch, 0, *padded)
    instructions = list(struct.iter_unpack("=HBBI", program))
    assert 0 < len(instructions) <= _INSTRUCTIONS_MAX
    accumulator, position = 0, 0
    while True:
        code, when_true, when_false, value = instructions[position]
        position += 1
        match code:
            case 0x20:  # load a word
                assert value % 4 == 0
                (accumulator,) = struct.unpack_from("=I", data, value)
            case 0x54:  # and
                accumulator &= value
            case 0x05:  # jump
                position += value
            case 0x15:  # jump if equal
                position += when_true if accumulator == value else when_false
            case 0x25:  # jump if greater
                position += when_true if accumulator > value else when_false
            case 0x35:  # jump if greater or equal
                position += when_true if accumulator >= value else when_false
            case 0x45:  # jump if any bit is set
                position += when_true if accumulator & value else when_false
            case 0x06:  # return
                return int(value)
            case _:
                raise AssertionError(f"invalid filter instruction: {code:#x}")


def errno_of(action: int) -> int | None:
    """Return the errno that the action returns to the caller; None for any other kind of action."""
    return action & 0xFFFF if action & 0xFFFF0000 == ERRNO else None
