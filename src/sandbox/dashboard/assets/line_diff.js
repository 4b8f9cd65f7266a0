// The line-by-line diff of two texts, for edits in the conversation.
import { count, h } from "/assets/page.js";
import { appendText, elementLimit, visibleName } from "/assets/untrusted_text.js";

export const COMPARISONS_MAX = 400_000;
const CONTEXT_LINES = 3;
const LINES_SHOWN = 40;
const LINES_SHOWN_MAX = 2000;
const LINE_CHARACTERS_MAX = 5000;

// Compare the two sides of an edit; `before` is null for a new file. Returns [sign, line] pairs, and the counts of added
// and deleted lines.
export function diffLines(before, after, comparisonsMax = COMPARISONS_MAX) {
  const old = before === null ? [] : splitLines(before);
  const now = splitLines(after);
  let start = 0;
  while (start < old.length && start < now.length && old[start] === now[start]) start++;
  let end = 0;
  while (end < old.length - start && end < now.length - start && old.at(-1 - end) === now.at(-1 - end)) end++;
  const rows = [
    ...old.slice(0, start).map((line) => [" ", line]),
    ...compare(old.slice(start, old.length - end), now.slice(start, now.length - end), comparisonsMax),
    ...old.slice(old.length - end).map((line) => [" ", line]),
  ];
  const tally = (sign) => rows.reduce((sum, row) => sum + (row[0] === sign), 0);
  return { rows, additions: tally("+"), deletions: tally("-") };
}

function splitLines(text) {
  const lines = text.split("\n");
  if (lines.at(-1) === "") lines.pop();
  return lines;
}

// Above the limit, all lines count as replaced: the time and memory of a comparison are proportional to the product of
// the lengths.
function compare(old, now, comparisonsMax) {
  if (old.length * now.length > comparisonsMax)
    return [...old.map((line) => ["-", line]), ...now.map((line) => ["+", line])];
  const width = now.length + 1;
  const common = new Uint32Array((old.length + 1) * width);
  for (let i = old.length - 1; i >= 0; i--)
    for (let j = now.length - 1; j >= 0; j--)
      common[i * width + j] =
        old[i] === now[j]
          ? common[(i + 1) * width + j + 1] + 1
          : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
  const rows = [];
  let i = 0;
  let j = 0;
  while (i < old.length || j < now.length) {
    if (i < old.length && j < now.length && old[i] === now[j]) {
      rows.push([" ", old[i++]]);
      j++;
    } else if (j === now.length || (i < old.length && common[(i + 1) * width + j] >= common[i * width + j + 1]))
      rows.push(["-", old[i++]]);
    else rows.push(["+", now[j++]]);
  }
  return rows;
}

// Replace long runs of unchanged lines with their count.
function withoutContext(rows) {
  const isNear = new Uint8Array(rows.length);
  rows.forEach(([sign], at) => {
    if (sign !== " ") isNear.fill(1, Math.max(0, at - CONTEXT_LINES), at + CONTEXT_LINES + 1);
  });
  const shown = [];
  for (let at = 0; at < rows.length; at++) {
    let end = at;
    while (end < rows.length && !isNear[end]) end++;
    if (end - at > 1) {
      shown.push(["…", `${end - at} unchanged lines`]);
      at = end - 1;
    } else shown.push(rows[at]);
  }
  return shown;
}

// Create the element of a diff: its first lines, and a button for the rest.
export function diffElement(path, { rows }) {
  const shown = withoutContext(rows);
  const element = h("div", {
    class: "line-diff",
    tabindex: "0",
    role: "group",
    "aria-label": `Changes to ${visibleName(path)}`,
  });
  const left = elementLimit();
  const append = (first, end) => element.append(...shown.slice(first, end).map((row) => rowElement(row, left)));
  append(0, LINES_SHOWN);
  if (shown.length <= LINES_SHOWN) return element;
  const showAll = () => {
    more.remove();
    append(LINES_SHOWN, LINES_SHOWN_MAX);
    const omitted = shown.length - LINES_SHOWN_MAX;
    if (omitted > 0) element.append(h("p", { class: "muted" }, `… and ${omitted} more lines`));
  };
  const more = h(
    "button",
    { type: "button", class: "quiet", onclick: showAll },
    `Show all ${count(shown.length)} lines`,
  );
  element.append(more);
  return element;
}

const CLASSES = { "+": "add", "-": "del", "…": "gap" };

function rowElement([sign, line], left) {
  const text = h("span", { class: "tx" });
  const isCut = line.length > LINE_CHARACTERS_MAX;
  appendText(text, isCut ? `${line.slice(0, LINE_CHARACTERS_MAX)}…` : line, "", left);
  return h("div", { class: CLASSES[sign] ?? false }, h("span", { class: "sign" }, sign === "-" ? "−" : sign), text);
}
