"""The streams of a guest's commands."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from sandbox.runtimes.qemu.guest import frames
from sandbox.runtimes.qemu.guest.streams import Streams

FIRST_TERMINAL_NUMBER = frames.FIRST_TERMINAL_STREAM


@pytest.fixture
def open_streams() -> Iterator[Callable[[int], Streams]]:
    """Return a function that opens streams with these numbers and unread output."""
    with ExitStack() as inner_ends:

        def open_all(*numbers: int) -> Streams:
            streams = Streams(lambda kind, number, body: None)
            for number in numbers:
                agent_end, inner_end = socket.socketpair()
                inner_ends.enter_context(inner_end).sendall(b"unread")
                inner_ends.callback(streams.close, number)
                streams.add(number, agent_end.detach())
            return streams

        yield open_all


def test_paused_terminal_does_not_delay_the_exit_of_the_command(open_streams):
    streams = open_streams(frames.STDOUT_STREAM, FIRST_TERMINAL_NUMBER)
    streams.pause(FIRST_TERMINAL_NUMBER)
    assert not streams.are_complete()
    streams.close(frames.STDOUT_STREAM)
    assert streams.are_complete()


def test_exit_waits_for_a_terminal_that_the_host_reads(open_streams):
    streams = open_streams(FIRST_TERMINAL_NUMBER, FIRST_TERMINAL_NUMBER + 1)
    streams.pause(FIRST_TERMINAL_NUMBER)
    streams.pause(FIRST_TERMINAL_NUMBER + 1)
    streams.resume(FIRST_TERMINAL_NUMBER + 1)
    assert not streams.are_complete()
    streams.close(FIRST_TERMINAL_NUMBER + 1)
    assert streams.are_complete()


@pytest.mark.parametrize("number", [frames.STDOUT_STREAM, frames.STDERR_STREAM])
def test_exit_waits_for_paused_output_of_the_command(open_streams, number):
    streams = open_streams(number)
    streams.pause(number)
    assert not streams.are_complete()


def test_number_of_a_paused_terminal_can_be_used_again(open_streams):
    streams = open_streams(FIRST_TERMINAL_NUMBER)
    streams.pause(FIRST_TERMINAL_NUMBER)
    assert not [*streams.poll_events(can_send=True)]
    streams.close(FIRST_TERMINAL_NUMBER)
    agent_end, inner_end = socket.socketpair()
    with inner_end:
        streams.add(FIRST_TERMINAL_NUMBER, agent_end.detach())
        assert [*streams.poll_events(can_send=True)]
