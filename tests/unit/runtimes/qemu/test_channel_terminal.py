"""The host's end of a terminal in a guest. Frames from the guest are untrusted."""

from sandbox.interfaces.runtime import TerminalSize
from sandbox.runtimes.qemu.channel import Channel, QemuTerminal
from sandbox.runtimes.qemu.guest import frames

NUMBER = frames.FIRST_TERMINAL_STREAM


class RecordingChannel(Channel):
    """A channel that records the kinds of the frames that it sends."""

    def __init__(self) -> None:
        super().__init__(lambda *_: False)
        self.kinds: list[bytes] = []

    def send(self, kind: bytes, number: int, body: bytes = b"") -> None:
        self.kinds.append(kind)


async def hang_up_after(*kinds: bytes) -> list[bytes]:
    """Return the frames that the host sends for a terminal with unread output, after these frames from the guest."""
    channel = RecordingChannel()
    terminal = QemuTerminal(channel, NUMBER)
    for _ in range(20):
        terminal.handle_frame(frames.DATA, bytes(32 * 1024))
    for kind in kinds:
        terminal.handle_frame(kind, frames.EXIT_BODY.pack(0, False) if kind == frames.EXIT else b"")
    assert terminal.has_ended == ({*kinds} == {frames.EXIT, frames.CLOSED})
    await terminal.output.readexactly(20 * 32 * 1024)
    await terminal.resize(TerminalSize(24, 80))
    await terminal.hang_up()
    return channel.kinds


async def test_no_frames_are_sent_after_a_terminal_ends_because_its_number_may_be_reused():
    assert await hang_up_after(frames.EXIT, frames.CLOSED) == [frames.PAUSE]
    assert await hang_up_after(frames.CLOSED, frames.EXIT) == [frames.PAUSE]


async def test_open_terminal_is_resumed_and_resized_and_hung_up():
    expected = [frames.PAUSE, frames.RESUME, frames.RESIZE, frames.HANG_UP]
    assert await hang_up_after() == expected
    assert await hang_up_after(frames.EXIT) == expected


async def test_reason_for_a_failed_start_is_truncated():
    terminal = QemuTerminal(RecordingChannel(), NUMBER)
    terminal.handle_frame(frames.FAILED, b"no more terminals" + b"!" * 60_000)
    reason = await terminal.start_result
    assert reason.startswith("no more terminals")
    assert len(reason) < 1000
