"""What runsc writes about a sandbox: its state file, seen through the launcher's private mounts, and its log."""

from pathlib import Path

import msgspec

from sandbox.model.decoding import DECODE_ERRORS
from sandbox.runtimes.gvisor.bundle import STATE

_OF_A_LOST_PROCESS = ("input/output error", "eof", "broken pipe", "connection reset by peer")


class _Kernel(msgspec.Struct):
    pid: int = 0


class State(msgspec.Struct):
    """Of runsc's state file; `sandbox` is the process that is the sandbox's kernel."""

    status: str = ""
    sandbox: _Kernel = msgspec.field(default_factory=_Kernel)

    @property
    def is_running(self) -> bool:
        """The command has begun."""
        return self.status == "running" and self.sandbox.pid > 0


class _Message(msgspec.Struct):
    msg: str = ""
    level: str = ""


def read_state(runsc_pid: int, attempt_id: str) -> State:
    """As it is now; empty as long as there is none, or it is being written, or runsc has gone."""
    path = Path(f"/proc/{runsc_pid}/root{STATE}/{attempt_id}_sandbox:{attempt_id}.state")
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, *DECODE_ERRORS):
        return State()


def is_of_a_lost_process(error: str) -> bool:
    """Whether runsc broke off because another of gVisor's processes had gone: somebody ended that one."""
    return error.casefold().endswith(_OF_A_LOST_PROCESS)


def last_error(log: bytes) -> str:
    """The last error in a log of JSON lines; empty when there is none."""
    found = ""
    for line in log.splitlines():
        try:
            message = msgspec.json.decode(line, type=_Message)
        except DECODE_ERRORS:
            continue
        if message.level == "error":
            found = message.msg
    return found
