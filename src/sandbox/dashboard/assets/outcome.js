// The top of a task's page: the agent's final message, its current activity, and the size of the patch.

import { isModelDenial } from "/assets/denied_connections.js";
import { markdown } from "/assets/markdown.js";
import { $, clock, count, formatLongDuration, lineCounts, request } from "/assets/page.js";
import { visible } from "/assets/untrusted_text.js";

const ACTIVITY_CHARACTERS_MAX = 200;
const CALLS_MAX = 100;
const PATCH_BYTES_MAX = 3 * 1024 * 1024;
const DENIALS_MAX = 100;
const ADDED_CHARACTERS_MAX = 160; // an agent adds its own words to the reason for a refusal
const REPEATED_MIN = 20; // minimum length of a failure's beginning in a message that repeats the failure

export class Outcome {
  #message = null;
  #result = null;
  #denials = new Set(); // the model gateway's reasons
  #calls = new Map();
  #backgroundCalls = new Map();
  #waitsSince = null; // when the agent began to wait for a call in the background
  #activity = null;
  #shown = null;
  #memoryNotice = null;
  #diff = null;

  constructor(artifactsUrl) {
    this.artifactsUrl = artifactsUrl;
    $("outcome-more").addEventListener("click", () => this.#toggle());
    new ResizeObserver(() => this.#measure()).observe($("outcome-text"));
  }

  handle(event) {
    for (const each of event.conversation ?? []) this.handle({ ...each, timestamp: event.timestamp });
    if (event.type === "agent_result") this.#endRound(event);
    else if (event.type === "attempt") this.#startAttempt();
    else if (event.type === "error" && event.error === "out_of_memory") this.#memoryNotice = event.message;
    else if (event.type === "agent_message") this.#addMessage(event);
    else if (isModelDenial(event)) this.#addDenial(event.reason);
    else if (event.type === "tool_call_started") this.#startCall(event);
    else if (event.type === "tool_result") this.#addToolResult(event);
    else if (event.type === "tool_call") this.#backgroundCalls.delete(event.tool_use_id);
  }

  #startCall(event) {
    this.#setActivity(event.timestamp, `${event.tool} ${event.summary}`);
    const { command, input } = event;
    const subject = input.description || event.summary || event.tool;
    this.#calls.set(event.tool_use_id, { ...this.#activity, subject, isCommand: command !== null });
    if (this.#calls.size > CALLS_MAX) this.#calls.delete(this.#calls.keys().next().value);
  }

  #addToolResult({ tool_use_id, in_background, timestamp }) {
    const call = this.#calls.get(tool_use_id);
    this.#calls.delete(tool_use_id);
    if (call && in_background) this.#backgroundCalls.set(tool_use_id, call);
    this.#activity = [...this.#calls.values()].at(-1) ?? { at: timestamp, text: "Waiting for the model" };
    this.#waitsSince = null;
  }

  #endRound(event) {
    this.#result = event;
    this.#waitsSince = event.timestamp;
  }

  #startAttempt() {
    this.#result = null;
    this.#activity = null;
    this.#waitsSince = null;
    this.#calls.clear();
    this.#backgroundCalls.clear();
  }

  #addDenial(reason) {
    if (this.#denials.size < DENIALS_MAX) this.#denials.add(reason);
  }

  #addMessage({ kind, text, parent_tool_use_id, timestamp }) {
    if (kind === "text" && parent_tool_use_id === null) this.#message = text;
    if (kind === "text" || kind === "thinking")
      this.#setActivity(timestamp, kind === "thinking" ? "Thinking" : text.trim());
  }

  #setActivity(at, text) {
    this.#activity = { at, text };
    this.#waitsSince = null;
  }

  // Draw changes since the last call. finalState: undefined if the task has not ended.
  show(finalState) {
    this.#showMemoryNotice();
    if (finalState) this.#showMessage(finalState);
    else this.#showActivity();
  }

  // Draw again after the head was replaced.
  redraw(finalState) {
    this.show(finalState);
    this.#showDiff();
  }

  // A command may have failed for lack of memory although the task did not fail.
  #showMemoryNotice() {
    const note = $("memory-note");
    if (!note || !this.#memoryNotice) return;
    note.textContent = visible(this.#memoryNotice);
    note.hidden = $("failure-code")?.textContent === "out_of_memory";
  }

  #showActivity() {
    const element = $("activity-now");
    if (!element || !this.#activity) return;
    const call = this.#waitsSince && [...this.#backgroundCalls.values()].at(-1);
    if (call) {
      const kind = call.isCommand ? "command" : "task";
      const state = `Waiting for a background ${kind}:`;
      if ($("activity-state").textContent !== state) $("activity-state").textContent = state;
    }
    const { at, text } = call ? { at: this.#waitsSince, text: call.subject } : this.#activity;
    const line = visible(text.slice(0, ACTIVITY_CHARACTERS_MAX).split("\n", 1)[0]);
    element.querySelector(".activity-text").textContent = line;
    const time = element.querySelector("time");
    if (time.dateTime !== at)
      Object.assign(time, { dateTime: at, textContent: formatLongDuration((Date.now() - new Date(at)) / 1000) });
    element.hidden = false;
    element.title = `Since ${clock(at)}`;
  }

  // Show the text of the agent's result or, if there is none, the agent's last message.
  #showMessage(finalState) {
    const text = this.#result?.text || (finalState === "completed" ? null : this.#message);
    if (!text || this.#shown === text || this.#isRepeated(text)) return;
    this.#shown = text;
    const isFinal = Boolean(this.#result?.text) && !this.#result.is_error;
    $("outcome-title").textContent = isFinal ? "Final message" : "Last message";
    const omitted = this.#result?.text ? this.#result.omitted_characters : 0;
    $("outcome-text").replaceChildren(markdown(omitted ? `${text}\n\n… and ${count(omitted)} more characters` : text));
    $("outcome").hidden = false;
    this.#measure();
  }

  // Whether the message only repeats the notice at the top of the page, or a reason from the model gateway.
  #isRepeated(text) {
    const failure = plain($("failure")?.dataset.message ?? "");
    if (!failure) return false;
    const message = plain(text);
    const repeats = (reason) => message.includes(reason) && message.length - reason.length <= ADDED_CHARACTERS_MAX;
    return repeatsBeginning(failure, message) || [failure, ...[...this.#denials].map(plain)].some(repeats);
  }

  #measure() {
    const text = $("outcome-text");
    const isOpen = $("outcome").classList.contains("open");
    $("outcome-more").hidden = !isOpen && text.scrollHeight <= text.clientHeight + 1;
  }

  #toggle() {
    const isOpen = $("outcome").classList.toggle("open");
    $("outcome-more").textContent = isOpen ? "Show less" : "Show all";
    $("outcome-more").setAttribute("aria-expanded", String(isOpen));
    if (!isOpen) $("outcome").scrollIntoView({ block: "nearest" });
  }

  // Count the lines of a patch whose size the server has not recorded.
  async #showDiff() {
    const element = $("fact-diff");
    if (!element?.dataset.count) return;
    if (Number(element.dataset.count) > PATCH_BYTES_MAX) return;
    const url = `${this.artifactsUrl}/${encodeURIComponent(element.dataset.patch)}`;
    try {
      this.#diff ??= countPatch(await (await request(url)).text());
    } catch {
      return; // keep showing the size in bytes
    }
    $("fact-diff")?.replaceChildren(...diffParts(this.#diff));
    if (!$("tally-changes").textContent) $("tally-changes").textContent = this.#diff.files;
  }
}

// Whether a text contains a message. The end of the message may be missing: the server removes some of the agent's
// advice.
function repeatsBeginning(text, message) {
  if (text.includes(message)) return true;
  const length = Math.max(REPEATED_MIN, Math.ceil(message.length / 2), message.length - ADDED_CHARACTERS_MAX);
  return text.includes(message.slice(0, length));
}

// The text on one line, without its final periods. Without the lookbehind, this takes quadratic time.
const plain = (text) =>
  visible(text)
    .replace(/\s+/g, " ")
    .trim()
    .replace(/(?<!\.)\.+$/, "");

function diffParts({ files, additions, deletions }) {
  const counts = lineCounts(additions, deletions).flatMap((element) => [element, " "]);
  return [...counts, `${counts.length ? "in " : ""}${count(files)} ${files === 1 ? "file" : "files"}`];
}

// Count the files and lines of a patch in git's format. Only lines of hunks count, by the lengths in their headers.
export function countPatch(patch) {
  const size = { files: 0, additions: 0, deletions: 0 };
  let before = 0;
  let after = 0;
  for (const line of patch.split("\n")) {
    const sign = line[0] ?? " ";
    if ((before > 0 || after > 0) && " +-".includes(sign)) {
      if (sign !== "+") before--;
      if (sign !== "-") after--;
      size.additions += sign === "+";
      size.deletions += sign === "-";
    } else if (line.startsWith("diff --git ")) size.files++;
    else {
      const hunk = /^@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@/.exec(line);
      if (hunk) [before, after] = [Number(hunk[1] ?? 1), Number(hunk[2] ?? 1)];
    }
  }
  return size;
}
