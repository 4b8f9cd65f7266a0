// The readable conversation. Keeps a limited number of entries, and creates elements only for the latest.

import { markdown } from "/assets/markdown.js";
import { BREAKS } from "/assets/output.js";
import { $, clock, h, money, span } from "/assets/page.js";
import { appendText, elementLimit, splitText, visible } from "/assets/plain.js";

const ENTRIES_MAX = 4000;
const CHARACTERS_MAX = 48_000_000;
const SHOWN_MAX = 300;
const TEXT_MAX = 100_000;
const LABEL_MAX = 2000;
const FIELDS_MAX = 100;
const BUDGET_MILLISECONDS = 10;

const SUMMARY_FIELDS = [
  "command",
  "file_path",
  "path",
  "pattern",
  "url",
  "query",
  "description",
  "prompt",
  "skill",
  "notebook_path",
];

export class Conversation {
  #entries = [];
  #renderedCount = 0;
  #droppedCount = 0;
  #characters = 0;
  #lineShare = 0;
  #tools = new Map();
  #partial = "";
  #lastMessage = null;
  #list = $("talk");
  #byElement = new WeakMap();
  #stale = new Set();
  #isTranscript = false;

  // format: the task's output format, or "terminal": any program in the sandbox can write there, so its content is untrusted.
  constructor(format) {
    this.format = format;
  }

  // Whether the conversation is in the events; otherwise it is only in the transcript, after the end.
  get hasLiveEvents() {
    return this.format === "stream-json" || this.#isTranscript;
  }

  handle(frame) {
    if (BREAKS.has(frame.type)) this.#partial = "";
    this.#lineShare = 0;
    switch (frame.type) {
      case "output":
        if (frame.stream === "stdout" && this.format === "stream-json") this.#addOutput(frame);
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
        this.#add({ kind: "aside", style: "errs", at: frame.timestamp, text: `${frame.error}: ${frame.message}` });
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

  // Process the transcript in time slices, because it may be long.
  async addTranscript(text) {
    this.#isTranscript = true;
    let deadline = performance.now() + BUDGET_MILLISECONDS;
    for (const line of text.split("\n")) {
      if (line) this.#addLine(line, null);
      if (performance.now() < deadline) continue;
      await new Promise((resolve) => setTimeout(resolve, 0));
      deadline = performance.now() + BUDGET_MILLISECONDS;
    }
  }

  #addOutput(frame) {
    const text = this.#partial + frame.data;
    if (frame.continued && text.length < 16_000_000) {
      this.#partial = text;
      return;
    }
    this.#partial = "";
    this.#addLine(text, frame.timestamp);
  }

  #addLine(line, at) {
    let event;
    try {
      event = JSON.parse(line);
    } catch {
      return;
    }
    if (event === null || typeof event !== "object") return;
    // The size of an entry is its share of the size of its line.
    this.#lineShare = Math.ceil(line.length / Math.max(1, blocksOf(event).length));
    const nested = typeof event.parent_tool_use_id === "string";
    if (event.type === "assistant") for (const block of blocksOf(event)) this.#addAgentBlock(block, at, nested);
    else if (event.type === "user") for (const block of blocksOf(event)) this.#addToolResult(block, at, nested);
    else if (event.type === "result")
      this.#add({ kind: "result", at, event, isRepeated: this.#lastMessage === toText(event.result).trim() });
    else if (event.type === "system" && event.subtype === "init") {
      this.#add({
        kind: "aside",
        at,
        text: `Claude Code ${toText(event.claude_code_version ?? "")} started with ${toText(event.model ?? "its model")}`.replace(
          "  ",
          " ",
        ),
      });
    }
  }

  #addAgentBlock(block, at, nested) {
    if (isFilled(block.text) && block.type === "text") {
      this.#lastMessage = block.text.trim();
      this.#add({ kind: "says", at, nested, text: block.text });
    } else if (isFilled(block.thinking) && block.type === "thinking")
      this.#add({ kind: "thinks", at, nested, text: block.thinking });
    else if (block.type === "tool_use") {
      const entry = { kind: "tool", at, nested, id: block.id, name: toText(block.name), input: block.input ?? {} };
      this.#tools.set(block.id, entry);
      this.#add(entry);
    }
  }

  #addToolResult(block, at, nested) {
    if (block.type === "text" && nested && isFilled(block.text))
      this.#add({ kind: "thinks", at, nested, text: block.text });
    if (block.type !== "tool_result") return;
    const entry = this.#tools.get(block.tool_use_id);
    if (!entry) return;
    this.#addSize(entry);
    entry.output = textOf(block.content);
    entry.isError = block.is_error === true;
    this.#stale.add(entry);
  }

  #addDuration(frame) {
    const entry = this.#tools.get(frame.tool_use_id);
    if (entry) {
      entry.duration = frame.duration_ms;
      entry.isError ||= frame.is_error;
      this.#stale.add(entry);
    } else if (!this.hasLiveEvents) {
      this.#add({
        kind: "tool",
        at: frame.timestamp,
        name: frame.tool,
        input: null,
        duration: frame.duration_ms,
        isError: frame.is_error,
        output: "",
      });
    }
  }

  #add(entry) {
    this.#entries.push(entry);
    this.#addSize(entry);
    if (this.#entries.length > ENTRIES_MAX * 1.1 || this.#characters > CHARACTERS_MAX * 1.05) this.#dropOldest();
  }

  #addSize(entry) {
    entry.characters = (entry.characters ?? 0) + this.#lineShare;
    this.#characters += this.#lineShare;
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
    return this.#renderedCount < this.#entries.length;
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
    for (const entry of this.#stale) this.#rerender(entry);
    this.#stale.clear();
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

const isFilled = (text) => typeof text === "string" && text.trim() !== "";

function blocksOf(event) {
  const content = event.message?.content;
  if (typeof content === "string") return [{ type: "text", text: content }];
  return Array.isArray(content) ? content.filter((block) => block !== null && typeof block === "object") : [];
}

// Convert a value to text: any program that can write to the agent's output may have sent any type.
function toText(value) {
  if (typeof value === "string") return value;
  try {
    return JSON.stringify(value, null, 2) ?? "";
  } catch {
    return "[This value is too deeply nested to be displayed.]";
  }
}

const label = (text) => (text.length > LABEL_MAX ? `${text.slice(0, LABEL_MAX)}…` : text);

function textOf(content) {
  if (!Array.isArray(content)) return toText(content ?? "");
  return content
    .map((block) => (block?.type === "text" ? toText(block.text) : `[${toText(block?.type ?? "something")}]`))
    .join("\n");
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
  thinks: ({ text }) =>
    h(
      "details",
      { class: "thinks" },
      h("summary", {}, "Thinking"),
      h("div", { class: "said", dir: "auto" }, ...splitText(visible(text.slice(0, TEXT_MAX)))),
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
  const { name, input, output, isError, duration } = entry;
  const inputSummary = summarizeInput(input);
  const isDone = output !== undefined || duration !== undefined;
  const summary = h(
    "summary",
    {},
    h("span", { class: "tool-name" }, visible(label(name))),
    h("span", { class: "tool-brief" }, visible(inputSummary).slice(0, 300)),
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
    if (details.childElementCount === 1) details.append(renderBody(input, output, isDone));
  };
  if (isError) fill();
  else details.addEventListener("toggle", fill, { once: true });
  return details;
}

function summarizeInput(input) {
  if (input === null || typeof input !== "object") return "";
  const key =
    SUMMARY_FIELDS.find((name) => typeof input[name] === "string") ??
    Object.keys(input).find((name) => typeof input[name] === "string");
  return key ? String(input[key]).slice(0, 400).replace(/\s+/g, " ") : "";
}

function renderBody(input, output, isDone) {
  const container = h("div", { class: "tool-body" });
  const fields = Object.entries(input ?? {});
  const left = elementLimit();
  for (const [name, value] of fields.slice(0, FIELDS_MAX)) {
    container.append(h("h4", {}, visible(label(name))), renderText(toText(value), left));
  }
  if (fields.length > FIELDS_MAX)
    container.append(h("p", { class: "muted" }, `… and ${fields.length - FIELDS_MAX} more fields`));
  if (output) container.append(h("h4", {}, "Output"), renderText(output));
  else if (isDone) container.append(h("p", { class: "muted" }, "No output."));
  return container;
}

function renderText(text, left) {
  const displayed =
    text.length > TEXT_MAX ? `${text.slice(0, TEXT_MAX)}\n… and ${text.length - TEXT_MAX} more characters` : text;
  return appendText(h("pre", { tabindex: "0" }), displayed, "", left);
}

function renderResult({ event, isRepeated }) {
  const isError = event.is_error === true || event.subtype !== "success";
  const facts = [
    typeof event.num_turns === "number" && `${event.num_turns} turns`,
    typeof event.duration_ms === "number" && span(event.duration_ms),
    typeof event.total_cost_usd === "number" && `${money(event.total_cost_usd)} as counted by Claude Code`,
  ].filter(Boolean);
  const container = h(
    "div",
    { class: isError ? "result erred" : "result" },
    h("h3", {}, isError ? `Ended: ${visible(label(toText(event.subtype)))}` : "Result"),
  );
  if (typeof event.result === "string" && !isRepeated) container.append(markdown(event.result));
  if (facts.length) container.append(h("p", { class: "muted" }, facts.join(" · ")));
  return container;
}
