"""Credentials for a confined clone: asked for inside, looked up outside as the server's user, for one host only."""

import asyncio
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from sandbox.contracts.confinement import FIRST_DESCRIPTOR
from sandbox.workspace.git import Git, GitError, Setting
from sandbox.workspace.pipes import pipe
from sandbox.workspace.stoppable import run_in_thread

HELPER = (
    f'!f() {{ test "$1" != get || {{ {{ cat; echo; }} >&{FIRST_DESCRIPTOR}; sed "/^$/q" <&{FIRST_DESCRIPTOR}; }}; }}; f'
)
"""What git asks inside; it passes the question on, and the answer back. Answers are neither stored nor erased."""

CREDENTIALS_ASKED_MAX = 8
"""Of one clone; further questions have no answer."""

_QUESTION_BYTES_MAX = 16 * 1024


class Credentials:
    """Answers for the host of `url`, whatever inside asks for. secrets: values that were given away."""

    def __init__(self, url: str, settings: Sequence[Setting], variables: Mapping[str, str], path: str) -> None:
        self.secrets: set[str] = set()
        self._url = urlsplit(url)
        self._home = Path(variables.get("HOME", "/nonexistent"))
        self._git = Git(path, [("credential.interactive", "false"), *settings], variables)

    async def answer(self, inside: socket.socket) -> None:
        """Until nobody can ask any more, or has asked too often."""
        reader, writer = await asyncio.open_connection(sock=inside, limit=_QUESTION_BYTES_MAX)
        try:
            for _ in range(CREDENTIALS_ASKED_MAX):
                question = await reader.readuntil(b"\n\n")
                writer.write(await self._look_up(question) + b"\n")
                await writer.drain()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def _look_up(self, question: bytes) -> bytes:
        asked = dict(line.partition("=")[::2] for line in question.decode(errors="replace").splitlines())
        if not self._is_ours(asked.get("protocol", ""), asked.get("host", "")):
            return b""
        told = f"protocol={asked['protocol']}\nhost={asked['host']}\npath={self._url.path.lstrip('/')}\n"
        told += f"username={self._url.username}\n" if self._url.username else ""
        with pipe() as (reading, writing):
            writing.write(told.encode())
            writing.close()
            try:
                found = await self._git.run("credential", "fill", directory=Path("/"), stdin=reading)
            except (GitError, OSError):
                found = await run_in_thread(lambda _: self._look_into_netrc(asked["host"].partition(":")[0]))
        lines = [line for line in found.splitlines() if line.startswith((b"username=", b"password="))]
        passwords = (line.removeprefix(b"password=") for line in lines if line.startswith(b"password="))
        self.secrets.update(password.decode(errors="replace") for password in passwords if password)
        return b"".join(line + b"\n" for line in lines)

    def _look_into_netrc(self, host: str) -> bytes:
        """As curl would, where no helper knows any."""
        from netrc import NetrcParseError, netrc  # most clones ask for no password

        try:
            known = netrc(self._home / ".netrc").authenticators(host)
        except (OSError, NetrcParseError, UnicodeError):
            return b""
        return f"username={known[0]}\npassword={known[2]}\n".encode() if known and known[0] and known[2] else b""

    def _is_ours(self, protocol: str, host: str) -> bool:
        """The URL's own place, or the same host by TLS, where its requests may have been sent on to."""
        own = self._url.netloc.rpartition("@")[2].lower()
        return (protocol, host.lower()) in {(self._url.scheme, own), ("https", own.partition(":")[0])}
