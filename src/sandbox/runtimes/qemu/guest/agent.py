"""The guest's first process. Executes the requests that arrive on the serial port and reports their results."""

import fcntl
import os
import select
import struct
import termios
import time
from _collections_abc import Callable

from . import commands, frames, guest_setup
from .streams import Streams, create_output_pairs

_signal = __import__("_signal")  # built in, and unknown to type checkers

_PORT_NAME = "agent"
_PORTS = "/sys/class/virtio-ports"
_SETTINGS = "/settings"
_READ_BYTES = 32 * 1024
_OUTBOX_BYTES_MAX = 256 * 1024
_POWER_OFF = 0x4321FEDC
_POLL_MILLISECONDS = 1000
_CACHED_FILES_INDEX = 5
"""Index, in the settings, of the maximum number of cached files."""

_TIOCGPTN, _TIOCSPTLCK = 0x80045430, 0x40045431


class GuestAgent:
    """The event loop. Handles events of the port, the output, the terminal input and the processes."""

    def __init__(self, port: int, init_pid: int, cached_files_max: int) -> None:
        self._port = port
        self._cached_files_max = cached_files_max
        self._init_pid = init_pid
        self._inbox = b""
        self._outbox = bytearray()
        self._streams = Streams(self._send)
        self._processes: dict[int, int] = {}
        self._watched: dict[int, tuple[int, int]] = {os.pidfd_open(init_pid): (-1, init_pid)}
        self._command_code: int | None = None
        self._handlers: dict[bytes, Callable[[int, bytes], None]] = {
            frames.START: self._start,
            frames.INPUT: self._streams.write_input,
            frames.RESIZE: self._resize,
            frames.HANG_UP: lambda number, _: self._streams.close(number),
            frames.SIGNAL: self._signal,
            frames.PAUSE: lambda number, _: self._streams.pause(number),
            frames.RESUME: lambda number, _: self._streams.resume(number),
            frames.GET_STATS: lambda _, __: self._send(frames.STATS, 0, _encode_stats()),
        }

    def run(self) -> None:
        """Serve forever; the host ends the guest."""
        self._send(frames.READY, 0)
        dropped_at = time.monotonic()
        while True:
            poll = select.poll()
            poll.register(self._port, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            for descriptor in self._watched:
                poll.register(descriptor, select.POLLIN)
            for descriptor, events in self._streams.poll_events(can_send=len(self._outbox) < _OUTBOX_BYTES_MAX):
                poll.register(descriptor, events)
            for descriptor, events in poll.poll(_POLL_MILLISECONDS):
                self._handle_event(descriptor, events)
            self._report_exit_if_done()
            if time.monotonic() > dropped_at + _POLL_MILLISECONDS / 1000:
                guest_setup.drop_file_caches(self._cached_files_max)
                dropped_at = time.monotonic()

    def _handle_event(self, descriptor: int, events: int) -> None:
        if descriptor in self._watched:
            self._reap(descriptor)
        elif descriptor != self._port:
            self._streams.handle_events(descriptor, events)
        else:
            if events & select.POLLOUT:
                self._flush()
            if events & select.POLLIN:
                self._read_port()

    def _read_port(self) -> None:
        self._inbox += os.read(self._port, _READ_BYTES)
        while len(self._inbox) >= frames.HEADER.size:
            kind, number, length = frames.HEADER.unpack_from(self._inbox)
            end = frames.HEADER.size + length
            if len(self._inbox) < end:
                return
            body, self._inbox = self._inbox[frames.HEADER.size : end], self._inbox[end:]
            self._handlers[kind](number[0], body)

    def _send(self, kind: bytes, number: int, body: bytes = b"") -> None:
        self._outbox += frames.pack(kind, number, body)

    def _flush(self) -> None:
        try:  # noqa: SIM105  # contextlib would take time to load
            del self._outbox[: os.write(self._port, self._outbox[:_READ_BYTES])]
        except BlockingIOError:
            pass

    def _start(self, number: int, body: bytes) -> None:
        command, rest = frames.unpack_three_string_lists(body)
        try:
            if number == frames.COMMAND_STREAM:
                self._start_command(command, rest)
            else:
                self._start_terminal(number, command, rest)
        except OSError as error:
            self._send(frames.FAILED, number, str(error).encode())

    def _start_command(self, command: list[list[bytes]], stdin: bytes) -> None:
        stdin_file = os.memfd_create("stdin")
        os.write(stdin_file, stdin)
        os.lseek(stdin_file, 0, os.SEEK_SET)
        (output, output_inside), (errors, errors_inside) = create_output_pairs()
        self._track_process(
            frames.COMMAND_STREAM, commands.start_command(command, (stdin_file, output_inside, errors_inside), None)
        )
        for descriptor in (stdin_file, output_inside, errors_inside):
            os.close(descriptor)
        self._streams.add(frames.STDOUT_STREAM, output)
        self._streams.add(frames.STDERR_STREAM, errors)

    def _start_terminal(self, number: int, command: list[list[bytes]], size: bytes) -> None:
        master_fd = os.open(f"{guest_setup.COMMAND_ROOT}/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        fcntl.ioctl(master_fd, _TIOCSPTLCK, struct.pack("i", 0))
        (name,) = struct.unpack("i", fcntl.ioctl(master_fd, _TIOCGPTN, bytes(4)))
        inner = f"{guest_setup.COMMAND_ROOT}/dev/pts/{name}"
        os.chown(inner, commands.UID, commands.UID)
        self._streams.add(number, master_fd)
        self._resize(number, size)
        # Keep the slave open until the command has opened it. Otherwise, reading from the master would fail.
        inner_fd = os.open(inner, os.O_RDWR | os.O_NOCTTY)
        self._track_process(number, commands.start_command(command, (inner_fd, inner_fd, inner_fd), inner))
        os.close(inner_fd)

    def _track_process(self, number: int, process: tuple[int, str]) -> None:
        pid, reason = process
        self._processes[number] = pid
        self._watched[os.pidfd_open(pid)] = (number, pid)
        self._send(frames.FAILED if reason else frames.READY, number, reason.encode()[:4096])

    def _resize(self, number: int, size: bytes) -> None:
        master_fd = self._streams.descriptor(number)
        if master_fd is not None:
            rows, columns = frames.SIZE_BODY.unpack(size)
            fcntl.ioctl(master_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _signal(self, number: int, body: bytes) -> None:
        if number in self._processes:
            os.kill(self._processes[number], body[0])

    def _reap(self, descriptor: int) -> None:
        number, pid = self._watched.pop(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        if number < 0:
            return
        del self._processes[number]
        code = os.waitstatus_to_exitcode(status)
        code = code if code >= 0 else 128 - code
        if number == frames.COMMAND_STREAM:
            self._command_code = code
            os.kill(self._init_pid, _signal.SIGKILL)
        else:
            self._send(frames.EXIT, number, _encode_exit(code))

    def _report_exit_if_done(self) -> None:
        """Report the command's exit when all other processes inside have ended and all output is queued.

        The output of a terminal whose client reads nothing is not waited for.
        """
        if self._command_code is not None and not self._watched and self._streams.are_complete():
            self._send(frames.EXIT, frames.COMMAND_STREAM, _encode_exit(self._command_code))
            self._command_code = None


def _encode_exit(code: int) -> bytes:
    return frames.EXIT_BODY.pack(code, code != 0 and _read_number("memory.events", "oom_kill ") > 0)


def _encode_stats() -> bytes:
    used = max(0, _read_number("memory.current") - _read_number("memory.stat", "inactive_file "))
    counts = (
        _read_number("pids.current"),
        _read_number("memory.events", "oom_kill "),
        _read_number("pids.events", "max "),
    )
    return frames.STATS_BODY.pack(used, *counts)


def _read_number(name: str, key: str = "") -> int:
    text = guest_setup.read(f"{guest_setup.COMMAND_CGROUP}/{name}")
    line = next((line for line in text.splitlines() if line.startswith(key)), "")
    return int(line.removeprefix(key) or 0)


def _open_port() -> int:
    for name in os.listdir(_PORTS):  # noqa: PTH208
        if guest_setup.read(f"{_PORTS}/{name}/name").strip() == _PORT_NAME:
            return os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    raise OSError(0, "the host provides no port for the agent")


def main() -> None:
    """Prepare the guest and serve. If this fails, write the error to the console and power off."""
    try:
        settings = guest_setup.read(_SETTINGS).split("\0")
        guest_setup.prepare(settings)
        first = commands.start_init()
        GuestAgent(_open_port(), first, int(settings[_CACHED_FILES_INDEX])).run()
    except BaseException as error:
        console = os.open("/dev/console", os.O_WRONLY)
        os.write(console, f"agent: {error!r}\n".encode())
    finally:
        guest_setup.libc.reboot(_POWER_OFF)
