"""Makes connections to the gateway's ports on the guest's 127.0.0.1 reach the host, where the gateway listens.

A small BPF program in the guest's kernel changes the address when a process of the control group connects.
"""

import _socket
import ctypes
import os
import struct
from _collections_abc import Sequence

_BPF = 321
_PROG_LOAD, _PROG_ATTACH = 5, 8
_PROG_TYPE_CGROUP_SOCK_ADDR, _ATTACH_INET4_CONNECT = 18, 10
_LOAD_WORD, _STORE_WORD, _JUMP_UNEQUAL, _JUMP_EQUAL, _JUMP = 0x61, 0x63, 0x55, 0x15, 0x05
_SET, _EXIT = 0xB7, 0x95
_IP_OFFSET, _PORT_OFFSET = 4, 24  # in struct bpf_sock_addr, both in network order
_ATTRIBUTES_BYTES = 120


def attach(group: str, ports: Sequence[int], target: str) -> None:
    """Attach the program to a control group, for all its processes. Raises OSError."""
    program = assemble(ports, target)
    instructions, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"GPL")
    addresses = ctypes.addressof(instructions), ctypes.addressof(licence)
    # Program type, count, instructions, license; zeros for the log; at offset 68 the attach type.
    load = struct.pack("IIQQ", _PROG_TYPE_CGROUP_SOCK_ADDR, len(program) // 8, *addresses).ljust(68, b"\0")
    loaded = _bpf(_PROG_LOAD, load + struct.pack("I", _ATTACH_INET4_CONNECT))
    directory = os.open(group, os.O_RDONLY)
    _bpf(_PROG_ATTACH, struct.pack("IIII", directory, loaded, _ATTACH_INET4_CONNECT, 0))
    os.close(directory)
    os.close(loaded)


def assemble(ports: Sequence[int], target: str) -> bytes:
    """Assemble a program that allows all connections, and replaces 127.0.0.1 with `target` in those to `ports`."""
    address, loopback = _address_number(target), _address_number("127.0.0.1")
    tests = [
        _instruction(_JUMP_EQUAL, 3, 0, len(ports) - index, _socket.htons(port)) for index, port in enumerate(ports)
    ]
    rewrite = [_instruction(_SET, 2, 0, 0, address), _instruction(_STORE_WORD, 1, 2, _IP_OFFSET, 0)]
    program = [
        _instruction(_LOAD_WORD, 2, 1, _IP_OFFSET, 0),
        _instruction(_JUMP_UNEQUAL, 2, 0, len(tests) + 2 + len(rewrite), loopback),
        _instruction(_LOAD_WORD, 3, 1, _PORT_OFFSET, 0),
        *tests,
        _instruction(_JUMP, 0, 0, len(rewrite), 0),
        *rewrite,
        _instruction(_SET, 0, 0, 0, 1),
        _instruction(_EXIT, 0, 0, 0, 0),
    ]
    return b"".join(program)


def _instruction(code: int, target: int, source: int, offset: int, value: int) -> bytes:
    return struct.pack("=BBhi", code, target | source << 4, offset, value)


def _address_number(address: str) -> int:
    return int.from_bytes(_socket.inet_aton(address), "little")


def _bpf(command: int, attributes: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES)
    result = int(libc.syscall(_BPF, command, buffer, _ATTRIBUTES_BYTES))
    if result < 0:
        raise OSError(ctypes.get_errno(), "bpf")
    return result
