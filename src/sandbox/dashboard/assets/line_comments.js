// Comments on lines, which become a prompt that asks for a change.
import { $, h, toast } from "/assets/page.js";
import { COMMENT_CHARACTERS_MAX, COMMENTS_MAX } from "/assets/review_store.js";
import { visible, visibleName } from "/assets/untrusted_text.js";

const QUOTE_CHARACTERS_MAX = 300;

// What a comment refers to: a line of the result has the side "new". A removed line is a line of the commit from which
// this task started ("old"), or of the commit from which the first task of the chain started ("first").
export const SIDES = { old: "before the change", first: "before the first task" };

export class LineComments {
  onChange = () => {};
  #drafts; // texts that the user is writing, keyed by position
  #removedSide = "old";

  constructor(store) {
    this.store = store;
    this.#drafts = new Drafts(store.task);
    $("panel-changes").addEventListener("click", (event) => this.#click(event));
  }

  // removedSide: the side of removed lines.
  setViews(views, removedSide) {
    this.views = views;
    this.#removedSide = removedSide;
    this.onChange();
  }

  #placeOf(file, row) {
    const [side, line] = row.kind === "-" ? [this.#removedSide, row.old] : ["new", row.new];
    return { path: file.path, side, line, quote: shorten(row.text) };
  }

  // The rows below a line: its comments, and the form for another one.
  rowsAt(file, row, isSplit) {
    const place = this.#placeOf(file, row);
    const comments = this.store.comments.filter((comment) => keyOf(comment) === keyOf(place));
    const rows = comments.map((comment) => this.#commentRow(comment, isSplit));
    if (this.#drafts.has(keyOf(place))) rows.push(this.#formRow(place, isSplit));
    return rows;
  }

  #click(event) {
    const cell = event.target.closest("td.ln");
    const view = cell && this.views?.[Number(cell.closest(".file").dataset.at)];
    if (view) this.openAt(view, cell.parentElement, [...cell.parentElement.children].indexOf(cell));
  }

  // Open the form below a row. column: the chosen cell, which selects the side in the side-by-side view.
  openAt(view, element, column = Infinity) {
    const item = view.items[Number(element.dataset.row)];
    const row = Array.isArray(item) ? ((column < 2 ? item[0] : item[1]) ?? item[0] ?? item[1]) : item;
    if (!row || row.kind === "hunk") return;
    if (this.store.comments.length >= COMMENTS_MAX) return toast(`A task can have at most ${COMMENTS_MAX} comments.`);
    const place = this.#placeOf(view.file, row);
    if (!this.#drafts.has(keyOf(place))) {
      this.#drafts.set(keyOf(place), "");
      let last = element;
      while (last.nextElementSibling?.classList.contains("comment-row")) last = last.nextElementSibling;
      last.after(this.#formRow(place, Array.isArray(item)));
    }
    const forms = document.querySelectorAll(".comment-form:not(.comment-edit)");
    [...forms]
      .find((form) => form.dataset.key === keyOf(place))
      ?.querySelector("textarea")
      .focus();
  }

  #formRow(place, isSplit) {
    const key = keyOf(place);
    const form = createForm({ place, button: "Add comment", value: this.#drafts.get(key) });
    form.element.dataset.key = key;
    form.text.addEventListener("input", () => this.#drafts.set(key, form.text.value));
    const row = commentRow(form.element, isSplit);
    form.onclose = () => {
      this.#drafts.delete(key);
      row.previousElementSibling?.focus({ preventScroll: true });
      row.remove();
    };
    form.onsubmit = (text) => {
      const comment = { ...place, text };
      this.store.comments.push(comment);
      this.#update();
      row.before(this.#commentRow(comment, isSplit));
    };
    return row;
  }

  #commentRow(comment, isSplit) {
    const row = commentRow(
      this.createElement(comment, () => row.replaceWith(this.#editRow(comment, isSplit))),
      isSplit,
    );
    return row;
  }

  // The form that replaces a comment while the user edits it. The focus is set once the form is in the page.
  #editRow(comment, isSplit) {
    const form = createForm({ place: comment, button: "Save comment", value: comment.text });
    form.element.classList.add("comment-edit");
    form.element.dataset.key = keyOf(comment);
    const row = commentRow(form.element, isSplit);
    form.onclose = () => {
      const shown = this.#commentRow(comment, isSplit);
      row.replaceWith(shown);
      shown.querySelector("button").focus({ preventScroll: true });
    };
    form.onsubmit = (text) => {
      comment.text = text;
      this.#update();
    };
    requestAnimationFrame(() => form.text.focus());
    return row;
  }

  // The comment with its buttons. edit: called to edit the comment; if absent, it has no Edit button.
  createElement(comment, edit = null) {
    const button = (name, onclick) => h("button", { type: "button", class: "quiet", onclick }, name);
    const element = h(
      "div",
      { class: "comment" },
      h("p", { class: "comment-text" }, visible(comment.text)),
      h(
        "div",
        { class: "comment-buttons" },
        edit && button("Edit", edit),
        button("Remove", () => this.remove(comment)),
      ),
    );
    element.dataset.key = keyOf(comment);
    return element;
  }

  remove(comment) {
    const at = this.store.comments.indexOf(comment);
    if (at < 0) return;
    const same = this.store.comments.filter((one) => keyOf(one) === keyOf(comment)).indexOf(comment);
    this.store.comments.splice(at, 1);
    const shown = [...document.querySelectorAll(".comment-row :is(.comment, .comment-edit)")];
    shown
      .filter((element) => element.dataset.key === keyOf(comment))
      [same]?.closest("tr")
      .remove();
    this.#update();
  }

  #update() {
    this.store.save();
    this.onChange();
  }

  // The comments as parts of a prompt: each with its position, the quoted line and the comment's text.
  texts() {
    return this.store.comments.map(({ path, side, line, quote, text }) => {
      const place = `${path}:${line}${side in SIDES ? ` (${SIDES[side]})` : ""}`;
      return [place, typeof quote === "string" ? `> ${quote}` : null, text].filter((part) => part !== null).join("\n");
    });
  }
}

// Unfinished comments, kept in this browser tab.
class Drafts extends Map {
  #key;

  constructor(task) {
    super();
    this.#key = `sandbox.comment-drafts.${task}`;
    try {
      for (const [key, text] of JSON.parse(sessionStorage.getItem(this.#key)) ?? [])
        super.set(String(key), String(text).slice(0, COMMENT_CHARACTERS_MAX));
    } catch {
      // There is no storage, or another version of this page wrote the drafts.
    }
  }

  set(key, text) {
    super.set(key, text);
    this.#save();
    return this;
  }

  delete(key) {
    const isDeleted = super.delete(key);
    this.#save();
    return isDeleted;
  }

  #save() {
    try {
      const written = [...this].filter(([, text]) => text);
      if (written.length) sessionStorage.setItem(this.#key, JSON.stringify(written));
      else sessionStorage.removeItem(this.#key);
    } catch {
      // Without storage, the drafts last until the page is closed.
    }
  }
}

// The form for the text of a comment. The caller sets `onsubmit`, which gets the text, and `onclose`, which is called
// after it or if the user cancels.
function createForm({ place, button, value }) {
  const label = `Comment on line ${place.line} of ${visibleName(place.path)}`;
  const text = h("textarea", { rows: "3", maxlength: COMMENT_CHARACTERS_MAX, "aria-label": label });
  text.value = value;
  const form = { text, onsubmit: () => {}, onclose: () => {} };
  form.element = h(
    "form",
    { class: "comment-form" },
    h("p", { class: "comment-line muted" }, `Line ${place.line} (${SIDES[place.side] ?? "new"})`),
    text,
    h(
      "div",
      { class: "comment-foot" },
      h("button", { type: "button", class: "quiet", onclick: () => form.onclose() }, "Cancel"),
      h("button", { class: "primary" }, button),
    ),
  );
  text.addEventListener("keydown", (event) => {
    if (event.key === "Escape") form.onclose();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.element.requestSubmit();
  });
  form.element.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!text.value.trim()) return;
    form.onsubmit(text.value.trim());
    form.onclose();
  });
  return form;
}

const shorten = (text) => (text.length > QUOTE_CHARACTERS_MAX ? `${text.slice(0, QUOTE_CHARACTERS_MAX)}…` : text);

const commentRow = (content, isSplit) =>
  h("tr", { class: "comment-row" }, h("td", { colspan: isSplit ? 4 : 3 }, content));

const keyOf = ({ path, side, line }) => `${side} ${line} ${path}`;
