// A list of conversation entries: has elements for the latest entries only, and creates them in time slices.
import { count, h } from "/assets/page.js";

const EARLIER_COUNT = 500;
const SLICE_MILLISECONDS = 10;

export class EntryList {
  #entries = [];
  #renderedCount = 0;
  #droppedCount = 0;
  #byElement = new WeakMap();
  #isLoading = false;

  // list: the element for the entries; earlier: the element for the entries that precede them; render: creates an
  // entry's element.
  constructor(list, earlier, render, shownMax) {
    this.list = list;
    this.earlier = earlier;
    this.render = render;
    this.shownMax = shownMax;
  }

  get entries() {
    return this.#entries;
  }

  // The number of entries, including those that were dropped.
  get total() {
    return this.#entries.length + this.#droppedCount;
  }

  get hasMore() {
    return this.#renderedCount < this.#entries.length;
  }

  add(entry) {
    this.#entries.push(entry);
  }

  // Remove the oldest entries; return them.
  drop(count) {
    const dropped = this.#entries.splice(0, count);
    for (const entry of dropped) this.#removeElement(entry);
    this.#droppedCount += count;
    this.#renderedCount = Math.max(0, this.#renderedCount - count);
    return dropped;
  }

  remove(entry) {
    const at = this.#entries.indexOf(entry);
    this.#entries.splice(at, 1);
    if (at < this.#renderedCount) this.#renderedCount--;
    this.#removeElement(entry);
  }

  // Create elements until the deadline. keepsEnd: remove the first elements above the limit, because the end is visible.
  show(deadline, keepsEnd) {
    if (this.#entries.length - this.#renderedCount > this.shownMax && !this.#isLoading) {
      // Leave no gap between displayed entries: skipped ones are added to the earlier entries, which the user can load.
      while (this.list.firstElementChild) this.#removeFirst();
      this.#renderedCount = this.#entries.length - this.shownMax;
    }
    const fragment = document.createDocumentFragment();
    while (this.hasMore && performance.now() < deadline)
      fragment.append(this.#create(this.#entries[this.#renderedCount++]));
    this.list.append(fragment);
    const max = keepsEnd ? this.shownMax : this.shownMax * 3;
    while (this.list.childElementCount > max && !this.#isLoading) this.#removeFirst();
    this.#updateEarlier();
  }

  #create(entry) {
    entry.element = this.render(entry);
    this.#byElement.set(entry.element, entry);
    return entry.element;
  }

  #removeElement(entry) {
    entry.element?.remove();
    entry.element = null;
  }

  #removeFirst() {
    const first = this.list.firstElementChild;
    const entry = this.#byElement.get(first);
    if (entry) entry.element = null;
    first.remove();
  }

  // Number of entries before the first displayed one.
  get #hiddenCount() {
    const first = this.#entries.findIndex((entry) => entry.element?.isConnected);
    return first < 0 ? this.#renderedCount : first;
  }

  #updateEarlier() {
    const hidden = this.#hiddenCount;
    const { earlier } = this;
    earlier.hidden = hidden + this.#droppedCount === 0;
    if (earlier.hidden || earlier.dataset.hidden === `${hidden}/${this.#droppedCount}`) return;
    earlier.dataset.hidden = `${hidden}/${this.#droppedCount}`;
    const parts = [];
    if (hidden)
      parts.push(
        h("button", { type: "button", onclick: () => this.#showEarlier() }, `Show earlier (${count(hidden)})`),
      );
    if (this.#droppedCount)
      parts.push(h("span", {}, ` ${count(this.#droppedCount)} earlier entries are only in the transcript.`));
    earlier.replaceChildren(...parts);
  }

  // Create elements in time slices, then prepend them without moving the visible content.
  #showEarlier() {
    if (this.#isLoading) return;
    this.#isLoading = true;
    const end = this.#hiddenCount;
    const entries = this.#entries.slice(Math.max(0, end - EARLIER_COUNT), end);
    let count = 0;
    const createSlice = () => {
      const deadline = performance.now() + SLICE_MILLISECONDS;
      while (count < entries.length && performance.now() < deadline) this.#create(entries[count++]);
      if (count < entries.length) setTimeout(createSlice, 0);
      else this.#prepend(entries);
    };
    createSlice();
  }

  // Entries that were dropped in the meantime have no element.
  #prepend(entries) {
    this.#isLoading = false;
    const root = document.documentElement;
    root.style.overflowAnchor = "none"; // otherwise, the browser would also scroll the window
    const height = root.scrollHeight;
    this.list.prepend(...entries.map((entry) => entry.element).filter(Boolean));
    window.scrollBy(0, root.scrollHeight - height);
    root.style.overflowAnchor = "";
    this.#updateEarlier();
  }
}
