"""The agent on a terminal of its own, with a person before it."""

import asyncio

import msgspec

from sandbox.contracts.inside import HOME
from sandbox.contracts.runtime import Command, Exit, Sandbox, Terminal, TerminalSize

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
