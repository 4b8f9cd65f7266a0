"""Wires one runner: `python -m sandbox.wiring.runner --lock-fd=N`, its order on standard input.

Imports nothing of the server's, so that a runner starts fast and stays small.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sandbox.agent.claude_code import ClaudeCode
from sandbox.contracts.layout import runner_socket
from sandbox.contracts.placement import LaunchOrder
from sandbox.contracts.recorder import Recorder, read_task
from sandbox.contracts.redaction import Redaction
from sandbox.contracts.subject import ATTEMPT_ID, TASK_ID
from sandbox.disks.loop import LoopDisks
from sandbox.disks.mounts import hide_mounts
from sandbox.disks.plain import PlainDisks
from sandbox.gateway.serve import SocketGateways
from sandbox.journal.journals import FileJournals
from sandbox.model.limits import LAUNCH_SECONDS
from sandbox.profiles.catalog import HeldImages
from sandbox.runner.control_socket import listening
from sandbox.runner.equipment import Attempt, Equipment
from sandbox.runner.life import AttemptLife
from sandbox.runner.redacted import redact_event
from sandbox.wiring.clock import SystemClock
from sandbox.wiring.log import FORMAT_VARIABLE, LEVEL_VARIABLE, begin_log
from sandbox.wiring.private_directory import make_private
from sandbox.wiring.runtime import make_runtime
from sandbox.workspace.workspaces import GitWorkspaces

_log = logging.getLogger("sandbox.runner")  # this module is called __main__


def main() -> None:
    """Carry out, or finish, the attempt of the order."""
    # Its default action ends the process, which frees the journal's lock, whatever the process is stuck in.
    signal.alarm(int(LAUNCH_SECONDS))
    os.umask(0o077)
    log = begin_log(os.environ.get(FORMAT_VARIABLE, "text"), os.environ.get(LEVEL_VARIABLE, "info"))
    lock_fd = int(sys.argv[1].removeprefix("--lock-fd="))
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=LaunchOrder)
    TASK_ID.set(order.task_id)
    ATTEMPT_ID.set(order.attempt_id)
    if (redaction := _redaction(order.secrets)) is not None:
        log.redact = redaction.redact_text
    if order.disks == "loop":
        hide_mounts()
    asyncio.run(_live(order, lock_fd, redaction))


async def _live(order: LaunchOrder, lock_fd: int, redaction: Redaction | None) -> None:
    attempt = wire_attempt(order, lock_fd, redaction)
    signal.alarm(0)
    # A cleaner of temporary files may have been there since the server began.
    run_dir = Path(order.run_dir)
    make_private(run_dir.parent)
    make_private(run_dir)
    life = AttemptLife(attempt)
    async with listening(runner_socket(run_dir, order.attempt_id), life.cancel, life.terminals):
        _log.info("A dead runner's attempt is finished" if order.finish else "The attempt begins")
        await (life.finish() if order.finish else life.carry_out())
    _log.info("The attempt has ended", extra={"state": attempt.task.state})
    attempt.recorder.writer.close()


def wire_attempt(order: LaunchOrder, lock_fd: int, redaction: Redaction | None) -> Attempt:
    """Take the journal over and gather the equipment."""
    data_dir = Path(order.data_dir)
    clock = SystemClock()
    journals = FileJournals(data_dir)
    writer = journals.adopt(order.task_id, lock_fd)
    recorder = Recorder(writer, read_task(journals, order.task_id).task, clock.now)
    equipment = Equipment(
        journals=journals,
        disks=LoopDisks() if order.disks == "loop" else PlainDisks(),
        images=HeldImages(data_dir),
        runtime=make_runtime(order.runtime, Path(order.run_dir)),
        gateways=SocketGateways(),
        agent=ClaudeCode(Path(order.agent_program)),
        workspaces=GitWorkspaces(os.environ, follow_redirects=order.follow_redirects),
        clock=clock,
    )
    if redaction is not None:
        recorder.revise = lambda event: redact_event(event, redaction)
    return Attempt(
        order.attempt_id, data_dir, order.upstream, recorder, equipment, order.secrets, redaction, order.image
    )


def _redaction(secrets: Mapping[str, str]) -> Redaction | None:
    """Most tasks have no secrets, and their runners stay without what finds them."""
    if not secrets:
        return None
    from sandbox.secrets.redactor import Redactor

    return Redactor(secrets)


if __name__ == "__main__":
    main()
