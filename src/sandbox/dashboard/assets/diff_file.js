// One file of a patch: a sticky header, and lines that are rendered in blocks when they come into view.
import { fillText, LineStyle, rowElement } from "/assets/diff_lines.js";
import { h, lineCounts } from "/assets/page.js";
import { kindOf, noteOf, rowsOf, sideTexts, splitRowCount, splitRows } from "/assets/patch.js";
import { highlight, languageOf } from "/assets/syntax.js";
import { elementLimit, visibleName } from "/assets/untrusted_text.js";
import { pause } from "/assets/yield_to_browser.js";

const BLOCK_ROWS = 50;
const BLOCK_ELEMENTS_MAX = 4000;
// Longer files are initially closed.
const LINES_OPENED_MAX = 3000;
const AHEAD_PIXELS = 1500;
// Row heights, the same as in changes.css.
const LINE_PIXELS = 20;
const HUNK_PIXELS = 28;

const handlers = new WeakMap();
const observer = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      handlers.get(target)?.();
    }
  },
  { rootMargin: `${AHEAD_PIXELS}px 0px` },
);

function whenNear(element, handle) {
  handlers.set(element, handle);
  observer.observe(element);
}

export class FileView {
  isOpen = false;
  items = null; // rows, or pairs of rows
  #blocks = [];
  #style = null;

  // review: { isSplit, isViewed(file), setViewed(view, isViewed), commentsAt(file, row, isSplit), showOpened() }
  constructor(file, at, review) {
    Object.assign(this, { file, at, review });
    this.lineCount = file.hunks.reduce((sum, hunk) => sum + hunk.lines.length, 0);
    this.isViewed = review.isViewed(file);
    this.#createHead();
    this.body = h("div", { class: "diff-body", hidden: true });
    this.element = h("section", { class: "file", "data-at": at, "aria-label": visibleName(file.path) }, this.head);
    this.element.append(this.body);
    this.#showViewed();
    if (!this.isViewed && this.lineCount <= LINES_OPENED_MAX) this.open();
  }

  #createHead() {
    const { file } = this;
    const name = file.oldPath === file.path ? file.path : `${file.oldPath} → ${file.path}`;
    const kind = kindOf(file);
    this.toggle = h(
      "button",
      { type: "button", class: "file-toggle", "aria-expanded": "false", onclick: () => this.setOpen(!this.isOpen) },
      h("span", { class: "file-path" }, visibleName(name)),
    );
    this.viewedButton = h(
      "button",
      { type: "button", class: "file-viewed", onclick: () => this.review.setViewed(this, !this.isViewed) },
      "Viewed",
    );
    this.head = h(
      "div",
      { class: "file-head" },
      this.toggle,
      kind ? h("span", { class: "file-kind" }, kind) : null,
      ...lineCounts(file.plus, file.minus),
      this.viewedButton,
    );
  }

  setOpen(isOpen) {
    if (isOpen) this.open();
    else this.close();
    this.review.showOpened();
  }

  open() {
    if (this.isOpen) return;
    this.isOpen = true;
    this.toggle.setAttribute("aria-expanded", "true");
    this.body.hidden = false;
    if (this.items || this.body.childElementCount) return;
    const note = noteOf(this.file);
    if (note) this.body.append(h("p", { class: "empty-note muted" }, note));
    if (!this.lineCount) return;
    this.body.style.height = `${this.#rowCount() * LINE_PIXELS + this.file.hunks.length * HUNK_PIXELS}px`;
    whenNear(this.body, () => this.#createBlocks());
  }

  #rowCount() {
    if (!this.review.isSplit) return this.lineCount;
    return this.file.hunks.reduce((sum, hunk) => sum + splitRowCount(hunk.lines), 0);
  }

  close() {
    this.isOpen = false;
    this.toggle.setAttribute("aria-expanded", "false");
    this.body.hidden = true;
  }

  setViewed(isViewed) {
    this.isViewed = isViewed;
    this.#showViewed();
    this.setOpen(!isViewed);
  }

  #showViewed() {
    this.viewedButton.setAttribute("aria-pressed", String(this.isViewed));
    this.element.classList.toggle("viewed", this.isViewed);
  }

  // Show the lines again, in a different layout or with different comments.
  redraw() {
    for (const block of this.#blocks) observer.unobserve(block.element);
    this.#blocks = [];
    this.items = null;
    this.body.replaceChildren();
    if (!this.isOpen) return;
    this.isOpen = false;
    this.open();
  }

  #createBlocks() {
    if (this.items) return;
    const rows = rowsOf(this.file);
    if (!this.#style) {
      this.#style = new LineStyle(rows);
      this.#highlight();
    }
    this.items = this.review.isSplit ? splitRows(rows) : rows;
    this.body.style.height = "";
    for (let first = 0; first < this.items.length; first += BLOCK_ROWS) {
      const items = this.items.slice(first, first + BLOCK_ROWS);
      const block = { items, first, element: h("div", { class: "diff-block" }), cells: null };
      const height = `${items.reduce((sum, item) => sum + pixels(item), 0)}px`;
      block.element.style.height = height;
      block.element.style.containIntrinsicBlockSize = `auto ${height}`;
      this.#blocks.push(block);
      whenNear(block.element, async () => {
        await pause();
        if (this.#blocks.includes(block)) this.#render(block);
      });
    }
    this.body.append(...this.#blocks.map((block) => block.element));
  }

  #render(block) {
    if (block.cells) return;
    block.cells = [];
    const left = elementLimit(BLOCK_ELEMENTS_MAX);
    const body = h("tbody");
    block.items.forEach((item, at) => {
      const element = rowElement(item, this.#style, left);
      element.dataset.row = block.first + at;
      body.append(element);
      for (const row of new Set([item].flat()))
        if (row && row.kind !== "hunk") body.append(...this.review.commentsAt(this.file, row, this.review.isSplit));
      this.#collectCells(block, item, element);
    });
    const widths = this.review.isSplit ? ["ln", "", "ln", ""] : ["ln", "ln", ""];
    const columns = h("colgroup", {}, ...widths.map((name) => h("col", { class: name })));
    block.element.replaceChildren(h("table", { class: this.review.isSplit ? "split" : "" }, columns, body));
    block.element.style.height = "";
    observer.unobserve(block.element);
  }

  #collectCells(block, item, element) {
    const cells = element.querySelectorAll(".tx");
    for (const [at, row] of [item].flat().entries()) if (row && cells[at]) block.cells.push([cells[at], row]);
  }

  async #highlight() {
    const language = languageOf(this.file.path);
    if (!language) return;
    this.#style.spans = await highlight(language, this.file.hunks.flatMap(sideTexts));
    if (!this.#style.spans.length) return;
    for (const block of this.#blocks) {
      await pause();
      if (!block.cells) continue;
      const left = elementLimit(BLOCK_ELEMENTS_MAX);
      for (const [cell, row] of block.cells) fillText(cell, row, this.#style, left);
    }
  }

  // The indexes of items at which a change begins.
  changeStarts() {
    if (!this.lineCount) return [];
    this.#createBlocks();
    return this.items.flatMap((item, at) => (isChange(item) && !(at && isChange(this.items[at - 1])) ? [at] : []));
  }

  // The line for a comment on the change at this item: the added line, if the change replaces removed lines.
  commentedLineOf(at) {
    let next = at;
    while (this.items[next]?.kind === "-") next++;
    return this.items[next]?.kind === "+" ? next : at;
  }

  // The element of an item; renders it if necessary.
  elementOf(at) {
    this.open();
    this.#createBlocks();
    const block = this.#blocks[Math.floor(at / BLOCK_ROWS)];
    this.#render(block);
    return block.element.querySelector(`tr[data-row="${at}"]`);
  }
}

const pixels = (item) => ((Array.isArray(item) ? item[0] : item)?.kind === "hunk" ? HUNK_PIXELS : LINE_PIXELS);

const isChange = (item) =>
  Array.isArray(item) ? item[0]?.kind !== "hunk" && item[0] !== item[1] : item.kind === "+" || item.kind === "-";
