"""The conversation of earlier tasks of a chain, as text for the agent of the next task."""

from collections import deque

from sandbox.model.fixed_limits import EARLIER_CONVERSATION_CHARACTERS_MAX
from sandbox.model.wire.event_bodies import ConversationItem
from sandbox.model.wire.event_conversion import WireEvent

_PROMPT_CHARACTERS_MAX = 20_000
_MESSAGE_CHARACTERS_MAX = 8_000
_OUTPUT_CHARACTERS_MAX = 600
_SUMMARY_CHARACTERS_MAX = 300
_SEPARATOR = "\n\n"
_INDENT = "  "
OMISSION_NOTE = "[The beginning of the conversation is omitted.]"


class ConversationText:
    """Renders the conversation of one or more tasks as text, for the agent of the next task in the chain.

    Entries are added oldest first; the beginning is dropped if the text is too long.

    All lines of an entry except the first are indented, so the output of a tool cannot look like another entry.
    """

    def __init__(self, characters_max: int = EARLIER_CONVERSATION_CHARACTERS_MAX) -> None:
        self._characters_max = characters_max
        self._entries: deque[str] = deque()
        self._characters = 0
        self._is_cut = False

    def add_earlier(self, text: str) -> None:
        """Add a text that `render` returned for an earlier task."""
        if text:
            self._is_cut = self._is_cut or text.startswith(OMISSION_NOTE)
            for entry in text.removeprefix(OMISSION_NOTE).split(_SEPARATOR):
                self._append(entry)

    def add_prompt(self, prompt: str) -> None:
        """Add the prompt of a task."""
        self._add(f"User: {_shorten(prompt, _PROMPT_CHARACTERS_MAX)}")

    def add_event(self, event: WireEvent) -> None:
        """Add an event of the main conversation. Events of subagents are left out: subagents report to the agent."""
        match event["type"]:
            case "agent_message" | "tool_call_started" | "tool_result" | "agent_result":
                self._add_item(event)
            case "output" | "conversation":
                # Earlier versions recorded no conversation events, so these items were converted from the output.
                for item in event.get("conversation", ()):
                    self._add_item(item)

    def render(self) -> str:
        """Return the text. It begins with OMISSION_NOTE only if something was left out."""
        text = _SEPARATOR.join(self._entries)
        is_cut = self._is_cut or len(text) > self._characters_max
        return _SEPARATOR.join([*([OMISSION_NOTE] if is_cut else ()), text[-self._characters_max :]])

    def _add_item(self, item: ConversationItem) -> None:
        if item["type"] == "agent_message":
            if item["kind"] == "text" and item["parent_tool_use_id"] is None:
                self._add(f"Assistant: {_shorten(item['text'], _MESSAGE_CHARACTERS_MAX)}")
        elif item["type"] == "tool_call_started":
            if item["parent_tool_use_id"] is None:
                self._add(f"Tool call: {item['tool']} {_shorten(item['summary'], _SUMMARY_CHARACTERS_MAX)}".rstrip())
        elif item["type"] == "tool_result":
            mark = "Tool error" if item["is_error"] else "Tool result"
            self._add(f"{mark}: {_shorten(item['output'], _OUTPUT_CHARACTERS_MAX)}".rstrip())

    def _add(self, entry: str) -> None:
        self._append(f"\n{_INDENT}".join(entry.splitlines()))

    def _append(self, entry: str) -> None:
        if not entry.strip():
            return
        self._entries.append(entry)
        self._characters += len(entry) + len(_SEPARATOR)
        while self._characters > self._characters_max and len(self._entries) > 1:
            self._characters -= len(self._entries.popleft()) + len(_SEPARATOR)
            self._is_cut = True


def _shorten(text: str, characters_max: int) -> str:
    if len(text) <= characters_max:
        return text
    half = characters_max // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters omitted …]\n{text[-half:]}"
