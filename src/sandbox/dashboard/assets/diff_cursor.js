// Moves between files and changes with the keyboard.
import { toast } from "/assets/page.js";

// How long a chosen file is kept at its place while the files above it are rendered.
const HELD_MILLISECONDS_MAX = 5000;

export class DiffCursor {
  #view = null;
  #row = null; // { view, at, element }
  #held = null; // { view, timer, height, top, scroll }

  // changes: { views, tree, setViewed, comments }
  constructor(container, changes) {
    Object.assign(this, { container, changes });
    new ResizeObserver(() => this.keepHeld()).observe(container);
    window.addEventListener("scroll", () => this.keepHeld(), { passive: true });
    for (const type of ["wheel", "touchmove"]) window.addEventListener(type, () => this.#release(), { passive: true });
  }

  // The keys, as shown on the sheet of shortcuts. `run` returns false if the tab is not shown.
  get shortcuts() {
    const when = (act) => () => {
      if (this.container.hidden || !this.changes.views.length) return false;
      act();
    };
    return [
      { keys: "j", label: "Next file", run: when(() => this.#moveFile(1)) },
      { keys: "k", label: "Previous file", run: when(() => this.#moveFile(-1)) },
      { keys: "n", label: "Next change", run: when(() => this.#moveChange(1)) },
      { keys: "p", label: "Previous change", run: when(() => this.#moveChange(-1)) },
      { keys: "v", label: "Mark the file as viewed, or remove the mark", run: when(() => this.#toggleViewed()) },
      { keys: "V", label: "Mark the file as viewed and go to the next one", run: when(() => this.#viewNext()) },
      { keys: "m", label: "Comment on the line of the change", run: when(() => this.#comment()) },
    ];
  }

  // The most recently chosen file, if it is on the screen; otherwise the file at the top of the screen.
  get current() {
    if (this.#view && isOnScreen(this.#view.element)) return this.#view;
    const { views } = this.changes;
    let [low, high] = [0, views.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (views[middle].element.getBoundingClientRect().top <= topOf(views[middle]) + 1) low = middle;
      else high = middle - 1;
    }
    return views[low];
  }

  goTo(view, shouldOpen = false) {
    if (!view) return;
    if (shouldOpen) view.setOpen(true);
    this.#setCurrent(view);
    this.#setRow(null);
    view.toggle.focus({ preventScroll: true });
    this.#hold(view);
  }

  // Files have estimated heights until they are rendered, so a file moves while those above it are rendered. The browser's
  // own correction would compete with this one.
  #hold(view) {
    this.#release();
    this.container.style.overflowAnchor = "none";
    this.#held = { view, timer: setTimeout(() => this.#release(), HELD_MILLISECONDS_MAX) };
    this.#scrollToHeld();
  }

  #release() {
    clearTimeout(this.#held?.timer);
    this.#held = null;
    this.container.style.overflowAnchor = "";
  }

  #scrollToHeld() {
    this.#held.view.element.scrollIntoView({ block: "start" });
    const { view } = this.#held;
    Object.assign(this.#held, { height: this.container.offsetHeight, top: topOf(view), scroll: window.scrollY });
  }

  // Keep a chosen file at its place while the heights of files, or of the bars above the tabs, change. If only the
  // position on the page changes, the user has scrolled.
  keepHeld() {
    if (!this.#held) return;
    const { view, height, top, scroll } = this.#held;
    if (this.container.hidden || !view.element.isConnected) this.#release();
    else if (this.container.offsetHeight !== height || topOf(view) !== top) this.#scrollToHeld();
    else if (Math.abs(window.scrollY - scroll) > 1) this.#release();
  }

  #setCurrent(view) {
    this.#view?.element.classList.remove("current");
    this.#view = view;
    view.element.classList.add("current");
    this.changes.tree?.setCurrent(view);
  }

  #moveFile(step) {
    const { current } = this;
    const isAtTop = Math.abs(current.element.getBoundingClientRect().top - topOf(current)) < 2;
    const isChosen = current === this.#view || isAtTop;
    // If no file is chosen, `j` above the first file and `k` inside a file go to the start of the current file.
    const begin = current.element.getBoundingClientRect().top;
    const isHere = !isChosen && (step > 0 ? begin > topOf(current) : begin < topOf(current));
    this.goTo(isHere ? current : this.changes.views[current.at + step]);
  }

  #moveChange(step) {
    const { views } = this.changes;
    let { view, at } = this.#place(step);
    for (; view; view = views[view.at + step], at = step > 0 ? -1 : Infinity) {
      if (!view.isOpen) continue;
      const starts = view.changeStarts();
      const next = step > 0 ? starts.find((start) => start > at) : starts.findLast((start) => start < at);
      if (next === undefined) continue;
      this.#setCurrent(view);
      this.#setRow({ view, at: next, element: view.elementOf(next) });
      return;
    }
  }

  // Where the search for the next change begins: at the current change or, if there is none, at the top of the screen.
  #place(step) {
    if (this.#row?.element.isConnected && isOnScreen(this.#row.element)) return this.#row;
    const view = this.current;
    const top = topOf(view);
    if (view.element.getBoundingClientRect().top >= top) return { view, at: step > 0 ? -1 : 0 };
    const shown = [...view.body.querySelectorAll("tr[data-row]")].find(
      (row) => row.getBoundingClientRect().bottom > top + view.head.offsetHeight,
    );
    const at = Number(shown?.dataset.row ?? 0);
    return { view, at: step > 0 ? at - 1 : at };
  }

  #setRow(row) {
    this.#row?.element.classList.remove("current");
    this.#row = row;
    if (!row) return;
    this.#release();
    row.element.classList.add("current");
    row.element.tabIndex = -1;
    row.element.scrollIntoView({ block: "center" });
    row.element.focus({ preventScroll: true });
  }

  #toggleViewed() {
    const view = this.current;
    this.changes.setViewed(view, !view.isViewed);
    this.goTo(view);
  }

  #viewNext() {
    const view = this.current;
    this.changes.setViewed(view, true);
    this.goTo(this.changes.views.slice(view.at + 1).find((each) => !each.isViewed) ?? view);
  }

  // Without a current change, the comment is on the first change in the current file.
  #comment() {
    if (!this.#row?.element.isConnected) {
      const view = this.current;
      const [at] = view.changeStarts();
      if (at === undefined) return toast("This file has no lines to comment on.");
      view.setOpen(true);
      this.#setCurrent(view);
      this.#setRow({ view, at, element: view.elementOf(at) });
    }
    const { view } = this.#row;
    const at = view.commentedLineOf(this.#row.at);
    // The frame is at the line that the comment is about.
    if (at !== this.#row.at) this.#setRow({ view, at, element: view.elementOf(at) });
    this.changes.comments.openAt(view, this.#row.element);
  }

  // Keep the file at its position on the screen while the heights of files change.
  keepPlace(change, view = this.changes.views.length ? this.current : null) {
    const top = view && Math.max(view.element.getBoundingClientRect().top, topOf(view));
    change();
    if (view) window.scrollBy(0, view.element.getBoundingClientRect().top - top);
  }
}

const topOf = (view) => Number.parseFloat(getComputedStyle(view.element).scrollMarginTop) || 0;

export function isOnScreen(element) {
  const { top, bottom } = element.getBoundingClientRect();
  return bottom > 0 && top < window.innerHeight;
}
