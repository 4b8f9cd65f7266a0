// The readable conversation. Keeps a limited number of entries. The steps of a subagent are listed below its tool call.
import { entryContent, entryElement, isDone, isRunningInBackground, withOmitted } from "/assets/conversation_entry.js";
import { isModelDenial } from "/assets/denied_connections.js";
import { EntryList } from "/assets/entry_list.js";
import { $, h } from "/assets/page.js";

const ENTRIES_MAX = 10_000;
const SUBAGENT_ENTRIES_MAX = 2000;
const CHARACTERS_MAX = 48_000_000;
const ENTRIES_SHOWN_MAX = 600;
const SUBAGENT_ENTRIES_SHOWN_MAX = 100;
const DEPTH_MAX = 5;
const BUDGET_MILLISECONDS = 10;

// Approximate memory that an entry uses in addition to its texts.
const ENTRY_CHARACTERS = 200;

export class Conversation {
  #characters = 0;
  #tools = new Map();
  #lastMessage = null;
  #lastResult = null;
  #render = (entry) => this.#createElement(entry);
  #list = new EntryList(
    $("talk"),
    document.querySelector("#panel-conversation > .earlier"),
    this.#render,
    ENTRIES_SHOWN_MAX,
  );
  #stale = new Set();
  #withNewSteps = new Set();
  #isTerminal = $("task-data").dataset.format === "terminal";
  #denials = new Map(); // entries of denials, keyed by what was refused and why

  handle(event) {
    // Events converted from an earlier version's output have no timestamp, so use that of the output.
    for (const each of event.conversation ?? []) this.handle({ ...each, timestamp: event.timestamp });
    HANDLERS[event.type]?.(this, event);
  }

  addMessage({ kind, text, timestamp, parent_tool_use_id, omitted_characters }) {
    if (kind === "notice") {
      this.addNotice(timestamp, text);
      return;
    }
    if (kind === "text") this.#lastMessage = text.trim();
    this.#startRound();
    const entry = {
      kind: kind === "text" ? "says" : "folded",
      title: kind === "prompt" ? "Prompt" : "Thinking",
      at: timestamp,
      text: withOmitted(text, omitted_characters),
    };
    this.#add(entry, parent_tool_use_id);
  }

  addNotice(at, text, style, error) {
    this.#add({ kind: "aside", style, at, text, error });
  }

  // Show equal denials as one entry with a count, because programs try to connect several times.
  addDenial({ timestamp, host, port, reason }) {
    const key = `${host}:${port} ${reason}`;
    const known = this.#denials.get(key);
    if (known) {
      known.count++;
      known.last = timestamp;
      this.#stale.add(known);
      return;
    }
    const isModel = isModelDenial({ type: "egress_denied", host });
    const denial = { host, port, reason, isModel };
    const entry = { kind: "denial", key, at: timestamp, last: timestamp, text: reason, denial, count: 1 };
    if (isModel) entry.error = reason;
    this.#add(entry);
    this.#denials.set(key, entry);
  }

  addToolCall(event) {
    this.#startRound();
    const entry = {
      kind: "tool",
      at: event.timestamp,
      id: event.tool_use_id,
      name: event.tool,
      summary: event.summary,
      command: event.command,
      edits: event.edits,
      fields: Object.entries(event.input),
      omittedCharacters: event.omitted_characters,
      omittedFields: event.omitted_fields,
    };
    this.#add(entry, event.parent_tool_use_id); // add before registering: the parent's id can equal the call's id
    this.#tools.set(entry.id, entry);
  }

  addToolResult(event) {
    const entry = this.#tools.get(event.tool_use_id);
    if (!entry) return;
    const before = entry.output?.length ?? 0;
    // The first line of a failed command's output repeats the exit code.
    const text = event.exit_code === null ? event.output : event.output.replace(/^Exit code \d{1,3}(?:\n|$)/, "");
    entry.output = withOmitted(text, event.omitted_characters);
    entry.isError = event.is_error;
    entry.exitCode = event.exit_code;
    entry.isInBackground = event.in_background === true;
    entry.isStopped &&= entry.isInBackground; // a result can arrive after the agent's exit
    this.#addSize(entry, entry.output.length - before);
    this.#stale.add(entry);
    // Fold the steps of a subagent that has ended, unless the user has opened them.
    if (entry.steps && !entry.isToggled && !entry.isInBackground) entry.steps.details.open = false;
  }

  addDuration(event) {
    const entry = this.#tools.get(event.tool_use_id);
    if (entry) {
      entry.duration = event.duration_ms;
      entry.isError ||= event.is_error;
      this.#stale.add(entry);
    } else {
      // The start of this tool call was not recorded.
      const { timestamp: at, tool: name, duration_ms: duration, is_error: isError } = event;
      this.#add({ kind: "tool", at, name, summary: "", command: null, edits: [], fields: [], duration, isError });
    }
  }

  addResult(event) {
    const isRepeated = this.#lastMessage === event.text.trim();
    this.#startRound(); // the result of a round can arrive after the next round has begun
    const isWaiting = [...this.#tools.values()].some(isRunningInBackground);
    this.#lastResult = { kind: "result", at: event.timestamp, event, isRepeated, hasSuccessor: isWaiting };
    this.#add(this.#lastResult);
  }

  // The agent continues, so its last result ended only a round of work.
  #startRound() {
    this.#setSuccessor(true);
    this.#lastResult = null;
  }

  #setSuccessor(hasSuccessor) {
    const entry = this.#lastResult;
    if (!entry || entry.hasSuccessor === hasSuccessor) return;
    entry.hasSuccessor = hasSuccessor;
    this.#stale.add(entry);
  }

  // The agent has exited: no round follows, and unfinished calls were stopped.
  endAttempt() {
    this.#setSuccessor(false);
    this.#lastResult = null;
    for (const entry of this.#tools.values()) {
      if (isDone(entry) && !isRunningInBackground(entry)) continue;
      entry.isStopped = true;
      this.#stale.add(entry);
    }
  }

  // The top of the page shows the task's failure.
  removeErrors(message) {
    for (const entry of this.#list.entries.filter((each) => each.error === message)) {
      this.#characters -= entry.characters;
      this.#forget(entry);
      this.#list.remove(entry);
    }
  }

  #add(entry, parentId = null) {
    const parent = parentId === null ? undefined : this.#tools.get(parentId);
    entry.owner = parent?.depth >= DEPTH_MAX ? parent.owner : parent;
    entry.depth = (entry.owner?.depth ?? 0) + 1;
    entry.nested = parentId !== null;
    entry.characters = 0;
    const list = entry.owner ? this.#subagentEntries(entry.owner) : this.#list;
    list.add(entry);
    if (entry.owner) this.#updateSteps(entry.owner);
    const edits = (entry.edits ?? []).map((edit) => edit.path.length + (edit.old?.length ?? 0) + edit.new.length);
    const texts = [entry.text ?? "", entry.event?.text ?? "", entry.command ?? "", ...(entry.fields ?? []).flat()];
    const characters = [ENTRY_CHARACTERS, ...edits, ...texts.map((text) => text.length)];
    this.#addSize(
      entry,
      characters.reduce((sum, size) => sum + size),
    );
  }

  #addSize(entry, characters) {
    for (let each = entry; each; each = each.owner) each.characters += characters;
    this.#characters += characters;
    const count = this.#list.entries.length;
    if (count > ENTRIES_MAX * 1.1 || this.#characters > CHARACTERS_MAX * 1.05) this.#dropOldest();
  }

  #dropOldest() {
    const { entries } = this.#list;
    let count = 0;
    while (entries.length - count > ENTRIES_MAX || (this.#characters > CHARACTERS_MAX && count < entries.length - 1)) {
      this.#characters -= entries[count++].characters;
    }
    for (const entry of this.#list.drop(count)) this.#forget(entry);
  }

  #forget(entry) {
    if (this.#denials.get(entry.key) === entry) this.#denials.delete(entry.key);
    if (this.#tools.get(entry.id) === entry) this.#tools.delete(entry.id);
    this.#stale.delete(entry);
    this.#withNewSteps.delete(entry);
    for (const step of entry.steps?.list.entries ?? []) this.#forget(step);
  }

  // The list of a subagent's steps, which is created with the first step.
  #subagentEntries(entry) {
    if (entry.steps) return entry.steps.list;
    const list = h("ol", { class: "talk" });
    const earlier = h("p", { class: "earlier", hidden: true });
    const summary = h("summary", { onclick: () => (entry.isToggled = true) });
    const details = h("details", { class: "steps", open: !isDone(entry) }, summary, earlier, list);
    details.addEventListener("toggle", () => this.#showSteps(entry));
    entry.steps = { details, summary, list: new EntryList(list, earlier, this.#render, SUBAGENT_ENTRIES_SHOWN_MAX) };
    entry.element?.append(details);
    return entry.steps.list;
  }

  #updateSteps(entry) {
    const { list, summary } = entry.steps;
    if (list.entries.length > SUBAGENT_ENTRIES_MAX * 1.1) {
      const dropped = list.drop(list.entries.length - SUBAGENT_ENTRIES_MAX);
      for (const step of dropped) this.#forget(step);
      this.#addSize(entry, -dropped.reduce((sum, step) => sum + step.characters, 0));
    }
    summary.textContent = `${list.total} ${list.total === 1 ? "step" : "steps"} of the subagent`;
    this.#withNewSteps.add(entry);
  }

  // If the steps are visible, create elements during one time slice; continue after a pause.
  #showSteps(entry) {
    if (!entry.element || !entry.steps?.details.open) return;
    entry.steps.list.show(performance.now() + BUDGET_MILLISECONDS, true);
    if (entry.steps.list.hasMore) setTimeout(() => this.#showSteps(entry), 0);
  }

  #createElement(entry) {
    const element = entryElement(entry);
    if (entry.steps) element.append(entry.steps.details);
    return element;
  }

  // Render an entry again after it has received a result or a duration.
  #rerender(entry) {
    if (!entry.element) return;
    const before = entry.element.firstElementChild;
    const after = entryContent(entry);
    if (before.open !== undefined) after.open = before.open || entry.isError === true;
    const hadFocus = before.contains(document.activeElement);
    before.replaceWith(after);
    if (hadFocus) after.querySelector("summary")?.focus();
  }

  get hasMore() {
    return this.#list.hasMore || this.#stale.size > 0;
  }

  // Create elements during one time slice. keepsEnd: the user is following the end of the conversation.
  show(keepsEnd) {
    const deadline = performance.now() + BUDGET_MILLISECONDS;
    $("talk-empty").hidden = this.#list.total > 0 && !this.#isTerminal;
    for (const entry of this.#stale) {
      this.#stale.delete(entry);
      this.#rerender(entry);
      if (performance.now() >= deadline) break;
    }
    this.#list.show(deadline, keepsEnd);
    for (const entry of this.#withNewSteps) this.#showSteps(entry);
    this.#withNewSteps.clear();
  }
}

const HANDLERS = {
  agent_message: (conversation, event) => conversation.addMessage(event),
  tool_call_started: (conversation, event) => conversation.addToolCall(event),
  tool_result: (conversation, event) => conversation.addToolResult(event),
  tool_call: (conversation, event) => conversation.addDuration(event),
  agent_result: (conversation, event) => conversation.addResult(event),
  egress_denied: (conversation, event) => conversation.addDenial(event),
  error: (conversation, { timestamp, message }) => conversation.addNotice(timestamp, message, "errs", message),
  gap: (conversation, { timestamp, reason }) =>
    conversation.addNotice(timestamp, `Some entries are missing: ${reason}`, "warns"),
  attempt: (conversation) => conversation.endAttempt(),
  state_change(conversation, event) {
    if (event.new_state === "completing") conversation.endAttempt();
  },
  end(conversation, { error }) {
    conversation.endAttempt();
    if (error) conversation.removeErrors(error.message);
  },
};
