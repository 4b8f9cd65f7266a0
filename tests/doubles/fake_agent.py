"""A fake Claude Code that prints the given lines with pauses and causes almost no load.

It is a program of a few hundred bytes without libraries, so the load of a hundred tasks comes from Sandbox alone. Like
Claude Code, it takes the session id from its arguments and prints it in its first and last line. Prepend the directory
that `make_fake_agent` returns to the server's PYTHONPATH.
"""

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest

SESSION = "00000000-0000-4000-8000-0000000000aa"
_OPTION = b"--session-id\0"
_BASE, _HEADER_BYTES, _WRITE, _NANOSLEEP, _EXECUTE, _EXIT = 0x400000, 64 + 56, 1, 35, 59, 60

INIT = {"type": "system", "subtype": "init", "session_id": SESSION, "tools": [], "mcp_servers": []}
RESULT = {
    "type": "result",
    "subtype": "success",
    "is_error": False,
    "result": "Done.",
    "session_id": SESSION,
    "num_turns": 1,
}


def make_fake_agent(directory: Path, timed_lines: Iterable[tuple[str, float]]) -> Path:
    """Make an agent that prints each line, waits for the line's number of seconds, and finally reports success."""
    return _install(directory, _program([(json.dumps(INIT), 0.0), *timed_lines, (json.dumps(RESULT), 0.0)]))


def make_python_fake_agent(directory: Path, program: str) -> Path:
    """Make an agent that runs the Python program at this path in the sandbox, with Claude Code's arguments."""
    words = (b"/usr/bin/python3\0", program.encode() + b"\0")
    size = len(_exec_python(0, 0)) + len(_exit())
    python = _BASE + _HEADER_BYTES + size
    return _install(directory, _elf(_exec_python(python, python + len(words[0])) + _exit(), b"".join(words)))


def _install(directory: Path, program: bytes) -> Path:
    if os.uname().machine != "x86_64":
        pytest.skip("the fake agent needs x86_64")
    bundled = directory / "claude_agent_sdk" / "_bundled"
    bundled.mkdir(parents=True)
    (bundled.parent / "__init__.py").touch()
    (bundled / "claude.version").write_text("0.0.0 (fake)\n")
    (bundled / "claude").write_bytes(program)
    (bundled / "claude").chmod(0o755)
    return directory


def _program(timed_lines: Iterable[tuple[str, float]]) -> bytes:
    messages = [(line.encode() + b"\n", seconds) for line, seconds in timed_lines]
    size = len(_copy_session_id(0, 0)) + sum(len(_print(0, 0)) + len(_wait(0)) for _ in messages) + len(_exit())
    address, code, data = _BASE + _HEADER_BYTES + size, b"", b""
    for line, seconds in messages:
        whole_seconds = int(seconds)
        pause = struct.pack("<QQ", whole_seconds, int((seconds - whole_seconds) * 1e9))
        code += _print(address + len(data), len(line)) + _wait(address + len(data) + len(line))
        data += line + pause
    name = SESSION.encode()
    code = _copy_session_id(address + data.index(name), address + data.rindex(name)) + code + _exit()
    return _elf(code, data)


def _elf(code: bytes, data: bytes) -> bytes:
    """Return an ELF file with one segment that contains the header, the code and the data."""
    total = _HEADER_BYTES + len(code) + len(data)
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<16sHHIQQQIHHHHHH", identity, 2, 62, 1, _BASE + _HEADER_BYTES, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, _BASE, _BASE, total, total, 0x1000)
    return header + segment + code + data


def _exec_python(python: int, program: int) -> bytes:
    """Replace the argument count and argument 0 on the stack with Python and the program, and execute Python."""
    environment = b"\x48\x8b\x0c\x24\x48\x8d\x54\xcc\x10"
    arguments = b"\x48\xc7\x04\x24" + struct.pack("<I", python) + b"\x48\xc7\x44\x24\x08" + struct.pack("<I", program)
    return environment + arguments + b"\x48\x89\xe6" + struct.pack("<BIBI", 0xBF, python, 0xB8, _EXECUTE) + b"\x0f\x05"


def _copy_session_id(*addresses: int) -> bytes:
    """Find the value of the session option, and copy it to each address."""
    seek = b"\x48\x89\xe3\x48\x83\xc3\x08"  # rbx: the arguments
    compare_option = b"\x48\x8b\x33\x48\x83\xc3\x08\x48\x8b\x06\x48\xba" + _OPTION[:8] + b"\x48\x39\xd0"
    compare_option += b"\x75" + struct.pack("b", -len(compare_option) - 2)
    compare_option += b"\x81\x7e\x08" + _OPTION[8:12]
    compare_option += b"\x75" + struct.pack("b", -len(compare_option) - 2)
    copies = [
        b"\x48\x8b\x33" + struct.pack("<BIBI", 0xBF, address, 0xB9, len(SESSION)) + b"\xf3\xa4" for address in addresses
    ]
    return seek + compare_option + b"".join(copies)


def _print(address: int, size: int) -> bytes:
    return struct.pack("<BIBIBIBI", 0xB8, _WRITE, 0xBF, 1, 0xBE, address, 0xBA, size) + b"\x0f\x05"


def _wait(address: int) -> bytes:
    return struct.pack("<BIBI", 0xB8, _NANOSLEEP, 0xBF, address) + b"\x31\xf6\x0f\x05"


def _exit() -> bytes:
    return struct.pack("<BI", 0xB8, _EXIT) + b"\x31\xff\x0f\x05"
