// The readable conversation. Keeps a limited number of entries, and creates elements only for the latest.

import { markdown } from "/assets/markdown.js";
import { $, clock, h, money, span } from "/assets/page.js";
import { appendText, elementLimit, splitText, visible } from "/assets/plain.js";

const ENTRIES_MAX = 4000;
const CHARACTERS_MAX = 48_000_000;
const SHOWN_MAX = 300;
const LABEL_MAX = 2000;
const BUDGET_MILLISECONDS = 10;

// Approximate memory of an entry without its texts.
const ENTRY_CHARACTERS = 200;

export class Conversation {
  #entries = [];
  #renderedCount = 0;
  #droppedCount = 0;
  #characters = 0;
  #tools = new Map();
  #lastMessage = null;
  #list = $("talk");
  #byElement = new WeakMap();
  #stale = new Set();

  handle(frame) {
    // Events converted from the output of an earlier version have no time of their own.
    for (const event of frame.conversation ?? []) this.handle({ ...event, timestamp: frame.timestamp });
    switch (frame.type) {
      case "agent_message":
        this.#addMessage(frame);
        break;
      case "tool_call_started":
        this.#addToolCall(frame);
        break;
      case "tool_result":
        this.#addToolResult(frame);
        break;
      case "agent_result":
        this.#add({
          kind: "result",
          at: frame.timestamp,
          event: frame,
          isRepeated: this.#lastMessage === frame.text.trim(),
        });
        break;
      case "tool_call":
        this.#addDuration(frame);
        break;
      case "egress_denied":
        this.#add({
          kind: "aside",
          style: "warns",
          at: frame.timestamp,
          text: `Refused: ${frame.host}:${frame.port} — ${frame.reason}`,
        });
        break;
      case "error":
        this.#add({
          kind: "aside",
          style: "errs",
          at: frame.timestamp,
          text: `${frame.error}: ${frame.message}`,
          error: frame.message,
        });
        break;
      case "end":
        if (frame.error) this.#removeError(frame.error.message);
        break;
      case "gap":
        this.#add({
          kind: "aside",
          style: "warns",
          at: frame.timestamp,
          text: `Some entries are missing: ${frame.reason}`,
        });
        break;
    }
  }

  // The head of the page shows the failure of the task.
  #removeError(message) {
    const at = this.#entries.findLastIndex((entry) => entry.error === message);
    if (at < 0) return;
    this.#entries[at].element?.remove();
    this.#characters -= this.#entries[at].characters;
    this.#entries.splice(at, 1);
    if (at < this.#renderedCount) this.#renderedCount--;
  }

  #addMessage({ kind, text, timestamp, parent_tool_use_id, omitted_characters }) {
    if (kind === "notice") {
      this.#add({ kind: "aside", at: timestamp, text });
      return;
    }
    if (kind === "text") this.#lastMessage = text.trim();
    this.#add({
      kind: kind === "text" ? "says" : "folded",
      title: kind === "prompt" ? "Prompt" : "Thinking",
      at: timestamp,
      nested: parent_tool_use_id !== null,
      text: withOmitted(text, omitted_characters),
    });
  }

  #addToolCall(frame) {
    const entry = {
      kind: "tool",
      at: frame.timestamp,
      nested: frame.parent_tool_use_id !== null,
      id: frame.tool_use_id,
      name: frame.tool,
      summary: frame.summary,
      fields: inputFields(frame),
      omittedFields: frame.omitted_fields,
    };
    this.#tools.set(entry.id, entry);
    this.#add(entry);
  }

  #addToolResult(frame) {
    const entry = this.#tools.get(frame.tool_use_id);
    if (!entry) return;
    const before = entry.output?.length ?? 0;
    entry.output = withOmitted(frame.output, frame.omitted_characters);
    entry.isError = frame.is_error;
    this.#addSize(entry, entry.output.length - before);
    this.#stale.add(entry);
  }

  #addDuration(frame) {
    const entry = this.#tools.get(frame.tool_use_id);
    if (entry) {
      entry.duration = frame.duration_ms;
      entry.isError ||= frame.is_error;
      this.#stale.add(entry);
    } else {
      // The start of this tool call was not recorded.
      const { timestamp: at, tool: name, duration_ms: duration, is_error: isError } = frame;
      this.#add({ kind: "tool", at, name, summary: "", fields: [], duration, isError });
    }
  }

  #add(entry) {
    this.#entries.push(entry);
    const texts = [entry.text ?? "", entry.event?.text ?? "", ...(entry.fields ?? []).flat()];
    this.#addSize(entry, ENTRY_CHARACTERS + texts.reduce((sum, text) => sum + text.length, 0));
  }

  #addSize(entry, characters) {
    entry.characters = (entry.characters ?? 0) + characters;
    this.#characters += characters;
    if (this.#entries.length > ENTRIES_MAX * 1.1 || this.#characters > CHARACTERS_MAX * 1.05) this.#dropOldest();
  }

  #dropOldest() {
    let count = 0;
    while (
      this.#entries.length - count > ENTRIES_MAX ||
      (this.#characters > CHARACTERS_MAX && count < this.#entries.length - 1)
    ) {
      const entry = this.#entries[count++];
      this.#characters -= entry.characters;
      this.#tools.delete(entry.id);
      entry.element?.remove();
    }
    this.#entries.splice(0, count);
    this.#droppedCount += count;
    this.#renderedCount = Math.max(0, this.#renderedCount - count);
  }

  // Render an entry again after it got a result or a duration.
  #rerender(entry) {
    if (!entry.element) return;
    const before = entry.element;
    const details = before.querySelector("details");
    this.#render(entry);
    const after = entry.element.querySelector("details");
    if (details?.open && after) after.open = true;
    const hadFocus = before.contains(document.activeElement);
    before.replaceWith(entry.element);
    if (hadFocus) entry.element.querySelector("summary")?.focus();
  }

  get hasMore() {
    return this.#renderedCount < this.#entries.length || this.#stale.size > 0;
  }

  // Create elements for one time slice; return whether there are new ones. isAtEnd: the end of the page is visible.
  show(isAtEnd) {
    const deadline = performance.now() + BUDGET_MILLISECONDS;
    $("talk-empty").hidden = this.#entries.length > 0;
    if (this.#entries.length - this.#renderedCount > SHOWN_MAX) {
      // Leave no gap between displayed entries: skipped ones are added to the earlier entries, which the user can load.
      while (this.#list.firstElementChild) this.#removeFirst();
      this.#renderedCount = this.#entries.length - SHOWN_MAX;
    }
    for (const entry of this.#stale) {
      this.#stale.delete(entry);
      this.#rerender(entry);
      if (performance.now() >= deadline) break;
    }
    const fragment = document.createDocumentFragment();
    while (this.#renderedCount < this.#entries.length && performance.now() < deadline) {
      const entry = this.#entries[this.#renderedCount++];
      fragment.append(this.#render(entry));
    }
    const hasNew = fragment.childElementCount > 0;
    this.#list.append(fragment);
    while (this.#list.childElementCount > SHOWN_MAX && isAtEnd) this.#removeFirst();
    while (this.#list.childElementCount > SHOWN_MAX * 3) this.#removeFirst();
    this.#updateEarlier();
    return hasNew;
  }

  #render(entry) {
    entry.element = renderEntry(entry);
    this.#byElement.set(entry.element, entry);
    return entry.element;
  }

  #removeFirst() {
    const first = this.#list.firstElementChild;
    const entry = this.#byElement.get(first);
    if (entry) entry.element = null;
    first.remove();
  }

  // Number of entries before the first displayed one.
  get #hiddenCount() {
    const first = this.#entries.findIndex((entry) => entry.element);
    return first < 0 ? this.#renderedCount : first;
  }

  #updateEarlier() {
    const container = document.querySelector(".earlier");
    const hidden = this.#hiddenCount;
    container.hidden = hidden + this.#droppedCount === 0;
    if (container.hidden || container.dataset.hidden === `${hidden}/${this.#droppedCount}`) return;
    container.dataset.hidden = `${hidden}/${this.#droppedCount}`;
    const parts = [];
    if (hidden)
      parts.push(h("button", { type: "button", onclick: () => this.#showEarlier() }, `Show earlier (${hidden})`));
    if (this.#droppedCount)
      parts.push(h("span", {}, ` ${this.#droppedCount} earlier entries are only in the transcript.`));
    container.replaceChildren(...parts);
  }

  #showEarlier() {
    const hidden = this.#hiddenCount;
    const height = document.documentElement.scrollHeight;
    const earlier = this.#entries.slice(Math.max(0, hidden - 200), hidden).map((entry) => this.#render(entry));
    this.#list.prepend(...earlier);
    window.scrollBy(0, document.documentElement.scrollHeight - height);
    this.#updateEarlier();
  }
}

const label = (text) => (text.length > LABEL_MAX ? `${text.slice(0, LABEL_MAX)}…` : text);

const withOmitted = (text, count) => (count ? `${text}\n… and ${count} more characters` : text);

// Return the input of a tool call as pairs of a name and a text.
function inputFields({ command, edits, input, omitted_characters }) {
  const fields = command === null ? [] : [["command", command]];
  for (const { path, old, new: changed } of edits) {
    fields.push(["file", path]);
    if (old !== null) fields.push(["old", old]);
    fields.push(["new", changed]);
  }
  fields.push(...Object.entries(input));
  if (omitted_characters && fields.length) fields.at(-1)[1] = withOmitted(fields.at(-1)[1], omitted_characters);
  return fields;
}

function renderEntry(entry) {
  const element = h("li", { class: entry.nested ? `${entry.kind}-entry nested` : `${entry.kind}-entry` });
  element.append(RENDERERS[entry.kind](entry));
  return element;
}

const RENDERERS = {
  says: ({ text }) => {
    const element = markdown(text);
    element.classList.add("says");
    return element;
  },
  folded: ({ text, title }) =>
    h(
      "details",
      { class: "thinks" },
      h("summary", {}, title),
      h("div", { class: "said", dir: "auto" }, ...splitText(visible(text))),
    ),
  aside: ({ text, at, style }) =>
    h(
      "div",
      { class: `aside ${style ?? ""}` },
      h("span", {}, visible(label(String(text)))),
      at ? h("span", { class: "muted", title: at }, clock(at)) : null,
    ),
  tool: renderTool,
  result: renderResult,
};

function renderTool(entry) {
  const { name, summary: brief, output, isError, duration } = entry;
  const isDone = output !== undefined || duration !== undefined;
  const summary = h(
    "summary",
    {},
    h("span", { class: "tool-name" }, visible(label(name))),
    h("span", { class: "tool-brief" }, visible(brief).slice(0, 300)),
    h(
      "span",
      { class: "tool-took" },
      isError ? "failed · " : "",
      duration !== undefined ? span(duration) : isDone ? "" : "…",
    ),
  );
  const details = h("details", { class: isError ? "tool erred" : "tool", open: isError === true }, summary);
  // Render a folded tool call only when it is opened.
  const fill = () => {
    if (details.childElementCount === 1) details.append(renderBody(entry, isDone));
  };
  if (isError) fill();
  else details.addEventListener("toggle", fill, { once: true });
  return details;
}

function renderBody({ fields, omittedFields, output }, isDone) {
  const container = h("div", { class: "tool-body" });
  const left = elementLimit();
  for (const [name, text] of fields) container.append(h("h4", {}, visible(label(name))), renderText(text, left));
  if (omittedFields) container.append(h("p", { class: "muted" }, `… and ${omittedFields} more fields`));
  if (output) container.append(h("h4", {}, "Output"), renderText(output));
  else if (isDone) container.append(h("p", { class: "muted" }, "No output."));
  return container;
}

const renderText = (text, left) => appendText(h("pre", { tabindex: "0" }), text, "", left);

function renderResult({ event, isRepeated }) {
  const facts = [
    event.turns !== null && `${event.turns} turns`,
    event.duration_ms !== null && span(event.duration_ms),
    event.cost_usd !== null && `${money(event.cost_usd)} as counted by the agent`,
  ].filter(Boolean);
  const container = h(
    "div",
    { class: event.is_error ? "result erred" : "result" },
    h("h3", {}, event.is_error ? `Ended: ${visible(label(event.reason))}` : "Result"),
  );
  if (event.text && !isRepeated) container.append(markdown(withOmitted(event.text, event.omitted_characters)));
  if (facts.length) container.append(h("p", { class: "muted" }, facts.join(" · ")));
  return container;
}
