"""Requests for git credentials, which this host's runners send and the server answers."""

import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable

import msgspec

from sandbox.interfaces.git_credentials import (
    CREDENTIAL_ANSWER_SECONDS,
    CREDENTIAL_MESSAGE_BYTES_MAX,
    CredentialAnswer,
    CredentialRequest,
)
from sandbox.model.errors import DECODE_ERRORS, error_reason
from sandbox.primitives.concurrency import wait_readable

_log = logging.getLogger(__name__)


class RunnerCredentialRequests:
    """Reads the requests from a socket pair whose other end all runners of this worker inherit."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._request: CredentialRequest | None = None
        self._received_at = 0.0

    async def serve(self, ask_server: Callable[[CredentialRequest], Awaitable[CredentialAnswer]]) -> None:
        """Serve requests until cancelled, or until `ask_server` raises an error.

        The next call continues with a request that was not answered.
        """
        while True:
            if self._request is None:
                await wait_readable(self._connection)
                # No await may follow the read, because a cancellation would lose the request.
                self._request, self._received_at = self._read(), time.monotonic()
                continue
            if time.monotonic() - self._received_at < CREDENTIAL_ANSWER_SECONDS:  # else the runner has stopped waiting
                answer = await ask_server(self._request)
                with contextlib.suppress(BlockingIOError):  # no runner reads the answers
                    self._connection.send(msgspec.msgpack.encode(answer))
            self._request = None

    def _read(self) -> CredentialRequest | None:
        """Read the next request; return None if it is not valid."""
        try:
            return msgspec.msgpack.decode(self._connection.recv(CREDENTIAL_MESSAGE_BYTES_MAX), type=CredentialRequest)
        except BlockingIOError:
            pass
        except DECODE_ERRORS as error:
            _log.warning("A request for credentials is not valid: %s", error_reason(error))
        return None
