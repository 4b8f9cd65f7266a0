// The patch as a diff: files with counts, and highlighted lines, which are rendered when a file is opened.
import { $, h, request, size } from "/assets/page.js";
import { appendText, elementLimit, visible, visibleName } from "/assets/plain.js";
import { highlighter } from "/assets/syntax.js";

const BYTES_MAX = 3 * 1024 * 1024;
// Maximum characters and elements for highlighting: for all files open at first together, and for each file opened later.
const CHARACTERS_MAX = 300_000;
const ELEMENTS_MAX = 20_000;
const LINE_CHARACTERS_MAX = 20_000;
const LINES_OPENED_MAX = 800;
const LINES_SHOWN_MAX = 5000;
const FILES_SHOWN_MAX = 1000;

// Parse a patch in git's format into its files.
export function parse(patch) {
  const files = [];
  let file = null;
  let hunk = null;
  for (const line of patch.split("\n")) {
    if (line.startsWith("diff --git ")) {
      hunk = null;
      file = { path: pathOf(line), kind: "", plus: 0, minus: 0, hunks: [], isBinary: false };
      files.push(file);
    } else if (!file) continue;
    else if (hunk && (hunk.oldCount > 0 || hunk.newCount > 0) && /^[ +-]/.test(line)) {
      hunk.lines.push(line);
      if (line[0] !== "+") hunk.oldCount--;
      if (line[0] !== "-") hunk.newCount--;
      if (line[0] === "+") file.plus++;
      if (line[0] === "-") file.minus++;
    } else if (hunk && line.startsWith("\\")) hunk.lines.push(line);
    else if (line.startsWith("@@")) {
      const match = /^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(.*)$/.exec(line);
      if (!match) continue;
      hunk = {
        oldAt: +match[1],
        newAt: +match[3],
        oldCount: +(match[2] ?? 1),
        newCount: +(match[4] ?? 1),
        header: line,
        lines: [],
      };
      file.hunks.push(hunk);
    } else if (line.startsWith("new file")) file.kind = "new";
    else if (line.startsWith("deleted file")) file.kind = "deleted";
    else if (line.startsWith("rename to ")) Object.assign(file, { kind: "renamed", path: unquote(line.slice(10)) });
    else if (line.startsWith("GIT binary patch") || line.startsWith("Binary files"))
      Object.assign(file, { isBinary: true });
    else if (line.startsWith("new mode")) file.kind ||= "mode changed";
  }
  return files;
}

// The path of `diff --git a/PATH b/PATH`. Both paths are the same, except for a renamed file, which has further lines.
function pathOf(line) {
  const paths = line.slice("diff --git ".length);
  const second = paths.slice((paths.length + 1) / 2);
  return unquote(second).replace(/^b\//, "");
}

const ESCAPES = { a: 7, b: 8, t: 9, n: 10, v: 11, f: 12, r: 13 };

// Git quotes a path with control characters, quotes or backslashes like a string in C.
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

export class Changes {
  #container = $("panel-changes");
  #isLoaded = false;

  constructor(artifactsUrl, patchName) {
    this.artifactsUrl = artifactsUrl;
    this.patchName = patchName;
  }

  async show(isOver) {
    if (this.#isLoaded) return;
    this.#isLoaded = true;
    try {
      const { artifacts } = await (await request(this.artifactsUrl)).json();
      const patch = artifacts.find((each) => each.name === this.patchName);
      this.#isLoaded = patch !== undefined;
      if (!patch)
        return this.#showNote(isOver ? "This task has no patch." : "The patch is created when the agent has ended.");
      if (patch.size_bytes === 0) return this.#showNote("The agent changed nothing.");
      const url = patch.download_url;
      this.#draw(
        await (await request(url, { headers: { range: `bytes=0-${BYTES_MAX - 1}` } })).text(),
        url,
        patch.size_bytes,
      );
    } catch (error) {
      this.#isLoaded = false;
      this.#showNote(error.message);
    }
  }

  #showNote(text) {
    this.#container.replaceChildren(h("p", { class: "empty-note muted" }, text));
  }

  #draw(text, url, whole) {
    const files = parse(text);
    const sum = (key) => files.reduce((total, file) => total + file[key], 0);
    const head = h(
      "div",
      { class: "diff-head" },
      h("strong", {}, `${files.length} ${files.length === 1 ? "file" : "files"} changed`),
      h("span", { class: "plus" }, `+${sum("plus")}`),
      h("span", { class: "minus" }, `−${sum("minus")}`),
      h("a", { class: "button", href: url, download: this.patchName }, "Download patch"),
    );
    $("tally-changes").textContent = files.length || "";
    this.#container.replaceChildren(head);
    if (whole > BYTES_MAX)
      this.#container.append(
        h("p", { class: "notice" }, `The patch has ${size(whole)}; only the first ${size(BYTES_MAX)} are shown.`),
      );
    const left = { lines: LINES_OPENED_MAX, characters: CHARACTERS_MAX, ...elementLimit(ELEMENTS_MAX) };
    for (const file of files.slice(0, FILES_SHOWN_MAX)) {
      const { lines, characters } = measure(file);
      const isOpen = lines <= left.lines && characters <= left.characters;
      this.#container.append(fileElement(file, isOpen ? left : null));
      if (isOpen) Object.assign(left, { lines: left.lines - lines, characters: left.characters - characters });
    }
    const more = files.length - FILES_SHOWN_MAX;
    if (more > 0)
      this.#container.append(h("p", { class: "empty-note muted" }, `and ${more} more; download the patch to see all.`));
  }
}

// Count characters, and lines including the headers of hunks.
function measure({ hunks }) {
  const sum = (value) => hunks.reduce((total, hunk) => total + value(hunk), 0);
  return {
    lines: Math.max(
      1,
      sum((hunk) => 1 + hunk.lines.length),
    ),
    characters: sum((hunk) => hunk.lines.reduce((total, line) => total + line.length, hunk.header.length)),
  };
}

// left: the element limit of a file that is open from the start, otherwise null.
function fileElement(file, left) {
  const details = h(
    "details",
    { class: "file", open: left !== null },
    h(
      "summary",
      {},
      h("span", { class: "file-path" }, visibleName(file.path)),
      file.kind ? h("span", { class: "file-kind" }, file.kind) : null,
      h("span", { class: "plus" }, `+${file.plus}`),
      h("span", { class: "minus" }, `−${file.minus}`),
    ),
  );
  const fill = () => {
    if (details.childElementCount === 1) details.append(hunksElement(file, left ?? elementLimit(ELEMENTS_MAX)));
  };
  if (left) fill();
  else details.addEventListener("toggle", fill, { once: true });
  return details;
}

function hunksElement(file, left) {
  const container = h("div", {
    class: "hunks",
    tabindex: "0",
    role: "group",
    "aria-label": `Changes of ${visibleName(file.path)}`,
  });
  if (file.isBinary)
    container.append(h("p", { class: "empty-note muted" }, " This is a binary file; its content is in the patch."));
  const body = h("tbody");
  let characters = 0;
  let isCut = false;
  for (const row of rowElements(file, left)) {
    isCut = body.childElementCount >= LINES_SHOWN_MAX || characters > CHARACTERS_MAX;
    if (isCut) break;
    body.append(row);
    characters += row.textContent.length;
  }
  container.append(h("table", {}, body));
  if (isCut) {
    const note = ` Only the first ${body.childElementCount} lines are shown.`;
    container.append(h("p", { class: "empty-note muted" }, note));
  }
  return container;
}

// Create the rows of a file's hunks one by one.
function* rowElements(file, left) {
  const highlight = highlighter(file.path);
  for (const hunk of file.hunks) {
    yield h("tr", { class: "hunk" }, h("td", { colspan: "3" }, visible(hunk.header)));
    let { oldAt, newAt } = hunk;
    for (const line of hunk.lines) {
      const sign = line[0];
      const row = h("tr", { class: sign === "+" ? "add" : sign === "-" ? "del" : "" });
      row.append(h("td", { class: "ln" }, sign === "+" || sign === "\\" ? "" : String(oldAt++)));
      row.append(h("td", { class: "ln" }, sign === "-" || sign === "\\" ? "" : String(newAt++)));
      row.append(textElement(line, highlight, left));
      yield row;
    }
  }
}

function textElement(line, highlight, left) {
  const sign = line[0];
  const element = h("td", { class: "tx" }, sign === "\\" ? "" : `${sign === "-" ? "−" : sign} `);
  const text = sign === "\\" ? line : line.slice(1, 1 + LINE_CHARACTERS_MAX);
  const lineLimit = elementLimit();
  lineLimit.pieces = Math.min(lineLimit.pieces, left.pieces);
  left.pieces -= lineLimit.pieces;
  const pieces = sign === "\\" ? [[text, "s-c"]] : lineLimit.pieces > 0 ? highlight(text) : [[text, ""]];
  for (const [piece, style] of pieces) {
    if (style) lineLimit.pieces--;
    appendText(style ? element.appendChild(h("span", { class: style })) : element, piece, "", lineLimit);
  }
  left.pieces += lineLimit.pieces;
  const more = line.length - 1 - LINE_CHARACTERS_MAX;
  if (more > 0) element.append(h("span", { class: "muted" }, ` … and ${more} more characters`));
  return element;
}
