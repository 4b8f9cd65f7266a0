// The patch as a diff: a tree of files, and the files' lines, unified or side by side.
import { ChangeDialog } from "/assets/ask_for_change.js";
import { Cursor, isOnScreen } from "/assets/diff_cursor.js";
import { FileView } from "/assets/diff_file.js";
import { FileTree } from "/assets/file_tree.js";
import { LineComments } from "/assets/line_comments.js";
import { $, h, request, size } from "/assets/page.js";
import { parseInSlices } from "/assets/patch.js";
import { ReviewStore } from "/assets/review_store.js";
import { appendInSlices, pause } from "/assets/time_slices.js";

const BYTES_MAX = 3 * 1024 * 1024;
const FILES_SHOWN_MAX = 3000;
const LAYOUT_KEY = "sandbox.diff-layout";
const NARROW = window.matchMedia("(max-width: 720px)");

export class Changes {
  isSplit = false;
  #container = $("panel-changes");
  #isLoaded = false;
  #views = [];
  #isWanted = stored(LAYOUT_KEY) === "split";

  constructor(artifactsUrl, patchName) {
    this.artifactsUrl = artifactsUrl;
    this.patchName = patchName;
    this.store = new ReviewStore(patchName);
    this.comments = new LineComments(this.store);
    this.ask = new ChangeDialog(this.store, this.comments, artifactsUrl.replace(/\/artifacts$/, ""));
    this.cursor = new Cursor(this.#container, this);
    this.#applyWidth();
    followTabs(this.#container);
    NARROW.addEventListener("change", () => {
      this.#applyWidth();
      this.#redraw();
    });
  }

  // A narrow window has no space for two columns.
  #applyWidth() {
    this.isSplit = this.#isWanted && !NARROW.matches;
  }

  get views() {
    return this.#views;
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
      const response = await request(url, { headers: { range: `bytes=0-${BYTES_MAX - 1}` } });
      await this.#draw(await response.text(), url, patch.size_bytes);
    } catch (error) {
      this.#isLoaded = false;
      this.#showNote(error.message);
    }
  }

  #showNote(text) {
    this.#container.replaceChildren(h("p", { class: "empty-note muted" }, text));
  }

  async #draw(text, url, whole) {
    const files = await parseInSlices(text);
    const list = h("div", { class: "files" });
    this.#views = [];
    this.comments.setFiles(files, this.#views);
    $("tally-changes").textContent = files.length || "";
    const review = h("div", { class: "review" }, list);
    this.#container.replaceChildren(this.#head(files, url), keysElement(), review);
    if (whole > BYTES_MAX)
      review.before(
        h("p", { class: "notice" }, `The patch has ${size(whole)}; only the first ${size(BYTES_MAX)} are shown.`),
      );
    const create = (file) => {
      const view = new FileView(file, this.#views.length, this);
      this.#views.push(view);
      return view.element;
    };
    await appendInSlices(list, files.slice(0, FILES_SHOWN_MAX), create);
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

  #head(files, url) {
    const sum = (key) => files.reduce((total, file) => total + file[key], 0);
    const layout = (label, isSplit) =>
      h(
        "button",
        {
          type: "button",
          "aria-pressed": String(this.#isWanted === isSplit),
          onclick: (event) => this.#setLayout(event, isSplit),
        },
        label,
      );
    this.collapse = h("button", { type: "button", onclick: () => this.#toggleAll() }, "Collapse all");
    this.viewedCount = h("span", { class: "muted viewed-count", role: "status" });
    return h(
      "div",
      { class: "diff-head" },
      h("strong", {}, `${files.length} ${files.length === 1 ? "file" : "files"} changed`),
      h("span", { class: "plus" }, `+${sum("plus")}`),
      h("span", { class: "minus" }, `−${sum("minus")}`),
      this.viewedCount,
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
        h("a", { class: "button", href: url, download: this.patchName }, "Download patch"),
      ),
    );
  }

  // A user who may not ask for a change has no such button at the top of the page, but can copy the comments.
  #commentsButton() {
    if (this.ask.mayAsk) return null;
    return h("button", { type: "button", "data-action": "continue" }, this.ask.label);
  }

  #setLayout(event, isSplit) {
    for (const button of event.target.parentElement.children)
      button.setAttribute("aria-pressed", String(button === event.target));
    this.#isWanted = isSplit;
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
    this.viewedCount.textContent = viewed ? `${viewed} of ${this.#views.length} viewed` : "";
  }
}

const KEYS = { "j k": "files", "n p": "changes", v: "viewed", m: "comment on the line" };

function keysElement() {
  const element = h("p", { class: "keys" }, "Keys: ");
  for (const [keys, meaning] of Object.entries(KEYS))
    element.append(...keys.split(" ").flatMap((key) => [h("kbd", {}, key), " "]), `${meaning}  `);
  return element;
}

// File headers stick below the tabs, whose position depends on the bars above them.
function followTabs(container) {
  const tabs = document.querySelector(".tabs");
  if (!tabs) return;
  const update = () => {
    const bottom = (Number.parseFloat(getComputedStyle(tabs).top) || 0) + tabs.offsetHeight;
    container.style.setProperty("--tabs-height", `${bottom}px`);
  };
  new ResizeObserver(update).observe(tabs);
  new MutationObserver(update).observe(document.body, { attributeFilter: ["class"] });
}

function stored(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function store(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // Without storage, the layout lasts until the page is closed.
  }
}
