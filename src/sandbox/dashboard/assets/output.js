// stdout, stderr and events as lines. Only visible lines have elements, which keeps long output responsive.
import { LineHeights } from "/assets/line_heights.js";
import { describe, jsonElement, toolResultElement } from "/assets/output_line.js";
import { $, clock, count, formatDuration, h, money } from "/assets/page.js";
import { TerminalScreen } from "/assets/terminal_screen.js";
import { appendText, withoutColors } from "/assets/untrusted_text.js";

const LINE_HEIGHT = 20;
const LINES_MAX = 200_000;
const CHARACTERS_MAX = 48_000_000;
const LINE_CHARACTERS_SHOWN_MAX = 2000;
const LINE_CHARACTERS_OPENED_MAX = 1_000_000;
const LINE_CHARACTERS_MAX = 4_000_000;
const MARGIN_LINES = 12;
const SLICE_MILLISECONDS = 10;
const DRAW_PASSES_MAX = 3;
const WRAP_SETTING = "sandbox.output.wrap";

const DESCRIPTIONS = {
  state_change: ({ previous_state, new_state, state_message }) =>
    `${previous_state ? `${previous_state} → ` : ""}${new_state}: ${state_message}`,
  tool_call: ({ tool, duration_ms, is_error }) =>
    `${tool}, ${formatDuration(duration_ms)}${is_error ? ", failed" : ""}`,
  usage: (event) =>
    `${event.model}: ${count(event.input_tokens)} tokens in, ${count(event.output_tokens)} out${event.cost_usd == null ? "" : `, ${money(event.cost_usd)}`}`,
  egress_denied: ({ host, port, reason }) => `${host}:${port} refused: ${reason}`,
  gap: ({ first_seq, last_seq, reason }) => `${first_seq} to ${last_seq} are missing: ${reason}`,
  error: ({ error, message }) => `${error}: ${message}`,
};

// These events end all partial lines.
export const BREAKS = new Set(["attempt", "gap", "end"]);

const NO_DESCRIPTION = { level: "", preview: null };

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
  #heights = new LineHeights();
  #screen = new TerminalScreen();
  #screenLines = []; // the lines that a terminal's program may still redraw, as of the last call of `show`
  #screenVersion = 0;
  #firmCount = 0; // the number of lines before them
  #columns = 100;
  #width = 0;
  #wraps = localStorage.getItem(WRAP_SETTING) !== "off";
  #isRaw = false;
  #isFollowing = true;
  #isStale = true;
  #range = "";

  // isTerminal: the output is what a terminal shows, so a program can redraw the last lines.
  constructor(isTerminal) {
    this.isTerminal = isTerminal;
    $("output-raw").hidden = isTerminal; // the download has the output as it was written
    if (isTerminal) this.#stream = "stdout"; // the screen's lines and the events have no common order
    this.#filter();
    this.#box.addEventListener("scroll", () => {
      this.#isFollowing = this.#box.scrollTop + this.#box.clientHeight >= this.#heights.total - LINE_HEIGHT;
      this.#draw();
    });
    new ResizeObserver(() => this.#resize()).observe(this.#box);
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
    $("output-wrap").addEventListener("click", () => this.toggleWrap());
    $("output-raw").addEventListener("click", () => this.#toggleRaw());
    this.#showSettings();
  }

  get count() {
    return this.#all.length + this.#droppedCount + this.#screen.lines.length;
  }

  toggleWrap() {
    this.#wraps = !this.#wraps;
    localStorage.setItem(WRAP_SETTING, this.#wraps ? "on" : "off");
    this.#showSettings();
    this.#measureAgain();
  }

  // Raw: every line as it was written.
  #toggleRaw() {
    this.#isRaw = !this.#isRaw;
    this.#showSettings();
    this.#measureAgain();
  }

  #showSettings() {
    $("output-wrap").setAttribute("aria-pressed", String(this.#wraps));
    $("output-raw").setAttribute("aria-pressed", String(this.#isRaw));
    for (const button of document.querySelectorAll("[data-stream]"))
      button.setAttribute("aria-pressed", String(button.dataset.stream === this.#stream));
    this.#box.classList.toggle("wraps", this.#wraps);
    this.#box.classList.toggle("raw", this.#isRaw);
  }

  handle(event) {
    if (BREAKS.has(event.type)) this.#breakLines();
    if (event.type === "output") this.#addOutput(event);
    else if (event.type in DESCRIPTIONS)
      this.#add("events", event.timestamp, `${event.type}  ${DESCRIPTIONS[event.type](event)}`);
  }

  #addOutput({ stream, timestamp, data, continued }) {
    if (this.isTerminal && stream === "stdout") {
      this.#addTerminalLines(this.#screen.write(data, timestamp));
      return;
    }
    const lines = data.split("\n");
    lines[0] = (this.#partial[stream]?.text ?? "") + lines[0];
    const rest = lines.pop();
    for (const line of lines) this.#add(stream, timestamp, line);
    this.#partial[stream] = rest ? { stream, at: timestamp, text: rest } : null;
    if (rest && (!continued || rest.length >= LINE_CHARACTERS_MAX)) this.#breakLine(stream);
  }

  #addTerminalLines(lines) {
    for (const { at, text } of lines) this.#add("stdout", at, text);
    this.#isStale = true;
  }

  #breakLine(stream) {
    const { at, text } = this.#partial[stream];
    this.#partial[stream] = null;
    this.#add(stream, at, text);
  }

  #breakLines() {
    for (const stream of Object.keys(this.#partial)) if (this.#partial[stream]) this.#breakLine(stream);
    this.#addTerminalLines(this.#screen.end());
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
    let number = 0;
    while (
      this.#all.length - number > LINES_MAX ||
      (this.#characters > CHARACTERS_MAX && number < this.#all.length - 1)
    ) {
      this.#characters -= this.#all[number++].text.length;
    }
    this.#all.splice(0, number);
    this.#droppedCount += number;
    const lengthBefore = this.#filtered.length;
    this.#filter();
    const dropped = this.#filtered === this.#all ? number : lengthBefore - this.#filtered.length;
    const height = this.#heights.dropFirst(Math.min(dropped, this.#heights.count));
    if (!this.#isFollowing) this.#box.scrollTop -= height;
    this.#search(this.#find.text);
    $("dropped").hidden = false;
    $("dropped").textContent =
      `This page no longer has the first ${count(this.#droppedCount)} lines; download the output to see all.`;
  }

  #filter() {
    this.#filtered = this.#stream === "all" ? this.#all : this.#all.filter((line) => line.stream === this.#stream);
  }

  #selectStream(button) {
    this.#stream = button.dataset.stream;
    this.#filter();
    this.#showSettings();
    this.#isFollowing = true;
    this.#heights.truncate(0);
    this.#search(this.#find.text);
    this.#isStale = true;
    this.show();
  }

  #resize() {
    const { clientWidth } = this.#box;
    if (clientWidth === this.#width) this.#draw();
    else if (clientWidth > 0) this.#measureAgain();
  }

  // Estimate all heights again, and keep the line at the top of the box in place.
  #measureAgain() {
    this.#width = this.#box.clientWidth;
    this.#columns = this.#measureColumns();
    const top = this.#heights.indexAt(this.#box.scrollTop);
    this.#heights.truncate(0);
    this.#isStale = true;
    this.show(true);
    if (!this.#isFollowing) this.#box.scrollTop = this.#heights.offsetOf(top);
  }

  // The number of characters that fit in one row.
  #measureColumns() {
    const probe = h("span", { class: "line-text" }, "0".repeat(100));
    const row = h("div", { class: "line stdout" }, ...this.#prefix({ stream: "stdout", at: 0 }), probe);
    this.#rowsElement.replaceChildren(row);
    this.#range = "";
    const box = row.getBoundingClientRect();
    const { left } = probe.getBoundingClientRect();
    const range = document.createRange();
    range.setStart(probe.firstChild, 0);
    range.setEnd(probe.firstChild, 1);
    const width = range.getBoundingClientRect().width || 7.2;
    return Math.max(10, Math.floor((box.right - left - 12) / width));
  }

  #estimate(line) {
    if (!this.#wraps) return LINE_HEIGHT;
    const length = Math.min(line.text.length, LINE_CHARACTERS_SHOWN_MAX);
    return LINE_HEIGHT * Math.max(1, Math.ceil(length / this.#columns));
  }

  // Draw changes since the last call; called while the view is visible.
  show(isForced = false) {
    if (!this.#isStale) return;
    this.#isStale = false;
    this.#readScreen();
    for (let at = this.#heights.count; at < this.#count; at++) this.#heights.push(this.#estimate(this.#line(at)));
    this.#updateSpace();
    this.#scan();
    this.#draw(isForced);
  }

  #readScreen() {
    const isShown = this.#stream === "all" || this.#stream === "stdout";
    this.#screenLines = isShown ? this.#screen.lines.map((line) => ({ stream: "stdout", ...line })) : [];
    const count = Math.min(this.#firmCount, this.#filtered.length);
    this.#firmCount = this.#filtered.length;
    if (!this.isTerminal) return;
    this.#heights.truncate(count);
    this.#forgetMatches(count);
    this.#screenVersion++;
  }

  #updateSpace() {
    this.#space.style.height = `${Math.max(LINE_HEIGHT, this.#heights.total)}px`;
    if (this.#isFollowing) this.#box.scrollTop = this.#heights.total;
  }

  get #count() {
    return this.#filtered.length + this.#screenLines.length;
  }

  #line(at) {
    return this.#filtered[at] ?? this.#screenLines[at - this.#filtered.length];
  }

  // The actual heights can move other rows into view: draw again.
  #draw(isForced = false) {
    if (!this.#box.clientHeight) return;
    for (let pass = 0; pass < DRAW_PASSES_MAX; pass++) if (!this.#drawOnce(isForced && pass === 0)) return;
  }

  // Return whether a height has changed.
  #drawOnce(isForced) {
    const { scrollTop, clientHeight } = this.#box;
    const count = Math.min(this.#count, this.#heights.count);
    const top = this.#heights.indexAt(scrollTop);
    const first = Math.max(0, top - MARGIN_LINES);
    const last = Math.min(count, this.#heights.indexAt(scrollTop + clientHeight) + 1 + MARGIN_LINES);
    const range = `${first}-${last}-${last > this.#filtered.length ? this.#screenVersion : ""}`;
    // Do not replace unchanged rows, so that selections survive.
    if (range === this.#range && !isForced) return false;
    this.#range = range;
    const current = this.#find.at >= 0 ? this.#find.hits[this.#find.at] : -1;
    const rows = [];
    for (let at = first; at < last; at++) rows.push(this.#row(this.#line(at), at === current));
    this.#rowsElement.style.transform = `translateY(${this.#heights.offsetOf(first)}px)`;
    this.#rowsElement.replaceChildren(...rows);
    return this.#measureRows(rows, first, top);
  }

  #measureRows(rows, first, top) {
    let above = 0;
    let change = 0;
    rows.forEach(({ offsetHeight }, at) => {
      const difference = this.#heights.set(first + at, offsetHeight);
      change += Math.abs(difference);
      if (first + at < top) above += difference;
    });
    if (!change) return false;
    this.#updateSpace();
    if (above && !this.#isFollowing) this.#box.scrollTop += above;
    return true;
  }

  #prefix({ stream, at }) {
    return [
      h("span", { class: "line-at" }, clock(at)),
      this.#isRaw ? null : h("span", { class: "line-stream" }, stream === "events" ? "event" : stream),
    ];
  }

  // Terminal output is not interpreted.
  #isPlain(line) {
    return this.#isRaw || this.isTerminal || line.stream === "events";
  }

  #row(line, isCurrent) {
    const { level, preview } = this.#isPlain(line) ? NO_DESCRIPTION : describe(line);
    const style = `line ${line.stream}${level && ` level-${level}`}${isCurrent ? " found-now" : ""}`;
    const row = h("div", { class: style }, ...this.#prefix(line));
    // Do not fold a line that matches the search.
    const isMatch = this.#find.text && withoutColors(line.text).toLowerCase().includes(this.#find.text);
    if (preview !== null && !isMatch) row.append(...this.#foldedJson(line, preview));
    else this.#appendLine(row, line);
    return row;
  }

  #appendLine(row, line) {
    const isCut = line.text.length > LINE_CHARACTERS_SHOWN_MAX;
    const text = h("span", { class: "line-text" });
    appendText(text, isCut ? line.text.slice(0, LINE_CHARACTERS_SHOWN_MAX) : line.text, this.#find.text);
    row.append(text);
    if (isCut)
      row.append(
        h(
          "button",
          { type: "button", onclick: () => showLine(line.text) },
          `Show all ${count(line.text.length)} characters`,
        ),
      );
  }

  #foldedJson(line, preview) {
    const { kind, moreLines } = describe(line);
    const toggle = () => {
      line.isOpen = !line.isOpen;
      const at = [...this.#rowsElement.children].findIndex((row) => row.contains(button));
      this.#isFollowing = false;
      this.#draw(true);
      this.#rowsElement.children[at]?.querySelector(".line-fold")?.focus();
    };
    const button = h(
      "button",
      {
        type: "button",
        class: "line-fold",
        "aria-expanded": String(line.isOpen === true),
        "aria-label": moreLines ? "Tool result" : "JSON",
        onclick: toggle,
      },
      line.isOpen ? "▾" : "▸",
    );
    const text = h("span", { class: kind ? "line-text" : "line-text folded" });
    if (kind && (moreLines || !line.isOpen))
      appendText(text.appendChild(h("span", { class: "line-kind" })), `${kind}:`);
    if (line.isOpen) text.append(moreLines ? toolResultElement(line.text) : jsonElement(line.text, kind !== undefined));
    else if (kind) {
      appendText(text, ` ${preview}`);
      const more = `+${count(moreLines)} line${moreLines === 1 ? "" : "s"}`;
      if (moreLines) text.append(" ", h("button", { type: "button", tabindex: "-1", onclick: toggle }, more));
    } else appendText(text, preview);
    return [button, text];
  }

  #search(text) {
    clearTimeout(this.#find.timer);
    this.#find = { text: text.toLowerCase(), hits: [], at: -1, scanned: 0, timer: 0 };
    this.#scan();
    this.#draw(true);
  }

  // Forget the matches from this line on: a program has redrawn them.
  #forgetMatches(first) {
    const find = this.#find;
    find.scanned = Math.min(find.scanned, first);
    while (find.hits.at(-1) >= first) find.hits.pop();
    find.at = Math.min(find.at, find.hits.length - 1);
  }

  // Search in time slices, which keeps the page responsive.
  #scan() {
    const find = this.#find;
    clearTimeout(find.timer);
    if (find.text) {
      const deadline = performance.now() + SLICE_MILLISECONDS;
      while (find.scanned < this.#count && performance.now() < deadline) {
        for (const stop = Math.min(find.scanned + 64, this.#count); find.scanned < stop; find.scanned++) {
          if (withoutColors(this.#line(find.scanned).text).toLowerCase().includes(find.text))
            find.hits.push(find.scanned);
        }
      }
      if (find.scanned < this.#count) find.timer = setTimeout(() => this.#scan(), 0);
    }
    const isDone = find.scanned >= this.#count;
    const position = find.at >= 0 ? `${find.at + 1} of ` : "";
    $("find-count").textContent = find.text
      ? `${position}${count(find.hits.length)} lines${isDone ? "" : " so far"}`
      : "";
    $("find-on").disabled = $("find-back").disabled = find.hits.length === 0;
  }

  #goTo(step) {
    const find = this.#find;
    if (!find.hits.length) return;
    if (find.at < 0) {
      const top = this.#heights.indexAt(this.#box.scrollTop);
      const next = find.hits.findIndex((hit) => hit >= top);
      find.at = step > 0 ? Math.max(next, 0) : find.hits.length - 1;
    } else find.at = (find.at + step + find.hits.length) % find.hits.length;
    this.#isFollowing = false;
    this.#scan();
    // Until lines come into view, their heights are only estimates.
    for (let layout = 0; layout < 2; layout++) {
      this.#box.scrollTop = this.#heights.offsetOf(find.hits[find.at]) - this.#box.clientHeight / 2;
      this.#draw(true);
    }
  }
}

function showLine(text) {
  const dialog = $("line-dialog");
  const content = dialog.querySelector("pre");
  content.replaceChildren();
  appendText(content, text.slice(0, LINE_CHARACTERS_OPENED_MAX));
  dialog.showModal();
}
