"""A fake event stream for a task's page. The page reconnects after each response, with the id of the last event."""

import json


class FakeEventStream:
    """Responds to a page's requests for a task's events. `send` adds events, one message per call.

    requests: the URLs of the requests; is_missing: whether to respond with 404.
    """

    def __init__(self, page, task_id):
        self.requests = []
        self.is_missing = False
        self._messages = []
        self._seq = 0
        page.route(f"**/tasks/{task_id}/story?after=*", self._fulfill)

    def send(self, *events):
        """Add events; numbers and timestamps are filled in."""
        numbered = []
        for event in events:
            self._seq += 1
            numbered.append({"seq": self._seq, "timestamp": "2026-01-29T10:10:00.000Z", **event})
        self._messages.append((self._seq, f"id: {self._seq}\ndata: {json.dumps(numbered)}\n\n"))

    def _fulfill(self, route):
        self.requests.append(route.request.url)
        if self.is_missing:
            route.fulfill(status=404)
            return
        after = int(route.request.url.partition("after=")[2])
        messages = [message for last, message in self._messages if last > after]
        route.fulfill(content_type="text/event-stream", body="".join([": here\n\n", *messages]))


def output(data, *, stream="stdout", continued=False):
    """Return an output event for a line that is not part of the conversation."""
    return {"type": "output", "stream": stream, "data": data, "continued": continued, "parsed": False}


def agent_message(text, *, kind="text", parent=None):
    """Return an agent_message event: a piece of the conversation."""
    return {
        "type": "agent_message",
        "text": text,
        "kind": kind,
        "parent_tool_use_id": parent,
        "omitted_characters": 0,
    }


def tool_call_started(use_id, tool="Bash", *, summary="", parent=None, **fields):
    call = {"tool": tool, "tool_use_id": use_id, "summary": summary, "parent_tool_use_id": parent}
    absent = {"command": None, "edits": [], "input": {}, "omitted_characters": 0, "omitted_fields": 0}
    return {"type": "tool_call_started", **call, **absent, **fields}


def tool_result(use_id, text="", *, is_error=False, **fields):
    result = {"tool_use_id": use_id, "output": text, "is_error": is_error, "exit_code": None}
    return {"type": "tool_result", **result, "omitted_characters": 0, "in_background": False, **fields}


def tool_call(use_id, tool="Bash", *, duration_ms=5, is_error=False):
    call = {"tool": tool, "tool_use_id": use_id, "duration_ms": duration_ms, "is_error": is_error}
    return {"type": "tool_call", **call}


def agent_result(text, **fields):
    result = {"text": text, "is_error": False, "reason": "", "turns": 3, "duration_ms": 5, "cost_usd": None}
    return {"type": "agent_result", **result, "omitted_characters": 0, **fields}
