// The lines of a diff as table rows: line numbers, text with syntax colors, and marks on changed words.
import { count, h } from "/assets/page.js";
import { STYLES } from "/assets/syntax.js";
import { appendEscaped, elementLimit, visible } from "/assets/untrusted_text.js";
import { wordDiff } from "/assets/word_diff.js";

export const LINE_CHARACTERS_MAX = 5000;
const LINE_ELEMENTS_MAX = 400;

const CLASSES = { "+": "add", "-": "del", " ": "" };
const OLD = 0;
const NEW = 1;

// How the lines of one file are shown. `spans` is set when the syntax colors arrive: spans[2 * hunk + side].
export class LineStyle {
  spans = [];
  #words = new Map();

  // Show a carriage return unless every line of the file's diff ends with one.
  constructor(rows) {
    const lines = rows.filter((row) => row.kind !== "hunk");
    this.hidesCarriageReturns = lines.every((row) => row.text.endsWith("\r"));
  }

  // The ranges of changed words in a line.
  wordsOf(row) {
    if (!row.mate) return [];
    if (!this.#words.has(row)) {
      const [removed, added] = row.kind === "-" ? [row, row.mate] : [row.mate, row];
      const [removedRanges, addedRanges] = wordDiff(removed.text, added.text);
      this.#words.set(removed, removedRanges).set(added, addedRanges);
    }
    return this.#words.get(row);
  }

  spansOf(row) {
    const side = row.kind === "-" ? OLD : NEW;
    const spans = this.spans[2 * row.hunk + side];
    return spans?.length ? slice(spans, side === OLD ? row.oldOffset : row.newOffset, row.text.length) : [];
  }
}

// The spans within a line, relative to its start, as [start, end, class].
function slice(spans, offset, length) {
  let [low, high] = [0, spans.length / 3];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (spans[3 * middle + 1] <= offset) low = middle + 1;
    else high = middle;
  }
  const result = [];
  for (let at = 3 * low; at < spans.length && spans[at] < offset + length; at += 3)
    result.push([spans[at] - offset, spans[at + 1] - offset, STYLES[spans[at + 2]]]);
  return result;
}

// A row of the table. item: a row of the patch, or the pair [left, right] for the side-by-side view.
export function rowElement(item, style, left) {
  return Array.isArray(item) ? pairElement(item, style, left) : lineElement(item, style, left);
}

const hunkElement = (row, columns) => h("tr", { class: "hunk" }, h("td", { colspan: columns }, visible(row.text)));

function lineElement(row, style, left) {
  if (row.kind === "hunk") return hunkElement(row, 3);
  return h("tr", { class: CLASSES[row.kind] }, numberCell(row.old), numberCell(row.new), textCell(row, style, left));
}

function pairElement([before, after], style, left) {
  if (before?.kind === "hunk") return hunkElement(before, 4);
  const cells = [
    [before, before?.old],
    [after, after?.new],
  ].flatMap(([row, number]) => {
    const cells = row ? [numberCell(number), textCell(row, style, left)] : [numberCell(null), h("td", { class: "tx" })];
    const name = row ? CLASSES[row.kind] : "nothing";
    if (name) for (const cell of cells) cell.classList.add(name);
    return cells;
  });
  return h("tr", {}, ...cells);
}

const numberCell = (number) => h("td", { class: "ln" }, number == null ? "" : String(number));

function textCell(row, style, left) {
  const cell = h("td", { class: "tx" });
  fillText(cell, row, style, left);
  return cell;
}

// Replace the text of a cell. left: the number of elements that may still be created, shared by all cells.
export function fillText(cell, row, style, left) {
  const limit = elementLimit(Math.min(LINE_ELEMENTS_MAX, left.pieces));
  left.pieces -= limit.pieces;
  const parts = document.createDocumentFragment();
  const text = row.text.slice(0, LINE_CHARACTERS_MAX);
  for (const [start, end, names] of segments(text.length, style.spansOf(row), style.wordsOf(row))) {
    let parent = parts;
    if (names && limit.pieces > 0) {
      parent = parts.appendChild(h("span", { class: names }));
      limit.pieces--;
    }
    const part = text.slice(start, end);
    appendEscaped(parent, style.hidesCarriageReturns ? part : part.replaceAll("\r", "␍"), limit);
  }
  left.pieces += limit.pieces;
  const more = row.text.length - LINE_CHARACTERS_MAX;
  if (more > 0) parts.append(h("span", { class: "muted" }, ` … and ${count(more)} more characters`));
  if (row.isUnterminated) parts.append(h("span", { class: "unterminated muted" }, " (no newline at the end)"));
  cell.replaceChildren(parts);
}

// Split a text where its color or its mark changes: [start, end, classes].
function* segments(length, spans, words) {
  let [span, word] = [0, 0];
  for (let start = 0, end; start < length; start = end) {
    while (span < spans.length && spans[span][1] <= start) span++;
    while (word < words.length && words[word][1] <= start) word++;
    end = length;
    const names = [];
    if (span < spans.length) {
      const [from, to, name] = spans[span];
      end = Math.min(end, from > start ? from : to);
      if (from <= start) names.push(name);
    }
    if (word < words.length) {
      const [from, to] = words[word];
      end = Math.min(end, from > start ? from : to);
      if (from <= start) names.push("word");
    }
    yield [start, end, names.join(" ")];
  }
}
