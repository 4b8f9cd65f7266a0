// The conversation as people read it. What came is kept as entries within a bound; elements are made only of the last.
import { $, clock, h, money, span } from "/assets/page.js";
import { markdown } from "/assets/markdown.js";
import { BREAKS } from "/assets/output.js";
import { put, visible } from "/assets/plain.js";

const ENTRIES_MAX = 4000;
const CHARACTERS_MAX = 48_000_000;
const SHOWN_MAX = 300;
const TEXT_MAX = 100_000;
const BUDGET_MILLISECONDS = 10;

const BRIEF = ["command", "file_path", "path", "pattern", "url", "query", "description", "prompt", "skill", "notebook_path"];

export class Conversation {
  #entries = [];
  #made = 0;
  #dropped = 0;
  #characters = 0;
  #share = 0;
  #tools = new Map();
  #partial = "";
  #lastSaid = null;
  #list = $("talk");
  #byElement = new WeakMap();
  #stale = new Set();
  #isTranscript = false;

  // format: the task's output format, or "terminal": anything in the sandbox can write there, so nothing of it is believed.
  constructor(format) {
    this.format = format;
  }

  // Whether the task tells its conversation as it goes on, or only in the transcript afterwards.
  get isTold() {
    return this.format === "stream-json" || this.#isTranscript;
  }

  take(frame) {
    if (BREAKS.has(frame.type)) this.#partial = "";
    this.#share = 0;
    switch (frame.type) {
      case "output":
        if (frame.stream === "stdout" && this.format === "stream-json") this.#takeOutput(frame);
        break;
      case "tool_call":
        this.#timed(frame);
        break;
      case "egress_denied":
        this.#add({ kind: "aside", look: "warns", at: frame.timestamp, text: `Refused: ${frame.host}:${frame.port} — ${frame.reason}` });
        break;
      case "error":
        this.#add({ kind: "aside", look: "errs", at: frame.timestamp, text: `${frame.error}: ${frame.message}` });
        break;
      case "gap":
        this.#add({ kind: "aside", look: "warns", at: frame.timestamp, text: `Something is missing here: ${frame.reason}` });
        break;
    }
  }

  // In slices of time, as it may be long.
  async takeTranscript(text) {
    this.#isTranscript = true;
    let until = performance.now() + BUDGET_MILLISECONDS;
    for (const line of text.split("\n")) {
      if (line) this.#takeLine(line, null);
      if (performance.now() < until) continue;
      await new Promise((resolve) => setTimeout(resolve, 0));
      until = performance.now() + BUDGET_MILLISECONDS;
    }
  }

  #takeOutput(frame) {
    const text = this.#partial + frame.data;
    if (frame.continued && text.length < 16_000_000) {
      this.#partial = text;
      return;
    }
    this.#partial = "";
    this.#takeLine(text, frame.timestamp);
  }

  #takeLine(line, at) {
    let event;
    try {
      event = JSON.parse(line);
    } catch {
      return;
    }
    if (event === null || typeof event !== "object") return;
    // What an entry takes is its part of the line that told it.
    this.#share = Math.ceil(line.length / Math.max(1, blocksOf(event).length));
    const nested = typeof event.parent_tool_use_id === "string";
    if (event.type === "assistant") for (const block of blocksOf(event)) this.#takeSaid(block, at, nested);
    else if (event.type === "user") for (const block of blocksOf(event)) this.#takeAnswer(block, at, nested);
    else if (event.type === "result") this.#add({ kind: "result", at, event, isRepeated: this.#lastSaid === written(event.result).trim() });
    else if (event.type === "system" && event.subtype === "init") {
      this.#add({ kind: "aside", at, text: `Claude Code ${written(event.claude_code_version ?? "")} began with ${written(event.model ?? "its model")}`.replace("  ", " ") });
    }
  }

  #takeSaid(block, at, nested) {
    if (isFilled(block.text) && block.type === "text") {
      this.#lastSaid = block.text.trim();
      this.#add({ kind: "says", at, nested, text: block.text });
    } else if (isFilled(block.thinking) && block.type === "thinking") this.#add({ kind: "thinks", at, nested, text: block.thinking });
    else if (block.type === "tool_use") {
      const entry = { kind: "tool", at, nested, id: block.id, name: written(block.name), input: block.input ?? {} };
      this.#tools.set(block.id, entry);
      this.#add(entry);
    }
  }

  #takeAnswer(block, at, nested) {
    if (block.type === "text" && nested && isFilled(block.text)) this.#add({ kind: "thinks", at, nested, text: block.text });
    if (block.type !== "tool_result") return;
    const entry = this.#tools.get(block.tool_use_id);
    if (!entry) return;
    this.#weigh(entry);
    entry.output = textOf(block.content);
    entry.isError = block.is_error === true;
    this.#stale.add(entry);
  }

  #timed(frame) {
    const entry = this.#tools.get(frame.tool_use_id);
    if (entry) {
      entry.took = frame.duration_ms;
      entry.isError ||= frame.is_error;
      this.#stale.add(entry);
    } else if (!this.isTold) {
      this.#add({ kind: "tool", at: frame.timestamp, name: frame.tool, input: null, took: frame.duration_ms, isError: frame.is_error, output: "" });
    }
  }

  #add(entry) {
    this.#entries.push(entry);
    this.#weigh(entry);
    if (this.#entries.length > ENTRIES_MAX * 1.1 || this.#characters > CHARACTERS_MAX * 1.05) this.#drop();
  }

  #weigh(entry) {
    entry.characters = (entry.characters ?? 0) + this.#share;
    this.#characters += this.#share;
  }

  #drop() {
    let gone = 0;
    while (this.#entries.length - gone > ENTRIES_MAX || (this.#characters > CHARACTERS_MAX && gone < this.#entries.length - 1)) {
      const entry = this.#entries[gone++];
      this.#characters -= entry.characters;
      this.#tools.delete(entry.id);
      entry.element?.remove();
    }
    this.#entries.splice(0, gone);
    this.#dropped += gone;
    this.#made = Math.max(0, this.#made - gone);
  }

  // What has an answer now, or a duration.
  #remake(entry) {
    if (!entry.element) return;
    const before = entry.element;
    const details = before.querySelector("details");
    this.#make(entry);
    const after = entry.element.querySelector("details");
    if (details?.open && after) after.open = true;
    const had = before.contains(document.activeElement);
    before.replaceWith(entry.element);
    if (had) entry.element.querySelector("summary")?.focus();
  }

  get hasMore() {
    return this.#made < this.#entries.length;
  }

  // Makes elements for a slice of time; gives whether there are new ones. isAtEnd: somebody looks at the newest.
  show(isAtEnd) {
    const until = performance.now() + BUDGET_MILLISECONDS;
    $("talk-empty").hidden = this.#entries.length > 0;
    if (this.#entries.length - this.#made > SHOWN_MAX) {
      // What is shown has no hole: what is left out here is offered with all that was before.
      while (this.#list.firstElementChild) this.#forgetFirst();
      this.#made = this.#entries.length - SHOWN_MAX;
    }
    for (const entry of this.#stale) this.#remake(entry);
    this.#stale.clear();
    const fresh = document.createDocumentFragment();
    while (this.#made < this.#entries.length && performance.now() < until) {
      const entry = this.#entries[this.#made++];
      fresh.append(this.#make(entry));
    }
    const hasNew = fresh.childElementCount > 0;
    this.#list.append(fresh);
    while (this.#list.childElementCount > SHOWN_MAX && isAtEnd) this.#forgetFirst();
    while (this.#list.childElementCount > SHOWN_MAX * 3) this.#forgetFirst();
    this.#tellEarlier();
    return hasNew;
  }

  #make(entry) {
    entry.element = make(entry);
    this.#byElement.set(entry.element, entry);
    return entry.element;
  }

  #forgetFirst() {
    const first = this.#list.firstElementChild;
    const entry = this.#byElement.get(first);
    if (entry) entry.element = null;
    first.remove();
  }

  // How many entries are before the first that is shown.
  get #hidden() {
    const first = this.#entries.findIndex((entry) => entry.element);
    return first < 0 ? this.#made : first;
  }

  #tellEarlier() {
    const place = document.querySelector(".earlier");
    const hidden = this.#hidden;
    place.hidden = hidden + this.#dropped === 0;
    if (place.hidden || place.dataset.hidden === `${hidden}/${this.#dropped}`) return;
    place.dataset.hidden = `${hidden}/${this.#dropped}`;
    const parts = [];
    if (hidden) parts.push(h("button", { type: "button", onclick: () => this.#showEarlier() }, `Show earlier (${hidden})`));
    if (this.#dropped) parts.push(h("span", {}, ` ${this.#dropped} earlier entries are only in the transcript.`));
    place.replaceChildren(...parts);
  }

  #showEarlier() {
    const hidden = this.#hidden;
    const height = document.documentElement.scrollHeight;
    const earlier = this.#entries.slice(Math.max(0, hidden - 200), hidden).map((entry) => this.#make(entry));
    this.#list.prepend(...earlier);
    window.scrollBy(0, document.documentElement.scrollHeight - height);
    this.#tellEarlier();
  }
}

const isFilled = (text) => typeof text === "string" && text.trim() !== "";

function blocksOf(event) {
  const content = event.message?.content;
  if (typeof content === "string") return [{ type: "text", text: content }];
  return Array.isArray(content) ? content.filter((block) => block !== null && typeof block === "object") : [];
}

// What should be text, as text: whatever can write to the agent's output may have put anything there.
function written(value) {
  if (typeof value === "string") return value;
  try {
    return JSON.stringify(value, null, 2) ?? "";
  } catch {
    return "[This is too deep to be shown.]";
  }
}

function textOf(content) {
  if (!Array.isArray(content)) return written(content ?? "");
  return content.map((block) => (block?.type === "text" ? written(block.text) : `[${written(block?.type ?? "something")}]`)).join("\n");
}

function make(entry) {
  const element = h("li", { class: entry.nested ? `${entry.kind}-entry nested` : `${entry.kind}-entry` });
  element.append(MAKERS[entry.kind](entry));
  return element;
}

const MAKERS = {
  says: ({ text }) => {
    const said = markdown(text);
    said.classList.add("says");
    return said;
  },
  thinks: ({ text }) =>
    h("details", { class: "thinks" }, h("summary", {}, "Thinking"), h("div", { class: "said", dir: "auto" }, visible(text.slice(0, TEXT_MAX)))),
  aside: ({ text, at, look }) =>
    h("div", { class: `aside ${look ?? ""}` }, h("span", {}, visible(String(text))), at ? h("span", { class: "muted", title: at }, clock(at)) : null),
  tool: makeTool,
  result: makeResult,
};

function makeTool(entry) {
  const { name, input, output, isError, took } = entry;
  const brief = briefOf(input);
  const isDone = output !== undefined || took !== undefined;
  const summary = h(
    "summary",
    {},
    h("span", { class: "tool-name" }, visible(name)),
    h("span", { class: "tool-brief" }, visible(brief).slice(0, 300)),
    h("span", { class: "tool-took" }, isError ? "failed · " : "", took !== undefined ? span(took) : isDone ? "" : "…"),
  );
  const details = h("details", { class: isError ? "tool erred" : "tool", open: isError === true }, summary);
  // What is folded costs nothing until somebody looks.
  const fill = () => {
    if (details.childElementCount === 1) details.append(body(input, output, isDone));
  };
  if (isError) fill();
  else details.addEventListener("toggle", fill, { once: true });
  return details;
}

function briefOf(input) {
  if (input === null || typeof input !== "object") return "";
  const key = BRIEF.find((name) => typeof input[name] === "string") ?? Object.keys(input).find((name) => typeof input[name] === "string");
  return key ? String(input[key]).slice(0, 400).replace(/\s+/g, " ") : "";
}

function body(input, output, isDone) {
  const place = h("div", { class: "tool-body" });
  for (const [name, value] of Object.entries(input ?? {})) {
    place.append(h("h4", {}, visible(name)), long(written(value)));
  }
  if (output) place.append(h("h4", {}, "Output"), long(output));
  else if (isDone) place.append(h("p", { class: "muted" }, "No output."));
  return place;
}

function long(text) {
  const shown = text.length > TEXT_MAX ? `${text.slice(0, TEXT_MAX)}\n… and ${text.length - TEXT_MAX} characters more` : text;
  return put(h("pre", { tabindex: "0" }), shown);
}

function makeResult({ event, isRepeated }) {
  const isError = event.is_error === true || event.subtype !== "success";
  const facts = [
    typeof event.num_turns === "number" && `${event.num_turns} turns`,
    typeof event.duration_ms === "number" && span(event.duration_ms),
    typeof event.total_cost_usd === "number" && `${money(event.total_cost_usd)} by Claude Code's own count`,
  ].filter(Boolean);
  const place = h("div", { class: isError ? "result erred" : "result" }, h("h3", {}, isError ? `Ended: ${visible(written(event.subtype))}` : "Result"));
  if (typeof event.result === "string" && !isRepeated) place.append(markdown(event.result));
  if (facts.length) place.append(h("p", { class: "muted" }, facts.join(" · ")));
  return place;
}

