"""The story of a task's page as a test plays it: a page asks again after each part, from its last event on."""

import json


class FakeEventStream:
    """Answers what `page` asks for the story of a task; `tell` plays frames, one message a call. asked: the addresses.

    is_missing: there is nothing at its address.
    """

    def __init__(self, page, task_id):
        self.requests = []
        self.is_missing = False
        self._messages = []
        self._seq = 0
        page.route(f"**/tasks/{task_id}/story?after=*", self._answer)

    def send(self, *frames):
        """Frames without number and time, which they are given here."""
        told = []
        for frame in frames:
            self._seq += 1
            told.append({"seq": self._seq, "timestamp": "2026-01-29T10:10:00.000Z", **frame})
        self._messages.append((self._seq, f"id: {self._seq}\ndata: {json.dumps(told)}\n\n"))

    def _answer(self, route):
        self.requests.append(route.request.url)
        if self.is_missing:
            route.fulfill(status=404)
            return
        after = int(route.request.url.partition("after=")[2])
        messages = [message for last, message in self._messages if last > after]
        route.fulfill(content_type="text/event-stream", body="".join([": here\n\n", *messages]))


def output(data, *, stream="stdout", continued=False):
    """A frame of output."""
    return {"type": "output", "stream": stream, "data": data, "continued": continued}


def claude_message(*blocks, kind="assistant"):
    """A frame in which Claude Code tells of these blocks."""
    return output(json.dumps({"type": kind, "message": {"content": list(blocks)}}) + "\n")


def assistant_text(text):
    """A frame in which the agent says this."""
    return claude_message({"type": "text", "text": text})
