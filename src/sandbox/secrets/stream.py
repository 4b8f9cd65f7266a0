"""Redacts a stream that comes in chunks."""

from sandbox.secrets.layers import peel
from sandbox.secrets.limits import REDACTED_ANEW_BYTES_MAX
from sandbox.secrets.scanner import Scanner, replace


class StreamRedactor:
    """Lets go what is settled; put together, that is the redaction of the whole stream, however it is cut.

    What may be the beginning of a value is held back until it is known: at most `Scanner.span_bytes_max` bytes and the
    escapes that they begin with, and a quarter more until they are looked at. Cut lines out of what is let go, never
    before.
    """

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._held = b""
        self._fresh = bytearray()
        self._done = 0
        self.has_redacted = False

    @property
    def held_bytes(self) -> int:
        """How many bytes are held back."""
        return len(self._held) + len(self._fresh) - self._done

    def feed(self, chunk: bytes) -> bytes:
        """What may be let go now."""
        if not self._scanner.span_bytes_max:
            return chunk
        self._fresh += chunk
        # To look at all that is held with every chunk would take the square of its length.
        if len(self._held) > max(REDACTED_ANEW_BYTES_MAX, 4 * len(self._fresh)):
            return b""
        return self._let_go(is_end=False)

    def pause(self) -> bytes:
        """The whole lines that are held back, for when nothing has come for a while.

        Wrapped base64 or a value of several lines may begin in them. If it does go on, it vanishes from there on.
        """
        settled = self._let_go(is_end=False) if self._fresh else b""
        end = self._held.rfind(b"\n") + 1
        gone = self._held[self._done : end]
        self._done = max(self._done, end)
        return settled + gone

    def flush(self) -> bytes:
        """What is held back, at the end of the stream."""
        return self._let_go(is_end=True)

    def _let_go(self, *, is_end: bool) -> bytes:
        data = self._held + self._fresh
        self._fresh.clear()
        layers = peel(data)
        settled = len(data) if is_end else self._scanner.settled_length(layers)
        spans = [span for span in self._scanner.find(layers) if span.start < settled]
        self.has_redacted = self.has_redacted or bool(spans)
        gone = replace(data, spans, self._done, settled)
        self._done = max(0, max([self._done, *(span.end for span in spans)]) - settled)
        self._held = data[settled:]
        return gone
