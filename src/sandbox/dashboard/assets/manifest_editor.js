// The YAML editor: line numbers and colors behind a text area, and marks in lines with errors.
import { h } from "/assets/page.js";

const HIGHLIGHTED_CHARACTERS_MAX = 60_000;
const LINE_HEIGHT = 20;

const LINE =
  /^(\s*(?:- )?)([\w.$-]+|"[^"]*")(:)(?=\s|$)|(#.*$)|("(?:[^"\\]|\\.)*"?|'[^']*'?)|(?<![\w.-])(\d[\w.]*|true|false|null)(?![\w.-])/g;

function painted(line) {
  const pieces = [];
  let end = 0;
  LINE.lastIndex = 0;
  for (let match; (match = LINE.exec(line)); end = LINE.lastIndex) {
    const isInWord = match[4] && match.index > 0 && !/\s/.test(line[match.index - 1]);
    if (isInWord) continue;
    if (match.index > end) pieces.push(line.slice(end, match.index));
    if (match[2]) pieces.push(match[1], h("span", { class: "y-k" }, match[2]), match[3]);
    else pieces.push(h("span", { class: match[4] ? "y-c" : match[5] ? "y-s" : "y-n" }, match[0]));
  }
  pieces.push(line.slice(end));
  return pieces;
}

export class ManifestEditor {
  // element: contains the text area, the colored text and the line numbers.
  constructor(element) {
    this.textarea = element.querySelector("textarea");
    this.overlay = element.querySelector(".editor-overlay");
    this.gutter = element.querySelector(".editor-gutter");
    this.badLines = new Set();
    this.textarea.addEventListener("scroll", () => this.#syncScroll());
    this.textarea.addEventListener("keydown", (event) => this.#indent(event));
    // Adjust the height of the gutter when the user resizes the text area.
    new ResizeObserver(() => (this.gutter.style.height = `${this.textarea.offsetHeight}px`)).observe(this.textarea);
  }

  get text() {
    return this.textarea.value;
  }

  set text(text) {
    this.textarea.value = text;
    this.show();
  }

  mark(lines) {
    this.badLines = new Set(lines);
    this.show();
  }

  show() {
    const lines = this.text.split("\n");
    if (this.text.length > HIGHLIGHTED_CHARACTERS_MAX) this.overlay.replaceChildren(this.text);
    else this.overlay.replaceChildren(...lines.flatMap((line, at) => this.#row(line, at + 1)));
    this.gutter.replaceChildren(
      ...lines.flatMap((_, at) => [
        h("span", { class: this.badLines.has(at + 1) && "at-fault" }, String(at + 1)),
        "\n",
      ]),
    );
    this.#syncScroll();
  }

  goTo(line, column) {
    this.textarea.focus();
    if (!line) return;
    const before = this.text.split("\n").slice(0, line - 1);
    const at = before.reduce((sum, each) => sum + each.length + 1, 0) + Math.max(0, (column ?? 1) - 1);
    this.textarea.setSelectionRange(at, at);
    this.textarea.scrollTop = Math.max(0, (line - 6) * LINE_HEIGHT);
  }

  #row(line, number) {
    if (!this.badLines.has(number)) return [...painted(line), "\n"];
    const indent = /^\s*/.exec(line)[0];
    return [indent, h("span", { class: "y-bad" }, ...painted(line.slice(indent.length))), "\n"];
  }

  #syncScroll() {
    this.overlay.scrollTop = this.gutter.scrollTop = this.textarea.scrollTop;
    this.overlay.scrollLeft = this.textarea.scrollLeft;
  }

  #indent(event) {
    if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
    const before = this.text.slice(0, this.textarea.selectionStart);
    const indent = /^\s*/.exec(before.slice(before.lastIndexOf("\n") + 1))[0];
    if (!indent) return;
    event.preventDefault();
    document.execCommand("insertText", false, `\n${indent}`);
  }
}
