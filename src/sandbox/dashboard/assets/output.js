// stdout, stderr and events as lines. Only visible lines have elements, which keeps long output responsive.
import { $, clock, h, money, span } from "/assets/page.js";
import { appendText, withoutColors } from "/assets/plain.js";

const LINE_HEIGHT = 20;
const LINES_MAX = 200_000;
const CHARACTERS_MAX = 48_000_000;
const LINE_SHOWN_MAX = 2000;
const LINE_OPENED_MAX = 1_000_000;
const LINE_MAX = 4_000_000;
const MARGIN_LINES = 12;
const SLICE_MILLISECONDS = 10;

const DESCRIPTIONS = {
  state_change: ({ previous_state, new_state, state_message }) =>
    `${previous_state ?? ""} → ${new_state}: ${state_message}`,
  tool_call: ({ tool, duration_ms, is_error }) => `${tool}, ${span(duration_ms)}${is_error ? ", failed" : ""}`,
  usage: (frame) =>
    `${frame.model}: ${frame.input_tokens} tokens in, ${frame.output_tokens} out${frame.cost_usd == null ? "" : `, ${money(frame.cost_usd)}`}`,
  egress_denied: ({ host, port, reason }) => `${host}:${port} refused: ${reason}`,
  gap: ({ first_seq, last_seq, reason }) => `${first_seq} to ${last_seq} are missing: ${reason}`,
  error: ({ error, message }) => `${error}: ${message}`,
};

// These events end all partial lines.
export const BREAKS = new Set(["attempt", "gap", "end"]);

export class Output {
  #all = [];
  #filtered = this.#all;
  #stream = "all";
  #characters = 0;
  #droppedCount = 0;
  #partial = { stdout: null, stderr: null };
  #box = $("lines");
  #space = this.#box.firstElementChild;
  #rowsElement = this.#space.firstElementChild;
  #find = { text: "", hits: [], at: -1, scanned: 0, timer: 0 };
  #isFollowing = true;
  #isStale = true;
  #range = "";

  // isTerminal: the output is not divided into lines, so a partial line at the end is also shown.
  constructor(isTerminal) {
    this.isTerminal = isTerminal;
    this.#box.addEventListener("scroll", () => {
      this.#isFollowing = this.#box.scrollTop + this.#box.clientHeight >= this.#space.offsetHeight - LINE_HEIGHT;
      this.#draw();
    });
    new ResizeObserver(() => this.#draw()).observe(this.#box);
    for (const button of document.querySelectorAll("[data-stream]"))
      button.addEventListener("click", () => this.#selectStream(button));
    $("find").addEventListener("input", () => this.#search($("find").value));
    $("find").addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        event.preventDefault();
        this.#goTo(event.shiftKey ? -1 : 1);
      }
    });
    $("find-on").addEventListener("click", () => this.#goTo(1));
    $("find-back").addEventListener("click", () => this.#goTo(-1));
  }

  get count() {
    return this.#all.length + this.#droppedCount;
  }

  handle(frame) {
    if (BREAKS.has(frame.type)) this.#breakLines();
    if (frame.type === "output") this.#addOutput(frame);
    else if (frame.type in DESCRIPTIONS)
      this.#add("events", frame.timestamp, `${frame.type}  ${DESCRIPTIONS[frame.type](frame)}`);
  }

  #addOutput({ stream, timestamp, data, continued }) {
    const lines = data.split("\n");
    lines[0] = (this.#partial[stream]?.text ?? "") + lines[0];
    const rest = lines.pop();
    for (const line of lines) this.#add(stream, timestamp, line);
    this.#partial[stream] = rest ? { stream, at: timestamp, text: rest } : null;
    if (rest && (!continued || rest.length >= LINE_MAX)) this.#breakLine(stream);
    this.#isStale ||= this.isTerminal;
  }

  #breakLine(stream) {
    const { at, text } = this.#partial[stream];
    this.#partial[stream] = null;
    this.#add(stream, at, text);
  }

  #breakLines() {
    for (const stream of Object.keys(this.#partial)) if (this.#partial[stream]) this.#breakLine(stream);
  }

  // The partial line at the end of a terminal's output, such as a shell prompt.
  get #prompt() {
    const hasPrompt = this.isTerminal && (this.#stream === "all" || this.#stream === "stdout");
    return hasPrompt ? this.#partial.stdout : null;
  }

  #add(stream, at, text) {
    const line = { stream, at, text };
    this.#all.push(line);
    if (this.#filtered !== this.#all && stream === this.#stream) this.#filtered.push(line);
    this.#characters += text.length;
    if (this.#all.length > LINES_MAX * 1.05 || this.#characters > CHARACTERS_MAX * 1.05) this.#dropOldest();
    this.#isStale = true;
  }

  #dropOldest() {
    let count = 0;
    while (
      this.#all.length - count > LINES_MAX ||
      (this.#characters > CHARACTERS_MAX && count < this.#all.length - 1)
    ) {
      this.#characters -= this.#all[count++].text.length;
    }
    this.#all.splice(0, count);
    this.#droppedCount += count;
    const lengthBefore = this.#filtered.length;
    if (this.#filtered !== this.#all) this.#filtered = this.#all.filter((line) => line.stream === this.#stream);
    if (!this.#isFollowing)
      this.#box.scrollTop -=
        (this.#filtered === this.#all ? count : lengthBefore - this.#filtered.length) * LINE_HEIGHT;
    this.#search(this.#find.text);
    $("dropped").hidden = false;
    $("dropped").textContent =
      `This page no longer has the first ${this.#droppedCount} lines; download the output to see all.`;
  }

  #selectStream(button) {
    for (const each of document.querySelectorAll("[data-stream]"))
      each.setAttribute("aria-pressed", String(each === button));
    this.#stream = button.dataset.stream;
    this.#filtered = this.#stream === "all" ? this.#all : this.#all.filter((line) => line.stream === this.#stream);
    this.#isFollowing = true;
    this.#search(this.#find.text);
    this.#isStale = true;
    this.show();
  }

  // Draw changes since the last call; called while the view is visible.
  show() {
    if (!this.#isStale) return;
    this.#isStale = false;
    this.#space.style.height = `${Math.max(1, this.#count) * LINE_HEIGHT}px`;
    if (this.#isFollowing) this.#box.scrollTop = this.#space.offsetHeight;
    this.#scan();
    this.#draw();
  }

  get #count() {
    return this.#filtered.length + (this.#prompt ? 1 : 0);
  }

  #draw(isForced = false) {
    const first = Math.max(0, Math.floor(this.#box.scrollTop / LINE_HEIGHT) - MARGIN_LINES);
    const last = Math.min(this.#count, first + Math.ceil(this.#box.clientHeight / LINE_HEIGHT) + 2 * MARGIN_LINES);
    const range = `${first}-${last}-${last > this.#filtered.length ? this.#prompt.text.length : ""}`;
    // Do not replace unchanged rows, so that selections survive.
    if (range === this.#range && !isForced) return;
    this.#range = range;
    const current = this.#find.at >= 0 ? this.#find.hits[this.#find.at] : -1;
    const rows = [];
    for (let at = first; at < last; at++) rows.push(this.#row(this.#filtered[at] ?? this.#prompt, at === current));
    this.#rowsElement.style.transform = `translateY(${first * LINE_HEIGHT}px)`;
    this.#rowsElement.replaceChildren(...rows);
  }

  #row(line, isCurrent) {
    const isCut = line.text.length > LINE_SHOWN_MAX;
    const text = h("span", { class: "line-text" });
    appendText(text, isCut ? line.text.slice(0, LINE_SHOWN_MAX) : line.text, this.#find.text);
    const row = h(
      "div",
      { class: `line ${line.stream}${isCurrent ? " found-now" : ""}` },
      h("span", { class: "line-at" }, clock(line.at)),
      text,
    );
    if (isCut)
      row.append(
        h("button", { type: "button", onclick: () => showLine(line.text) }, `Show all ${line.text.length} characters`),
      );
    return row;
  }

  #search(text) {
    clearTimeout(this.#find.timer);
    this.#find = { text: text.toLowerCase(), hits: [], at: -1, scanned: 0, timer: 0 };
    this.#scan();
    this.#draw(true);
  }

  // Search in time slices, which keeps the page responsive.
  #scan() {
    const find = this.#find;
    clearTimeout(find.timer);
    if (find.text) {
      const deadline = performance.now() + SLICE_MILLISECONDS;
      while (find.scanned < this.#filtered.length && performance.now() < deadline) {
        for (const stop = Math.min(find.scanned + 64, this.#filtered.length); find.scanned < stop; find.scanned++) {
          if (withoutColors(this.#filtered[find.scanned].text).toLowerCase().includes(find.text))
            find.hits.push(find.scanned);
        }
      }
      if (find.scanned < this.#filtered.length) find.timer = setTimeout(() => this.#scan(), 0);
    }
    const isDone = find.scanned >= this.#filtered.length;
    const position = find.at >= 0 ? `${find.at + 1} of ` : "";
    $("find-count").textContent = find.text ? `${position}${find.hits.length} lines${isDone ? "" : " so far"}` : "";
    $("find-on").disabled = $("find-back").disabled = find.hits.length === 0;
  }

  #goTo(step) {
    const find = this.#find;
    if (!find.hits.length) return;
    if (find.at < 0) {
      const top = this.#box.scrollTop / LINE_HEIGHT;
      const next = find.hits.findIndex((hit) => hit >= top);
      find.at = step > 0 ? Math.max(next, 0) : find.hits.length - 1;
    } else find.at = (find.at + step + find.hits.length) % find.hits.length;
    this.#isFollowing = false;
    this.#box.scrollTop = find.hits[find.at] * LINE_HEIGHT - this.#box.clientHeight / 2;
    this.#scan();
    this.#draw(true);
  }
}

function showLine(text) {
  const dialog = $("line-dialog");
  const content = dialog.querySelector("pre");
  content.replaceChildren();
  appendText(content, text.slice(0, LINE_OPENED_MAX));
  dialog.showModal();
}
