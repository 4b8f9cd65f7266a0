"""A pausing relay to the git server. A clone gets some bytes immediately, and the rest after `release` is called."""

import contextlib
import socket
import threading
from functools import partial

from doubles.network_namespace import in_namespace


class PausingRelay:
    """Relays connections to `port`. bytes_max: how many bytes clients get before `release` is called.

    namespace: the network namespace of the address; None for that of this process.
    """

    def __init__(self, port, bytes_max, address="127.0.0.1", namespace=None):
        self._upstream, self._left = (address, port), bytes_max
        self._released, self._held = threading.Event(), threading.Event()
        self._enter = partial(in_namespace, namespace) if namespace else contextlib.nullcontext
        with self._enter():
            self._server = socket.create_server((address, 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def is_holding(self):
        """Whether a client is waiting for bytes."""
        return self._held.is_set() and not self._released.is_set()

    def release(self):
        self._released.set()

    def close(self):
        self.release()
        # A thread in accept() keeps a closed socket alive; shutdown() wakes the thread.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                with self._enter():
                    upstream = socket.create_connection(self._upstream, timeout=60)
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._relay_both, args=(client, upstream), daemon=True).start()

    def _relay_both(self, client, upstream):
        with client, upstream:
            forward = threading.Thread(target=self._relay, args=(client, upstream, False), daemon=True)
            forward.start()
            self._relay(upstream, client, True)
            # A client that has read everything may have closed its connection.
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            forward.join()

    def _relay(self, source, sink, is_response):
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                sink.sendall(self._forward_or_hold(data, sink) if is_response else data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _forward_or_hold(self, data, sink):
        passed, self._left = data[: self._left], max(0, self._left - len(data))
        if len(passed) < len(data):
            sink.sendall(passed)
            self._held.set()
            self._released.wait(120)
            return data[len(passed) :]
        return data
