// The dialog to ask for a change: it submits a new task that continues a finished one. It contains the line
// comments and a text field.
import { SIDES } from "/assets/line_comments.js";
import { $, h, request, toast } from "/assets/page.js";
import { COMMENT_CHARACTERS_MAX } from "/assets/review_store.js";
import { visibleName } from "/assets/untrusted_text.js";

export class ChangeDialog {
  onChange = () => {};
  #dialog = null;

  // The text is kept in the store until it is submitted, even if the user leaves the page.
  constructor(store, comments, api) {
    Object.assign(this, { store, comments, api });
    comments.onChange = () => this.#update();
  }

  get mayAsk() {
    return Boolean($("task-data")?.dataset.mayChange) && !this.refusalReason;
  }

  // Why the task cannot be continued; empty if it can. The page may have replaced its head since the last call.
  get refusalReason() {
    return document.querySelector("#head [data-refusal]")?.dataset.refusal ?? "";
  }

  get label() {
    const { length } = this.store.comments;
    return length ? `Ask for a change (${length})` : "Ask for a change";
  }

  open() {
    this.#dialog ??= this.#create();
    this.refusal.textContent = this.refusalReason;
    this.askButton.hidden = this.note.hidden = !this.mayAsk;
    this.#update();
    this.#dialog.showModal();
    this.text.focus();
  }

  // Show the number of comments on the buttons. The page may have replaced the buttons since the last call.
  showLabel() {
    for (const button of document.querySelectorAll('[data-action="continue"]')) button.textContent = this.label;
  }

  #create() {
    this.text = h("textarea", { id: "change-prompt", rows: "6", maxlength: COMMENT_CHARACTERS_MAX });
    this.text.value = this.store.request;
    this.text.addEventListener("input", () => {
      this.store.request = this.text.value;
      this.store.save();
      this.#update();
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.askButton.click();
    });
    this.question = h("label", { for: "change-prompt" });
    this.list = h("ol", { class: "comment-list", "aria-label": "Comments" });
    this.refusal = h("p", { class: "error-text", role: "alert" });
    this.copyButton = h("button", { type: "button", onclick: () => this.#copy() }, "Copy as prompt");
    this.askButton = h("button", { type: "button", class: "primary", onclick: () => this.#ask() }, "Submit task");
    this.note = h(
      "p",
      {},
      "A new task starts from the result of this one and continues its conversation. This task does not change.",
    );
    const dialog = h(
      "dialog",
      { id: "change", "aria-labelledby": "change-title" },
      h("h2", { id: "change-title" }, "Ask for a change"),
      this.note,
      this.list,
      this.question,
      this.text,
      this.refusal,
      h(
        "div",
        { class: "dialog-foot" },
        h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Back"),
        this.copyButton,
        this.askButton,
      ),
    );
    return document.body.appendChild(dialog);
  }

  #update() {
    this.showLabel();
    this.onChange();
    if (!this.#dialog) return;
    const hasComments = this.store.comments.length > 0;
    this.question.textContent = hasComments ? "What else should change? (optional)" : "What should change?";
    this.list.hidden = !hasComments;
    this.list.replaceChildren(
      ...this.store.comments.map((comment) =>
        h(
          "li",
          {},
          h("span", { class: "mono" }, `${visibleName(comment.path)}:${comment.line}`),
          comment.side in SIDES ? h("span", { class: "muted" }, ` ${SIDES[comment.side]}`) : null,
          this.comments.createElement(comment),
        ),
      ),
    );
    this.copyButton.disabled = this.askButton.disabled = !this.#prompt();
  }

  #prompt() {
    return [this.store.request.trim(), ...this.comments.texts()].filter(Boolean).join("\n\n");
  }

  // One idempotency key per text, so that a retry after a lost response does not submit a second task.
  #key = { text: null, value: "" };

  async #ask() {
    const prompt = this.#prompt();
    if (this.#key.text !== prompt) this.#key = { text: prompt, value: randomKey() };
    this.askButton.disabled = true;
    this.refusal.textContent = "";
    try {
      const response = await request(`${this.api}/continue`, {
        method: "POST",
        headers: { "content-type": "application/json", "idempotency-key": this.#key.value },
        body: JSON.stringify({ prompt }),
      });
      const { task_id } = await response.json();
      this.#clear();
      location.assign(`/tasks/${encodeURIComponent(task_id)}`);
    } catch (error) {
      this.refusal.textContent = error.status
        ? error.message
        : "The server is not responding. Your text is kept; try again.";
      this.askButton.disabled = false;
      this.text.focus();
    }
  }

  #clear() {
    this.text.value = this.store.request = "";
    for (const comment of [...this.store.comments]) this.comments.remove(comment);
    this.store.save();
    this.#update();
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.#prompt());
      toast("The prompt was copied.");
    } catch {
      toast("The browser does not permit copying.");
    }
  }
}

const randomKey = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
