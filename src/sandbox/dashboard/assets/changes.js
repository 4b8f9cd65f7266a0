// The patch as a diff: a tree of files, and the files' lines, unified or side by side. For a task that continues others,
// the user can switch to the patch of the whole chain.
import { ChangeDialog } from "/assets/ask_for_change.js";
import { DiffCursor, isOnScreen } from "/assets/diff_cursor.js";
import { FileView } from "/assets/diff_file.js";
import { FileTree } from "/assets/file_tree.js";
import { LineComments } from "/assets/line_comments.js";
import { $, count, h, lineCounts, request, size } from "/assets/page.js";
import { parseInSlices } from "/assets/patch.js";
import { ReviewStore } from "/assets/review_store.js";
import { visible } from "/assets/untrusted_text.js";
import { appendInSlices, pause } from "/assets/yield_to_browser.js";

const BYTES_MAX = 3 * 1024 * 1024;
const FILES_SHOWN_MAX = 3000;
const LAYOUT_KEY = "sandbox.diff-layout";
const NARROW = window.matchMedia("(max-width: 720px)");

export class Changes {
  isSplit = false;
  #container = $("panel-changes");
  #content = h("div");
  #isLoaded = false;
  #isChain = false;
  #patch = null; // the artifact of this task
  #chainPatch = null; // the artifact of the chain
  #files = new Map(); // parsed patches by name
  #generation = 0;
  #views = [];
  #prefersSplit = stored(LAYOUT_KEY) === "split";

  // chainPatchName: the patch of the whole chain; empty if the task continues no other.
  // chain: the id of the chain's first task.
  constructor(artifactsUrl, patchName, chainPatchName = "", chain = "") {
    Object.assign(this, { artifactsUrl, patchName, chainPatchName });
    this.scopeKey = `sandbox.diff-scope.${chain}`;
    this.store = new ReviewStore(patchName);
    this.comments = new LineComments(this.store);
    this.ask = new ChangeDialog(this.store, this.comments, artifactsUrl.replace(/\/artifacts$/, ""));
    this.cursor = new DiffCursor(this.#container, this);
    this.#container.append(this.#content);
    this.viewedCount = h("span", { class: "muted viewed-count", role: "status" });
    $("tabs")?.after(this.viewedCount);
    this.#applyWidth();
    followTabs(this.#container, () => this.cursor.keepHeld());
    NARROW.addEventListener("change", () => {
      this.#applyWidth();
      this.#redraw();
    });
  }

  get shortcuts() {
    const run = () => (this.#container.hidden || !this.#chainPatch ? false : this.#setScope(!this.#isChain));
    const switchKey = { keys: "s", label: "Switch between this task and the whole chain", run };
    return [...this.cursor.shortcuts, ...(this.chainPatchName ? [switchKey] : [])];
  }

  // A narrow window has no space for two columns.
  #applyWidth() {
    this.isSplit = this.#prefersSplit && !NARROW.matches;
  }

  get views() {
    return this.#views;
  }

  async show(isOver) {
    if (this.#isLoaded) return;
    this.#isLoaded = true;
    try {
      const { artifacts } = await (await request(this.artifactsUrl)).json();
      const find = (name) => artifacts.find((each) => each.name === name);
      this.#patch = find(this.patchName);
      this.#chainPatch = find(this.chainPatchName);
      this.#isLoaded = this.#patch !== undefined;
      if (!this.#patch)
        return this.#showNote(isOver ? "This task has no patch." : "The patch is created when the agent has ended.");
      if (this.#chainPatch) {
        // The commands on this page apply the whole chain, so the tab begins with it.
        this.#isChain = stored(this.scopeKey, "sessionStorage") !== "task";
        this.#showScopes();
      }
    } catch (error) {
      this.#isLoaded = false;
      return this.#showNote(error.message);
    }
    await this.#showPatch();
  }

  #showNote(text) {
    this.#views = [];
    $("tally-changes").textContent = "";
    this.#countViewed();
    this.#content.replaceChildren(h("p", { class: "empty-note muted" }, text));
  }

  #showScopes() {
    const option = (label, isChain) =>
      h("button", { type: "button", "data-chain": isChain, onclick: () => this.#setScope(isChain) }, label);
    const options = h(
      "div",
      { class: "segmented", role: "group", "aria-label": "Changes of" },
      option("This task", false),
      option("Whole chain", true),
    );
    this.scopeNote = h("span", { class: "muted" });
    this.scopes = h("div", { class: "scopes" }, options, this.scopeNote);
    this.#container.replaceChildren(this.scopes, this.#content);
    this.#markScope();
  }

  #markScope() {
    for (const button of this.scopes.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String("chain" in button.dataset === this.#isChain));
    this.scopeNote.textContent = this.#isChain ? "This task and the earlier tasks that it continues." : "";
  }

  // Switch to the other patch, and stay at the same file.
  async #setScope(isChain) {
    if (isChain === this.#isChain) return;
    const path = isOnScreen(this.scopes) || !this.#views.length ? null : this.cursor.current.file.path;
    this.#isChain = isChain;
    store(this.scopeKey, isChain ? "chain" : "task", "sessionStorage");
    this.#markScope();
    await this.#showPatch();
    const view = this.#views.find(({ file }) => file.path === path);
    if (view) this.cursor.goTo(view);
    else if (path !== null) this.#container.scrollIntoView();
  }

  async #showPatch() {
    const generation = ++this.#generation;
    const isCurrent = () => generation === this.#generation;
    const patch = this.#isChain ? this.#chainPatch : this.#patch;
    if (patch.size_bytes === 0)
      return this.#showNote(this.#isChain ? "The tasks of the chain changed nothing." : "The agent changed nothing.");
    try {
      const { files, problem } = await this.#load(patch);
      if (!isCurrent()) return;
      if (problem) this.#showNote(problem);
      else await this.#draw(files, patch, isCurrent);
    } catch (error) {
      if (!isCurrent()) return;
      this.#isLoaded = false;
      this.#showNote(error.message);
    }
  }

  async #load({ name, download_url }) {
    if (!this.#files.has(name)) {
      const response = await request(download_url, { headers: { range: `bytes=0-${BYTES_MAX - 1}` } });
      const text = await response.text();
      const [, reason] = /^# truncated: (.*)/.exec(text) ?? [];
      const problem = reason && `The patch is incomplete: ${visible(reason)}. See the artifacts.`;
      this.#files.set(name, { files: await parseInSlices(text), problem });
    }
    return this.#files.get(name);
  }

  async #draw(files, patch, isCurrent) {
    const list = h("div", { class: "files" });
    this.#views = [];
    this.tree = null;
    this.comments.setViews(this.#views, this.#isChain ? "first" : "old");
    $("tally-changes").textContent = files.length || "";
    const review = h("div", { class: "review" }, list);
    this.#content.replaceChildren(this.#head(files, patch), keysElement(this.#chainPatch), review);
    if (patch.size_bytes > BYTES_MAX)
      review.before(
        h(
          "p",
          { class: "notice" },
          `The patch has ${size(patch.size_bytes)}; only the first ${size(BYTES_MAX)} are shown.`,
        ),
      );
    const create = (file) => {
      const view = new FileView(file, this.#views.length, this);
      this.#views.push(view);
      return view.element;
    };
    await appendInSlices(list, files.slice(0, FILES_SHOWN_MAX), create, isCurrent);
    if (!isCurrent()) return;
    const more = files.length - FILES_SHOWN_MAX;
    if (more > 0)
      list.append(h("p", { class: "empty-note muted" }, `and ${more} more; download the patch to see all.`));
    this.#countViewed();
    if (files.length < 2) return;
    this.tree = new FileTree(this.#views, (view) => this.cursor.goTo(view, true));
    review.prepend(
      h("details", { class: "tree-panel", open: !NARROW.matches }, h("summary", {}, "Files"), this.tree.element),
    );
  }

  #head(files, patch) {
    const sum = (key) => files.reduce((total, file) => total + file[key], 0);
    const layout = (label, isSplit) =>
      h(
        "button",
        {
          type: "button",
          "aria-pressed": String(this.#prefersSplit === isSplit),
          onclick: (event) => this.#setLayout(event, isSplit),
        },
        label,
      );
    this.collapse = h("button", { type: "button", onclick: () => this.#toggleAll() }, "Collapse all");
    return h(
      "div",
      { class: "diff-head" },
      h("strong", {}, `${count(files.length)} ${files.length === 1 ? "file" : "files"} changed`),
      ...lineCounts(sum("plus"), sum("minus")),
      h(
        "div",
        { class: "diff-actions" },
        h(
          "div",
          { class: "segmented layout", role: "group", "aria-label": "Layout" },
          layout("Unified", false),
          layout("Side by side", true),
        ),
        this.collapse,
        this.#commentsButton(),
        h("a", { class: "button", href: patch.download_url, download: patch.name }, this.#downloadLabel()),
      ),
    );
  }

  #downloadLabel() {
    if (!this.#chainPatch) return "Download patch";
    return this.#isChain ? "Download patch of the chain" : "Download patch of this task";
  }

  // If the user may not ask for a change, or the task cannot be continued, the dialog can still copy the comments.
  #commentsButton() {
    if (this.ask.mayAsk) return null;
    return h("button", { type: "button", "data-action": "continue" }, this.ask.label);
  }

  #setLayout(event, isSplit) {
    for (const button of event.target.parentElement.children)
      button.setAttribute("aria-pressed", String(button === event.target));
    this.#prefersSplit = isSplit;
    store(LAYOUT_KEY, isSplit ? "split" : "unified");
    this.#applyWidth();
    this.#redraw();
  }

  // Redraw the files on the screen immediately, and the other files in slices.
  async #redraw() {
    const later = [];
    this.cursor.keepPlace(() => {
      for (const view of this.#views) isOnScreen(view.element) ? view.redraw() : later.push(view);
    });
    for (const view of later) {
      await pause();
      view.redraw();
    }
  }

  #toggleAll() {
    const isOpen = !this.#views.some((view) => view.isOpen);
    for (const view of this.#views) view.setOpen(isOpen);
  }

  showOpened() {
    this.collapse.textContent = this.#views.some((view) => view.isOpen) ? "Collapse all" : "Expand all";
  }

  isViewed(file) {
    return this.store.isViewed(file);
  }

  setViewed(view, isViewed) {
    this.store.setViewed(view.file, isViewed);
    this.cursor.keepPlace(() => view.setViewed(isViewed), view);
    this.tree?.update(view);
    this.#countViewed();
  }

  commentsAt(file, row, isSplit) {
    return this.comments.rowsAt(file, row, isSplit);
  }

  #countViewed() {
    const viewed = this.#views.filter((view) => view.isViewed).length;
    this.viewedCount.textContent = viewed ? `${count(viewed)} of ${count(this.#views.length)} viewed` : "";
  }
}

const KEYS = {
  "j k": "files",
  "n p": "changes",
  v: "mark as viewed",
  V: "mark and go to the next file",
  m: "comment on the line",
};

function keysElement(hasChain) {
  const element = h("p", { class: "keys" }, "Keys: ");
  for (const [keys, meaning] of Object.entries(hasChain ? { ...KEYS, s: "this task or whole chain" } : KEYS))
    element.append(...keys.split(" ").flatMap((key) => [h("kbd", {}, key), " "]), `${meaning}  `);
  return element;
}

// File headers stick below the tabs, whose position depends on the bars above them.
function followTabs(container, onChange) {
  const tabs = document.querySelector(".tabs");
  if (!tabs) return;
  const update = () => {
    const bottom = (Number.parseFloat(getComputedStyle(tabs).top) || 0) + tabs.offsetHeight;
    container.style.setProperty("--tabs-height", `${bottom}px`);
    onChange();
  };
  new ResizeObserver(update).observe(tabs);
  new MutationObserver(update).observe(tabs, { attributeFilter: ["class"] });
}

// storage: that of this browser, or that of this tab.
function stored(key, storage = "localStorage") {
  try {
    return window[storage].getItem(key);
  } catch {
    return null;
  }
}

function store(key, value, storage = "localStorage") {
  try {
    window[storage].setItem(key, value);
  } catch {
    // Without storage, the choice lasts until the page is closed.
  }
}
