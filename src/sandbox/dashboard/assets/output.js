// stdout, stderr and events by line. Only the lines on the screen are elements, so that any number can be scrolled.
import { $, clock, h, money, span } from "/assets/page.js";
import { put, withoutColours } from "/assets/plain.js";

const LINE_HEIGHT = 20;
const LINES_MAX = 200_000;
const CHARACTERS_MAX = 48_000_000;
const LINE_SHOWN_MAX = 2000;
const LINE_OPENED_MAX = 1_000_000;
const LINE_MAX = 4_000_000;
const MARGIN_LINES = 12;
const SLICE_MILLISECONDS = 10;

const SAID = {
  state_change: ({ previous_state, new_state, state_message }) => `${previous_state ?? ""} → ${new_state}: ${state_message}`,
  tool_call: ({ tool, duration_ms, is_error }) => `${tool}, ${span(duration_ms)}${is_error ? ", failed" : ""}`,
  usage: (told) => `${told.model}: ${told.input_tokens} tokens in, ${told.output_tokens} out${told.cost_usd == null ? "" : `, ${money(told.cost_usd)}`}`,
  egress_denied: ({ host, port, reason }) => `${host}:${port} refused: ${reason}`,
  gap: ({ first_seq, last_seq, reason }) => `${first_seq} to ${last_seq} are missing: ${reason}`,
  error: ({ error, message }) => `${error}: ${message}`,
};

// What is told after these belongs to no line that was begun before them.
export const BREAKS = new Set(["attempt", "gap", "end"]);

export class Output {
  #all = [];
  #shown = this.#all;
  #stream = "all";
  #characters = 0;
  #dropped = 0;
  #begun = { stdout: null, stderr: null };
  #box = $("lines");
  #space = this.#box.firstElementChild;
  #place = this.#space.firstElementChild;
  #find = { text: "", hits: [], at: -1, scanned: 0, timer: 0 };
  #follows = true;
  #isStale = true;
  #range = "";

  // isTerminal: what comes are no lines, and what waits for its end is shown too.
  constructor(isTerminal) {
    this.isTerminal = isTerminal;
    this.#box.addEventListener("scroll", () => {
      this.#follows = this.#box.scrollTop + this.#box.clientHeight >= this.#space.offsetHeight - LINE_HEIGHT;
      this.#draw();
    });
    new ResizeObserver(() => this.#draw()).observe(this.#box);
    for (const button of document.querySelectorAll("[data-stream]")) button.addEventListener("click", () => this.#choose(button));
    $("find").addEventListener("input", () => this.#search($("find").value));
    $("find").addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        event.preventDefault();
        this.#go(event.shiftKey ? -1 : 1);
      }
    });
    $("find-on").addEventListener("click", () => this.#go(1));
    $("find-back").addEventListener("click", () => this.#go(-1));
  }

  get count() {
    return this.#all.length + this.#dropped;
  }

  take(frame) {
    if (BREAKS.has(frame.type)) this.#breakLines();
    if (frame.type === "output") this.#takeOutput(frame);
    else if (frame.type in SAID) this.#add("events", frame.timestamp, `${frame.type}  ${SAID[frame.type](frame)}`);
  }

  #takeOutput({ stream, timestamp, data, continued }) {
    const lines = data.split("\n");
    lines[0] = (this.#begun[stream]?.text ?? "") + lines[0];
    const rest = lines.pop();
    for (const line of lines) this.#add(stream, timestamp, line);
    this.#begun[stream] = rest ? { stream, at: timestamp, text: rest } : null;
    if (rest && (!continued || rest.length >= LINE_MAX)) this.#breakLine(stream);
    this.#isStale ||= this.isTerminal;
  }

  #breakLine(stream) {
    const { at, text } = this.#begun[stream];
    this.#begun[stream] = null;
    this.#add(stream, at, text);
  }

  #breakLines() {
    for (const stream of Object.keys(this.#begun)) if (this.#begun[stream]) this.#breakLine(stream);
  }

  // What a terminal shows behind its last whole line, a prompt for example.
  get #prompt() {
    const isIt = this.isTerminal && (this.#stream === "all" || this.#stream === "stdout");
    return isIt ? this.#begun.stdout : null;
  }

  #add(stream, at, text) {
    const line = { stream, at, text };
    this.#all.push(line);
    if (this.#shown !== this.#all && stream === this.#stream) this.#shown.push(line);
    this.#characters += text.length;
    if (this.#all.length > LINES_MAX * 1.05 || this.#characters > CHARACTERS_MAX * 1.05) this.#drop();
    this.#isStale = true;
  }

  #drop() {
    let gone = 0;
    while (this.#all.length - gone > LINES_MAX || (this.#characters > CHARACTERS_MAX && gone < this.#all.length - 1)) {
      this.#characters -= this.#all[gone++].text.length;
    }
    this.#all.splice(0, gone);
    this.#dropped += gone;
    const shown = this.#shown.length;
    if (this.#shown !== this.#all) this.#shown = this.#all.filter((line) => line.stream === this.#stream);
    if (!this.#follows) this.#box.scrollTop -= (this.#shown === this.#all ? gone : shown - this.#shown.length) * LINE_HEIGHT;
    this.#search(this.#find.text);
    $("dropped").hidden = false;
    $("dropped").textContent = `The first ${this.#dropped} lines are not kept here; the download has them all.`;
  }

  #choose(button) {
    for (const each of document.querySelectorAll("[data-stream]")) each.setAttribute("aria-pressed", String(each === button));
    this.#stream = button.dataset.stream;
    this.#shown = this.#stream === "all" ? this.#all : this.#all.filter((line) => line.stream === this.#stream);
    this.#follows = true;
    this.#search(this.#find.text);
    this.#isStale = true;
    this.show();
  }

  // Draws what has changed since; called while the view can be seen.
  show() {
    if (!this.#isStale) return;
    this.#isStale = false;
    this.#space.style.height = `${Math.max(1, this.#count) * LINE_HEIGHT}px`;
    if (this.#follows) this.#box.scrollTop = this.#space.offsetHeight;
    this.#scan();
    this.#draw();
  }

  get #count() {
    return this.#shown.length + (this.#prompt ? 1 : 0);
  }

  #draw(isAnew = false) {
    const first = Math.max(0, Math.floor(this.#box.scrollTop / LINE_HEIGHT) - MARGIN_LINES);
    const last = Math.min(this.#count, first + Math.ceil(this.#box.clientHeight / LINE_HEIGHT) + 2 * MARGIN_LINES);
    const range = `${first}-${last}-${last > this.#shown.length ? this.#prompt.text.length : ""}`;
    // Rows stay as they are while they can, with what a reader has chosen in them.
    if (range === this.#range && !isAnew) return;
    this.#range = range;
    const now = this.#find.at >= 0 ? this.#find.hits[this.#find.at] : -1;
    const rows = [];
    for (let at = first; at < last; at++) rows.push(this.#row(this.#shown[at] ?? this.#prompt, at === now));
    this.#place.style.transform = `translateY(${first * LINE_HEIGHT}px)`;
    this.#place.replaceChildren(...rows);
  }

  #row(line, isNow) {
    const isCut = line.text.length > LINE_SHOWN_MAX;
    const text = h("span", { class: "line-text" });
    put(text, isCut ? line.text.slice(0, LINE_SHOWN_MAX) : line.text, this.#find.text);
    const row = h("div", { class: `line ${line.stream}${isNow ? " found-now" : ""}` }, h("span", { class: "line-at" }, clock(line.at)), text);
    if (isCut) row.append(h("button", { type: "button", onclick: () => open(line.text) }, `all ${line.text.length} characters`));
    return row;
  }

  #search(text) {
    clearTimeout(this.#find.timer);
    this.#find = { text: text.toLowerCase(), hits: [], at: -1, scanned: 0, timer: 0 };
    this.#scan();
    this.#draw(true);
  }

  // In slices, so that the page stays responsive whatever there is to search.
  #scan() {
    const find = this.#find;
    clearTimeout(find.timer);
    if (find.text) {
      const until = performance.now() + SLICE_MILLISECONDS;
      while (find.scanned < this.#shown.length && performance.now() < until) {
        for (const stop = Math.min(find.scanned + 64, this.#shown.length); find.scanned < stop; find.scanned++) {
          if (withoutColours(this.#shown[find.scanned].text).toLowerCase().includes(find.text)) find.hits.push(find.scanned);
        }
      }
      if (find.scanned < this.#shown.length) find.timer = setTimeout(() => this.#scan(), 0);
    }
    const isDone = find.scanned >= this.#shown.length;
    const place = find.at >= 0 ? `${find.at + 1} of ` : "";
    $("find-count").textContent = find.text ? `${place}${find.hits.length}${isDone ? "" : " so far"} lines` : "";
    $("find-on").disabled = $("find-back").disabled = find.hits.length === 0;
  }

  #go(step) {
    const find = this.#find;
    if (!find.hits.length) return;
    if (find.at < 0) {
      const top = this.#box.scrollTop / LINE_HEIGHT;
      const next = find.hits.findIndex((hit) => hit >= top);
      find.at = step > 0 ? Math.max(next, 0) : find.hits.length - 1;
    } else find.at = (find.at + step + find.hits.length) % find.hits.length;
    this.#follows = false;
    this.#box.scrollTop = find.hits[find.at] * LINE_HEIGHT - this.#box.clientHeight / 2;
    this.#scan();
    this.#draw(true);
  }
}

function open(text) {
  const dialog = $("line-dialog");
  const place = dialog.querySelector("pre");
  place.replaceChildren();
  put(place, text.slice(0, LINE_OPENED_MAX));
  dialog.showModal();
}
