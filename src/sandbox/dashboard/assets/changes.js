// The patch as a diff: files with counts, and lines with colours, made when a file is opened.
import { $, ask, h, size } from "/assets/page.js";
import { put, visible, visibleName } from "/assets/plain.js";
import { colours } from "/assets/syntax.js";

const BYTES_MAX = 3 * 1024 * 1024;
const LINES_OPENED_MAX = 800;
const LINES_SHOWN_MAX = 5000;
const FILES_SHOWN_MAX = 1000;

// The files of a patch as git writes it.
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
    else if (hunk && (hunk.old > 0 || hunk.fresh > 0) && /^[ +\-]/.test(line)) {
      hunk.lines.push(line);
      if (line[0] !== "+") hunk.old--;
      if (line[0] !== "-") hunk.fresh--;
      if (line[0] === "+") file.plus++;
      if (line[0] === "-") file.minus++;
    } else if (hunk && line.startsWith("\\")) hunk.lines.push(line);
    else if (line.startsWith("@@")) {
      const match = /^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(.*)$/.exec(line);
      if (!match) continue;
      hunk = { oldAt: +match[1], freshAt: +match[3], old: +(match[2] ?? 1), fresh: +(match[4] ?? 1), about: line, lines: [] };
      file.hunks.push(hunk);
    } else if (line.startsWith("new file")) file.kind = "new";
    else if (line.startsWith("deleted file")) file.kind = "deleted";
    else if (line.startsWith("rename to ")) Object.assign(file, { kind: "renamed", path: line.slice(10) });
    else if (line.startsWith("GIT binary patch") || line.startsWith("Binary files")) Object.assign(file, { isBinary: true });
    else if (line.startsWith("new mode")) file.kind ||= "mode changed";
  }
  return files;
}

function pathOf(line) {
  const quoted = / "b\/((?:[^"\\]|\\.)*)"$/.exec(line);
  if (quoted) return quoted[1];
  const at = line.indexOf(" b/");
  return at < 0 ? line.slice(11) : line.slice(at + 3);
}

export class Changes {
  #place = $("panel-changes");
  #isThere = false;

  constructor(list, name) {
    this.list = list;
    this.name = name;
  }

  async show(isOver) {
    if (this.#isThere) return;
    this.#isThere = true;
    try {
      const { artifacts } = await (await ask(this.list)).json();
      const patch = artifacts.find((each) => each.name === this.name);
      this.#isThere = patch !== undefined;
      if (!patch) return this.#say(isOver ? "This task left no patch." : "The patch is here once the agent has ended.");
      if (patch.size_bytes === 0) return this.#say("The agent changed nothing.");
      const address = patch.download_url;
      this.#draw(await (await ask(address, { headers: { range: `bytes=0-${BYTES_MAX - 1}` } })).text(), address, patch.size_bytes);
    } catch (error) {
      this.#isThere = false;
      this.#say(error.message);
    }
  }

  #say(text) {
    this.#place.replaceChildren(h("p", { class: "empty-note muted" }, text));
  }

  #draw(text, address, whole) {
    const files = parse(text);
    const sum = (key) => files.reduce((total, file) => total + file[key], 0);
    const head = h(
      "div",
      { class: "diff-head" },
      h("strong", {}, `${files.length} ${files.length === 1 ? "file" : "files"} changed`),
      h("span", { class: "plus" }, `+${sum("plus")}`),
      h("span", { class: "minus" }, `−${sum("minus")}`),
      h("a", { class: "button", href: address, download: this.name }, "Download patch"),
    );
    $("tally-changes").textContent = files.length || "";
    this.#place.replaceChildren(head);
    if (whole > BYTES_MAX) this.#place.append(h("p", { class: "notice" }, `The patch has ${size(whole)}; the first ${size(BYTES_MAX)} are shown.`));
    let room = LINES_OPENED_MAX;
    for (const file of files.slice(0, FILES_SHOWN_MAX)) {
      const lines = Math.max(1, file.hunks.reduce((total, hunk) => total + hunk.lines.length, 0));
      this.#place.append(fileElement(file, lines <= room));
      if (lines <= room) room -= lines;
    }
    const more = files.length - FILES_SHOWN_MAX;
    if (more > 0) this.#place.append(h("p", { class: "empty-note muted" }, `and ${more} more; the download has them all.`));
  }
}

function fileElement(file, isOpen) {
  const details = h(
    "details",
    { class: "file", open: isOpen },
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
    if (details.childElementCount === 1) details.append(hunksElement(file));
  };
  if (isOpen) fill();
  else details.addEventListener("toggle", fill, { once: true });
  return details;
}

function hunksElement(file) {
  const place = h("div", { class: "hunks", tabindex: "0", role: "group", "aria-label": `Changes of ${visibleName(file.path)}` });
  if (file.isBinary) place.append(h("p", { class: "empty-note muted" }, " A binary file; the patch has its bytes."));
  const body = h("tbody");
  const paint = colours(file.path);
  let shown = 0;
  for (const hunk of file.hunks) {
    body.append(h("tr", { class: "hunk" }, h("td", { colspan: "3" }, visible(hunk.about))));
    let { oldAt, freshAt } = hunk;
    for (const line of hunk.lines) {
      if (shown++ >= LINES_SHOWN_MAX) break;
      const sign = line[0];
      const row = h("tr", { class: sign === "+" ? "add" : sign === "-" ? "del" : "" });
      row.append(h("td", { class: "ln" }, sign === "+" || sign === "\\" ? "" : String(oldAt++)));
      row.append(h("td", { class: "ln" }, sign === "-" || sign === "\\" ? "" : String(freshAt++)));
      const text = h("td", { class: "tx" }, sign === "\\" ? "" : `${sign === "-" ? "−" : sign} `);
      for (const [piece, look] of sign === "\\" ? [[line, "s-c"]] : paint(line.slice(1))) {
        put(look ? text.appendChild(h("span", { class: look })) : text, piece);
      }
      row.append(text);
      body.append(row);
    }
  }
  place.append(h("table", {}, body));
  if (shown > LINES_SHOWN_MAX) place.append(h("p", { class: "empty-note muted" }, ` Only the first ${LINES_SHOWN_MAX} lines are shown.`));
  return place;
}
