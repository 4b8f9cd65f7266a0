"""The terminals of a sandbox: the agent's own, which many may look at and one types into, and shells."""

import asyncio
import contextlib
from collections.abc import Container, Coroutine, Mapping
from typing import Any

import msgspec

from sandbox.interfaces.layout import HOME
from sandbox.interfaces.placement import TerminalOrder
from sandbox.interfaces.runtime import Command, Exit, Sandbox, Terminal, TerminalSize
from sandbox.interfaces.secrets import Redaction
from sandbox.interfaces.terminals import (
    Ended,
    FromClient,
    FromRunner,
    Resized,
    Role,
    Shown,
    TerminalRefusedError,
    Typed,
    pack,
    read_frame,
)
from sandbox.model.errors import AttemptError
from sandbox.model.limits import (
    OUTPUT_DRAIN_SECONDS,
    TERMINAL_BEHIND_BYTES_MAX,
    TERMINAL_REPLAY_BYTES,
    TERMINAL_TYPING_SECONDS,
    TERMINALS_MAX,
)
from sandbox.runner.agent_output import redacted_chunks
from sandbox.system.cpu_throttle import CpuQueue

SHELL = ("/bin/bash",)
_SIZE_MAX = 1000
_decoder: "msgspec.msgpack.Decoder[FromClient]" = msgspec.msgpack.Decoder(FromClient)


class Client:
    """One client on the control socket."""

    def __init__(self, order: TerminalOrder, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.size = TerminalSize(order.rows, order.columns)
        self.looks_on = order.looks_on
        self._reader = reader
        self._writer = writer

    def send(self, frame: FromRunner) -> None:
        """At once, for what may not wait. A client that is too far behind is let go: it can come back."""
        if self._writer.is_closing():
            return
        self._writer.write(pack(frame))
        if self._writer.transport.get_write_buffer_size() > TERMINAL_BEHIND_BYTES_MAX:
            self._writer.transport.abort()

    async def send_slowly(self, frame: FromRunner) -> None:
        """When the client has taken what came before."""
        self._writer.write(pack(frame))
        await self._writer.drain()

    async def serve(self, terminal: Terminal, may_type: "asyncio.Event") -> None:
        """Do what the client wishes until it leaves."""
        with contextlib.suppress(OSError, ValueError):
            while (wished := await read_frame(self._reader, _decoder)) is not None:
                if isinstance(wished, Resized):
                    told = (wished.rows, wished.columns)
                    self.size = TerminalSize(*(min(max(number, 1), _SIZE_MAX) for number in told))
                if may_type.is_set() and isinstance(wished, Resized):
                    await terminal.resize(self.size)
                elif may_type.is_set() and isinstance(wished, Typed):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(TERMINAL_TYPING_SECONDS):
                            await terminal.write(wished.data)


class SharedTerminal:
    """The agent's terminal. The client that came first types; when it leaves, the one after it does."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._clients: dict[Client, asyncio.Event] = {}
        self._replay = bytearray()
        self._over = asyncio.Event()

    @property
    def has_clients(self) -> bool:
        """Whether anybody looks at it."""
        return bool(self._clients)

    def show(self, data: bytes) -> None:
        """To all who look on now, and to those who come later as far as it is kept."""
        self._replay += data
        del self._replay[: max(0, len(self._replay) - TERMINAL_REPLAY_BYTES)]
        for client in tuple(self._clients):
            client.send(Shown(data))

    def end(self, exit_: Exit) -> None:
        """Tell everybody that it is over."""
        for client in tuple(self._clients):
            client.send(Ended(exit_.code))
        self._over.set()

    async def attend(self, client: Client) -> None:
        """Serve one client until it leaves or the terminal is over."""
        may_type = self._clients[client] = asyncio.Event()
        try:
            await self._choose_typist()
            if not may_type.is_set():
                client.send(Role(types=False))
            client.send(Shown(bytes(self._replay)))
            await _first(client.serve(self._terminal, may_type), self._over.wait())
        finally:
            del self._clients[client]
            await self._choose_typist()

    async def _choose_typist(self) -> None:
        if any(may_type.is_set() for may_type in self._clients.values()):
            return
        for client, may_type in self._clients.items():
            if not client.looks_on:
                may_type.set()
                client.send(Role(types=True))
                await self._terminal.resize(client.size)
                return


class Terminals:
    """What the control socket reaches of the attempt's sandbox. Nothing before `begin` and after `close`.

    queue: where the output of shells waits for the runner's CPU budget.
    """

    def __init__(self, redaction: Redaction | None, queue: CpuQueue) -> None:
        self.agent: SharedTerminal | None = None
        self._redaction = redaction
        self._queue = queue
        self._sandbox: Sandbox | None = None
        self._is_closed = False
        self._command = Command(SHELL, {}, HOME)
        self._served: set[asyncio.Task[None]] = set()
        self._in_shells: set[Client] = set()
        self._changed = asyncio.Event()

    @property
    def agent_is_attended(self) -> bool:
        """Whether somebody looks at the agent's terminal: then nothing is awaited of the agent."""
        return self.agent is not None and self.agent.has_clients

    def end_agent(self, exit_: Exit) -> None:
        """Tell those who look at the agent's terminal that it has ended."""
        if self.agent is not None:
            self.agent.end(exit_)

    def begin(self, sandbox: Sandbox, environment: Mapping[str, str], directory: str) -> None:
        """Shells may be opened from now on, with these variables; not where it is closed already."""
        if not self._is_closed:
            self._command = Command(SHELL, environment, directory)
            self._sandbox = sandbox

    def close(self) -> None:
        """Open nothing more; what is open ends with the sandbox."""
        self._is_closed, self._sandbox = True, None

    def dismiss(self, message: str) -> None:
        """Open nothing more, and tell those who have shells why theirs are over."""
        self.close()
        for client in tuple(self._in_shells):
            client.send(Ended(message=message))

    async def deserted(self, seconds: float) -> None:
        """Return when there has been no client for so long."""
        while True:
            self._changed.clear()
            try:
                async with asyncio.timeout(None if self._served else seconds):
                    await self._changed.wait()
            except TimeoutError:
                return

    def check(self, order: TerminalOrder) -> None:
        """Raises TerminalRefusedError when there is nothing to open."""
        if self._sandbox is None:
            raise TerminalRefusedError("The task's sandbox does not run now; look at the task's status.")
        if order.agent and self.agent is None:
            raise TerminalRefusedError(
                "The task's agent has no terminal (claude.headless is true); open a shell, or follow its logs."
            )
        if len(self._served) >= TERMINALS_MAX:
            raise TerminalRefusedError(f"There are {TERMINALS_MAX} terminals open in this task; close one.")

    async def serve(self, order: TerminalOrder, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, from its receipt to its end."""
        serving = asyncio.create_task(self._serve(order, Client(order, reader, writer)))
        self._served.add(serving)
        self._changed.set()
        try:
            # Not awaited itself: what `end` cuts off is no cancellation of whoever waits here.
            await asyncio.wait({serving})
        finally:
            serving.cancel()
            self._served.discard(serving)
            self._changed.set()
        if not serving.cancelled():
            serving.result()

    async def end(self) -> None:
        """Cut everybody off."""
        self.close()
        served = tuple(self._served)
        for serving in served:
            serving.cancel()
        await asyncio.gather(*served, return_exceptions=True)

    async def _serve(self, order: TerminalOrder, client: Client) -> None:
        with contextlib.suppress(OSError):
            if order.agent and self.agent is not None:
                await self.agent.attend(client)
            elif self._sandbox is not None:
                await self._serve_shell(self._sandbox, order, client)

    async def _serve_shell(self, sandbox: Sandbox, order: TerminalOrder, client: Client) -> None:
        """A shell of the client's own; it is hung up when the client leaves."""
        environment = {**self._command.environment, "TERM": order.term}
        command = Command(self._command.argv, environment, self._command.directory)
        try:
            terminal = await sandbox.open_terminal(command, client.size)
        except AttemptError as error:
            await client.send_slowly(Ended(message=error.message))
            return
        may_type = asyncio.Event()
        may_type.set()
        self._in_shells.add(client)
        try:
            client.send(Role(types=True))
            await _first(client.serve(terminal, may_type), self._tell_shell(terminal, client))
        finally:
            self._in_shells.discard(client)
            await terminal.hang_up()

    async def _tell_shell(self, terminal: Terminal, client: Client) -> None:
        """What it shows, no faster than the client takes it, and its end."""
        telling = asyncio.create_task(self._tell_chunks(terminal, client))
        try:
            exit_ = await terminal.wait()
            await asyncio.wait({telling}, timeout=OUTPUT_DRAIN_SECONDS)
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
        await client.send_slowly(Ended(exit_.code))

    async def _tell_chunks(self, terminal: Terminal, client: Client) -> None:
        async for chunk in redacted_chunks(terminal.output, self._redaction, self._queue):
            await client.send_slowly(Shown(chunk))


def without_secrets(variables: Mapping[str, str], secrets: Container[str]) -> dict[str, str]:
    """The agent's variables for a shell: no secrets, and no way to the model."""
    return {name: text for name, text in variables.items() if name not in secrets and not name.startswith("ANTHROPIC_")}


async def _first(*works: Coroutine[Any, Any, object]) -> None:
    """Until the first of them is done; the others are ended. Raises what that one raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_SIZE = TerminalSize(rows=24, columns=80)
"""Until somebody comes with a window."""

HOLDER = Command(("/bin/sleep", "infinity"), {"PATH": "/usr/bin:/bin"}, HOME)
"""The sandbox's own command, which only keeps it open: it ends when the agent does."""


class AgentSession(msgspec.Struct, frozen=True):
    """An agent that is at work."""

    sandbox: Sandbox
    terminal: Terminal

    async def wait(self) -> Exit:
        """How the agent ended; that the sandbox went before it said so is an end as well."""
        agent = asyncio.create_task(self.terminal.wait())
        sandbox = asyncio.create_task(self.sandbox.wait())
        try:
            await asyncio.wait({agent, sandbox}, return_when=asyncio.FIRST_COMPLETED)
            return agent.result() if agent.done() else Exit(None, out_of_memory=sandbox.result().out_of_memory)
        finally:
            for waiting in (agent, sandbox):
                waiting.cancel()
            await asyncio.gather(agent, sandbox, return_exceptions=True)

    async def hang_up(self) -> None:
        """What TERM is to an agent without a terminal."""
        await self.terminal.hang_up()


async def begin_session(sandbox: Sandbox, command: Command) -> AgentSession:
    """Start the agent on a terminal. Raises AttemptError (provision_failed, sandbox_lost)."""
    await sandbox.start(HOLDER)
    return AgentSession(sandbox, await sandbox.open_terminal(command, _SIZE))
