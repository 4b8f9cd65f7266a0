"""A runtime that makes no sandboxes and fails on demand."""

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.contracts.runtime import Command, Exit, Listeners, Probe, Sandbox, SandboxHandle, SandboxSpec, Stats
from sandbox.model.errors import AttemptError, FailureCode


@dataclass
class LyingRuntime:
    """Its one command says `output` and `errors`, then ends with `exit_code`.

    start_error: `start` raises. dies_silently: the sandbox goes without an exit code. never_ready: `create` does not
    return. never_ends: the command runs until it is killed. slow_stop_seconds: how long it outlives TERM and KILL.
    """

    output: bytes = b""
    errors: bytes = b""
    exit_code: int = 0
    start_error: bool = False
    dies_silently: bool = False
    never_ready: bool = False
    never_ends: bool = False
    slow_stop_seconds: float = 0.0
    name: str = "lying"
    commands: list[Command] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    alive: dict[str, "LyingSandbox"] = field(default_factory=dict)

    async def probe(self) -> Probe:
        return Probe(self.name, works=True, tier="none", strength=0)

    def plan(self, attempt_id: str) -> SandboxHandle:
        return SandboxHandle(self.name, attempt_id)

    async def create(self, handle: SandboxHandle, spec: SandboxSpec) -> Sandbox:
        if self.never_ready:
            await asyncio.Event().wait()
        for name in ("workspace", "home", "tmp"):
            (spec.disk / name).mkdir(exist_ok=True)
        made = LyingSandbox(self, handle)
        self.alive[handle.attempt_id] = made
        return made

    async def destroy(self, handle: SandboxHandle, disk: Path) -> None:
        made = self.alive.get(handle.attempt_id)
        if made is not None:
            await made.kill()
            await made.wait()
            made.close()
            self.alive.pop(handle.attempt_id, None)

    def leftovers(self) -> Sequence[str]:
        return sorted(self.alive)


class LyingSandbox:
    """Made by LyingRuntime.create."""

    def __init__(self, liar: LyingRuntime, handle: SandboxHandle) -> None:
        self.handle = handle
        self.listeners = _open_listeners()
        self._liar = liar
        self._end: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._readers: list[asyncio.StreamReader] = []

    async def start(self, command: Command) -> tuple[asyncio.StreamReader, asyncio.StreamReader]:
        if self._liar.start_error:
            raise AttemptError(FailureCode.PROVISION_FAILED, "The sandbox would not start.")
        self._liar.commands.append(command)
        self._readers = [asyncio.StreamReader(), asyncio.StreamReader()]
        for reader, said in zip(self._readers, (self._liar.output, self._liar.errors), strict=True):
            reader.feed_data(said)
        if self._liar.dies_silently:
            self._finish(None)
        elif not self._liar.never_ends:
            self._finish(self._liar.exit_code)
        return self._readers[0], self._readers[1]

    async def signal(self, signal_number: int) -> None:
        self._liar.signals.append(signal_number)
        self._finish_later(128 + signal_number)

    async def kill(self) -> None:
        self._finish_later(137)

    async def wait(self) -> Exit:
        return await asyncio.shield(self._end)

    async def stats(self) -> Stats:
        return Stats(None, None, None)

    def close(self) -> None:
        doors = self.listeners
        for one in (doors.model, doors.proxy, doors.names_udp, doors.names_tcp, *doors.transparent.values()):
            one.close()

    def _finish_later(self, code: int) -> None:
        asyncio.get_running_loop().call_later(self._liar.slow_stop_seconds, self._finish, code)

    def _finish(self, code: int | None) -> None:
        if not self._end.done():
            self._end.set_result(Exit(code))
            for reader in self._readers:
                reader.feed_eof()


def _open_listeners() -> Listeners:
    model, proxy, names_tcp, web, tls = (socket.create_server(("127.0.0.1", 0)) for _ in range(5))
    names_udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names_udp.bind(("127.0.0.1", 0))
    for one in (model, proxy, names_udp, names_tcp, web, tls):
        one.setblocking(False)
    return Listeners(model, proxy, names_udp, names_tcp, {80: web, 443: tls})
