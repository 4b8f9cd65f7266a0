// A patch in git's format, parsed into files, hunks and lines.
import { pause } from "/assets/yield_to_browser.js";

const SLICE_LINES = 2000;
const LINK_MODE = "120000";
const SUBMODULE_MODE = "160000";

// Parse a complete patch without pausing.
export function parse(patch) {
  const parser = new PatchParser();
  for (const line of linesOf(patch)) parser.push(line);
  return parser.files;
}

// Parse without blocking the page: a patch can have millions of lines.
export async function parseInSlices(patch) {
  const parser = new PatchParser();
  let left = SLICE_LINES;
  for (const line of linesOf(patch)) {
    parser.push(line);
    if (--left > 0) continue;
    left = SLICE_LINES;
    await pause();
  }
  return parser.files;
}

function* linesOf(text) {
  for (let begin = 0, end; begin <= text.length; begin = end + 1) {
    end = text.indexOf("\n", begin);
    if (end < 0) end = text.length;
    yield text.slice(begin, end);
  }
}

class PatchParser {
  files = [];
  #file = null;
  #hunk = null;

  push(line) {
    if (line.startsWith("diff --git ")) this.#begin(line);
    else if (this.#file) this.#pushToFile(line);
  }

  #begin(line) {
    this.#hunk = null;
    const path = pathOf(line);
    this.#file = { path, oldPath: path, kind: "", plus: 0, minus: 0, hunks: [], isBinary: false, modes: [] };
    this.files.push(this.#file);
  }

  #pushToFile(line) {
    const hunk = this.#hunk;
    if (hunk && (hunk.oldLeft > 0 || hunk.newLeft > 0) && /^[ +-]/.test(line)) this.#pushToHunk(line);
    else if (hunk && line.startsWith("\\")) hunk.lines.push(line);
    else if (line.startsWith("@@")) this.#beginHunk(line);
    else if (!hunk) this.#readHeader(line);
  }

  #pushToHunk(line) {
    const hunk = this.#hunk;
    hunk.lines.push(line);
    if (line[0] !== "+") hunk.oldLeft--;
    if (line[0] !== "-") hunk.newLeft--;
    if (line[0] === "+") this.#file.plus++;
    if (line[0] === "-") this.#file.minus++;
  }

  #beginHunk(line) {
    const match = /^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(.*)$/.exec(line);
    if (!match) return;
    const [oldAt, oldLeft, newAt, newLeft] = [match[1], match[2] ?? 1, match[3], match[4] ?? 1].map(Number);
    this.#hunk = { oldAt, newAt, oldLeft, newLeft, header: line, lines: [] };
    this.#file.hunks.push(this.#hunk);
  }

  #readHeader(line) {
    const file = this.#file;
    const mode = /^(new file|deleted file|old|new) mode (\d{6})$/.exec(line);
    if (mode) {
      file.modes.push(mode[2]);
      if (mode[1] === "new file") file.kind = "new";
      else if (mode[1] === "deleted file") file.kind = "deleted";
      else file.kind ||= "mode changed";
    } else if (line.startsWith("rename from ")) file.oldPath = unquote(line.slice(12));
    else if (line.startsWith("rename to ")) Object.assign(file, { kind: "renamed", path: unquote(line.slice(10)) });
    else if (line.startsWith("copy from ")) file.oldPath = unquote(line.slice(10));
    else if (line.startsWith("copy to ")) Object.assign(file, { kind: "copied", path: unquote(line.slice(8)) });
    else if (line.startsWith("GIT binary patch") || line.startsWith("Binary files ")) file.isBinary = true;
  }
}

// What a file's lines do not show: its kind, a changed mode, and why there are no lines.
export function noteOf(file) {
  const [first, second] = file.modes;
  if (file.isBinary) return "This is a binary file; its content is in the patch.";
  if (file.hunks.length) return "";
  if (file.kind === "renamed" || file.kind === "copied") return "The content is unchanged.";
  if (second) return `Only the mode changed, from ${first} to ${second}.`;
  if (file.kind === "new") return first === SUBMODULE_MODE ? "This is a submodule." : "The new file is empty.";
  if (file.kind === "deleted") return "The deleted file was empty.";
  return "";
}

export function kindOf(file) {
  const [first, second] = file.modes;
  const parts = [file.kind];
  if (second && file.kind !== "mode changed") parts.push("mode changed");
  if (second) parts.push(`${first} → ${second}`);
  if ([first, second].includes(LINK_MODE)) parts.push("symbolic link");
  if ([first, second].includes(SUBMODULE_MODE)) parts.push("submodule");
  if (first === "100755" && !second) parts.push("executable");
  if (file.isBinary) parts.push("binary");
  return parts.filter(Boolean).join(", ");
}

// The path of `diff --git a/PATH b/PATH`. Both paths are the same, except for a renamed file, which has further lines.
function pathOf(line) {
  const paths = line.slice("diff --git ".length);
  const second = paths.slice((paths.length + 1) / 2);
  return unquote(second).replace(/^b\//, "");
}

const ESCAPES = { a: 7, b: 8, t: 9, n: 10, v: 11, f: 12, r: 13 };

// Git quotes a path that contains control characters, quotes or backslashes like a C string.
function unquote(path) {
  const quoted = /^"(.*)"$/s.exec(path);
  if (!quoted) return path;
  const bytes = [];
  for (const [part, octal, letter] of quoted[1].matchAll(/\\([0-7]{3})|\\(.)|[^\\]+/gs)) {
    if (octal) bytes.push(parseInt(octal, 8) & 255);
    else if (letter) bytes.push(ESCAPES[letter] ?? letter.charCodeAt(0));
    else for (const byte of new TextEncoder().encode(part)) bytes.push(byte);
  }
  return new TextDecoder().decode(new Uint8Array(bytes));
}

// The rows of a file: headers of hunks, and lines. `mate` is the line on the other side of a changed line.
export function rowsOf(file) {
  const rows = [];
  file.hunks.forEach((hunk, at) => {
    rows.push({ kind: "hunk", text: hunk.header, hunk: at });
    addLines(rows, hunk, at);
  });
  return rows;
}

function addLines(rows, hunk, at) {
  let { oldAt, newAt } = hunk;
  let [oldOffset, newOffset] = [0, 0];
  let removed = [];
  let added = 0;
  for (const line of hunk.lines) {
    const kind = line[0];
    if (kind === "\\") {
      rows.at(-1).isUnterminated = true;
      continue;
    }
    const row = { kind, text: line.slice(1), hunk: at, old: null, new: null, mate: null };
    if (kind !== "+") Object.assign(row, { old: oldAt++, oldOffset });
    if (kind !== "-") Object.assign(row, { new: newAt++, newOffset });
    if (kind !== "+") oldOffset += line.length;
    if (kind !== "-") newOffset += line.length;
    if (kind === "-" && added) removed = [];
    if (kind !== "+") added = 0;
    if (kind === " ") removed = [];
    if (kind === "-") removed.push(row);
    else if (kind === "+" && added < removed.length) {
      row.mate = removed[added];
      removed[added].mate = row;
    }
    if (kind === "+") added++;
    rows.push(row);
  }
}

// The rows as [left, right] for the side-by-side view; a hunk's header is [header, null].
export function splitRows(rows) {
  const result = [];
  let removed = [];
  let taken = 0;
  const flush = () => {
    for (const row of removed.slice(taken)) result.push([row, null]);
    removed = [];
    taken = 0;
  };
  for (const row of rows) {
    if (row.kind === "-") {
      if (taken) flush();
      removed.push(row);
    } else if (row.kind === "+") result.push([taken < removed.length ? removed[taken++] : null, row]);
    else {
      flush();
      result.push(row.kind === "hunk" ? [row, null] : [row, row]);
    }
  }
  flush();
  return result;
}

// The number of rows of a hunk's lines in the side-by-side view, without the hunk's header.
export function splitRowCount(lines) {
  let [rows, removed, taken] = [0, 0, 0];
  const flush = () => {
    rows += removed - taken;
    removed = taken = 0;
  };
  for (const [kind] of lines) {
    if (kind === "-") {
      if (taken) flush();
      removed++;
    } else if (kind === "+") {
      if (taken < removed) taken++;
      rows++;
    } else if (kind === " ") {
      flush();
      rows++;
    }
  }
  flush();
  return rows;
}

// The texts of both sides of a hunk, for highlighting.
export const sideTexts = (hunk) =>
  ["+", "-"].map((other) =>
    hunk.lines
      .filter((line) => line[0] !== other && line[0] !== "\\")
      .map((line) => line.slice(1))
      .join("\n"),
  );
