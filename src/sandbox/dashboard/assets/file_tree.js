// The files of a patch as a tree of directories.
import { h, lineCounts } from "/assets/page.js";
import { visibleName } from "/assets/untrusted_text.js";
import { appendInSlices } from "/assets/yield_to_browser.js";

// Directories are initially open if there are at most this many files.
const FILES_OPENED_MAX = 300;
const BREAKABLE_CHARACTERS_MAX = 100;

export class FileTree {
  element = h("nav", { class: "file-tree", "aria-label": "Changed files" });
  #links = new Map();
  #list = h("ul", { class: "tree" });
  #filter = h("input", {
    type: "search",
    placeholder: "Filter files",
    "aria-label": "Filter files",
    autocomplete: "off",
    spellcheck: "false",
  });
  #generation = 0;

  // views: the files' views; select(view) is called when a file is chosen.
  constructor(views, select) {
    this.views = views;
    this.select = select;
    this.#filter.addEventListener("input", () => this.draw());
    this.element.append(this.#filter, this.#list);
    this.draw();
  }

  async draw() {
    const generation = ++this.#generation;
    const wanted = this.#filter.value.trim().toLowerCase();
    const views = this.views.filter(({ file }) => !wanted || file.path.toLowerCase().includes(wanted));
    this.#links.clear();
    this.#list.replaceChildren();
    if (!views.length) this.#list.append(h("li", { class: "muted" }, "No file matches."));
    await this.#fill(
      this.#list,
      treeOf(views),
      views.length <= FILES_OPENED_MAX,
      () => generation === this.#generation,
    );
  }

  #fill(list, directory, isOpen, isCurrent) {
    const create = ([name, item]) =>
      item instanceof Map ? this.#directoryItem(name, item, isOpen, isCurrent) : this.#fileItem(item);
    return appendInSlices(list, directory, create, isCurrent);
  }

  // A closed directory is filled when it is opened.
  #directoryItem(name, directory, isOpen, isCurrent) {
    const [label, content] = withoutSingleParents(name, directory);
    const list = h("ul");
    const details = h("details", { open: isOpen }, h("summary", {}, visibleName(label)), list);
    const fill = () => {
      if (!list.childElementCount) this.#fill(list, content, isOpen, isCurrent);
    };
    if (isOpen) fill();
    else details.addEventListener("toggle", fill, { once: true });
    return h("li", {}, details);
  }

  #fileItem(view) {
    const { path, plus, minus } = view.file;
    const name = visibleName(path.slice(path.lastIndexOf("/") + 1));
    const link = h(
      "button",
      { type: "button", class: "tree-file", title: visibleName(path), onclick: () => this.select(view) },
      h("span", { class: "tree-name" }, ...breakable(name)),
      ...lineCounts(plus, minus),
    );
    this.#links.set(view, link);
    this.#show(view, link);
    return h("li", {}, link);
  }

  update(view) {
    const link = this.#links.get(view);
    if (link) this.#show(view, link);
  }

  #show(view, link) {
    link.classList.toggle("viewed", view.isViewed);
  }

  setCurrent(view) {
    this.element.querySelector("[aria-current]")?.removeAttribute("aria-current");
    this.#links.get(view)?.setAttribute("aria-current", "true");
  }
}

// Long names break after punctuation rather than within a word.
const breakable = (name) =>
  name.length > BREAKABLE_CHARACTERS_MAX
    ? [name]
    : name.split(/(?<=[._-])/).flatMap((part, at) => (at ? [h("wbr"), part] : [part]));

// A hostile path can have a huge number of directories. Below this depth, directories are shown as part of the file's
// name.
const DEPTH_MAX = 30;

// A directory is a map of names to directories and files, in the order of the patch.
function treeOf(views) {
  const root = new Map();
  for (const view of views) {
    let directory = root;
    for (const name of view.file.path.split("/").slice(0, -1).slice(0, DEPTH_MAX)) {
      if (!directory.has(name)) directory.set(name, new Map());
      directory = directory.get(name);
    }
    directory.set(view, view);
  }
  return root;
}

function withoutSingleParents(name, directory) {
  for (;;) {
    const [[next, only]] = directory;
    if (directory.size > 1 || !(only instanceof Map)) return [name, directory];
    name += `/${next}`;
    directory = only;
  }
}
