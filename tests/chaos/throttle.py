"""A slow network before the git server, for one task: a clone gets so many bytes, and the rest when it is let go."""

import contextlib
import socket
import threading


class Valve:
    """Relays connections to `port`. bytes_max: what goes back to clients before `open` is called."""

    def __init__(self, port, bytes_max):
        self._upstream, self._left = port, bytes_max
        self._opened, self._held = threading.Event(), threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def holds(self):
        """Somebody waits for bytes."""
        return self._held.is_set() and not self._opened.is_set()

    def open(self):
        self._opened.set()

    def close(self):
        self.open()
        # A thread in accept() keeps a closed socket alive; this wakes it.
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
                upstream = socket.create_connection(("127.0.0.1", self._upstream), timeout=60)
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._relay_both, args=(client, upstream), daemon=True).start()

    def _relay_both(self, client, upstream):
        with client, upstream:
            forth = threading.Thread(target=self._relay, args=(client, upstream, False), daemon=True)
            forth.start()
            self._relay(upstream, client, True)
            # Who has read all that there is may be gone without a word.
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            forth.join()

    def _relay(self, source, sink, is_back):
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                sink.sendall(self._kept_back(data, sink) if is_back else data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _kept_back(self, data, sink):
        now, self._left = data[: self._left], max(0, self._left - len(data))
        if len(now) < len(data):
            sink.sendall(now)
            self._held.set()
            self._opened.wait(120)
            return data[len(now) :]
        return data
