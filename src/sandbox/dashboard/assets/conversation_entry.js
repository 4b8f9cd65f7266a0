// Elements of the entries of the conversation.

import { allowLink } from "/assets/denied_connections.js";
import { COMPARISONS_MAX, diffElement, diffLines } from "/assets/line_diff.js";
import { markdown } from "/assets/markdown.js";
import { $, clock, count, formatDuration, h, lineCounts, money } from "/assets/page.js";
import { appendText, elementLimit, splitText, visible } from "/assets/untrusted_text.js";

const LABEL_CHARACTERS_MAX = 2000;
const BRIEF_CHARACTERS_MAX = 300;
const WORKSPACE = "/workspace/";
const FOLDED_LINES_MIN = 26;
const FOLDED_LINES_SHOWN = 10;

export const withOmitted = (text, omitted) => (omitted ? `${text}\n… and ${count(omitted)} more characters` : text);

// Paths in the sandbox are shown relative to the workspace.
const relative = (text) => (text.startsWith(WORKSPACE) && !text.includes("\n") ? text.slice(WORKSPACE.length) : text);

const label = (text) => (text.length > LABEL_CHARACTERS_MAX ? `${text.slice(0, LABEL_CHARACTERS_MAX)}…` : text);

export function entryElement(entry) {
  const element = h("li", { class: entry.nested ? `${entry.kind}-entry nested` : `${entry.kind}-entry` });
  element.append(entryContent(entry));
  return element;
}

export const entryContent = (entry) => RENDERERS[entry.kind](entry);

const RENDERERS = {
  says: ({ text }) => {
    const element = markdown(text);
    element.classList.add("says");
    return element;
  },
  folded: ({ text, title }) =>
    h(
      "details",
      { class: "thinks" },
      h("summary", {}, title),
      h("div", { class: "said", dir: "auto" }, ...splitText(visible(text))),
    ),
  aside: ({ text, at, style }) =>
    h(
      "div",
      { class: `aside ${style ?? ""}` },
      h("span", {}, visible(label(String(text)))),
      at ? h("span", { class: "muted", title: at }, clock(at)) : null,
    ),
  denial: denialElement,
  tool: toolElement,
  result: resultElement,
};

function denialElement({ denial, count: number, at, last }) {
  const { host, port, reason, isModel } = denial;
  const times = number > 1 ? ` ${count(number)} times` : "";
  const text = isModel ? `Model request refused${times}: ${reason}` : `${host}:${port} refused${times}: ${reason}`;
  const link = isModel ? null : allowLink(host, port, reason);
  const clocks = [...new Set([clock(at), clock(last)])].join(" – ");
  return h(
    "div",
    { class: "aside warns" },
    h("span", {}, visible(label(text)), link && " ", link),
    h("span", { class: "muted", title: at }, clocks),
  );
}

export const isDone = ({ output, duration }) => output !== undefined || duration !== undefined;

// A call in the background has a preliminary result; it ends with its duration.
export const isRunningInBackground = ({ isInBackground, duration, isStopped }) =>
  isInBackground === true && duration === undefined && !isStopped;

function toolElement(entry) {
  // Edits are open, because the change is their result. Failed calls are open too.
  const isOpen = entry.isError === true || entry.edits.length > 0;
  const isRepeated = repeatsCommand(entry);
  const summary = h(
    "summary",
    {},
    h("span", { class: "tool-name" }, visible(label(entry.name))),
    h(
      "span",
      { class: isRepeated ? "tool-brief when-folded" : "tool-brief" },
      visible(relative(entry.summary)).slice(0, BRIEF_CHARACTERS_MAX),
    ),
    isRepeated ? h("span", { class: "tool-title" }, visible(label(descriptionOf(entry)))) : null,
    ...editCounts(entry),
    h("span", { class: "tool-took" }, ...toolStatus(entry)),
  );
  const details = h("details", { class: entry.isError ? "tool erred" : "tool", open: isOpen }, summary);
  // Render a folded tool call only when it is opened.
  const fill = () => {
    if (details.childElementCount === 1) details.append(bodyElement(entry));
  };
  if (isOpen) fill();
  else details.addEventListener("toggle", fill, { once: true });
  return details;
}

// Whether the summary is the beginning of the command, which an open call shows below.
function repeatsCommand({ command, summary }) {
  const plain = (text) => text.slice(0, BRIEF_CHARACTERS_MAX).replace(/\s/g, " ");
  return command !== null && plain(command).startsWith(plain(summary));
}

const descriptionOf = ({ fields }) => fields.find(([name]) => name === "description")?.[1] ?? "";

// An exit code is known only for commands that failed.
function toolStatus(entry) {
  const { isError, exitCode, duration, output, isStopped } = entry;
  if (isRunningInBackground(entry)) return ["running in the background"];
  if (isStopped) return ["stopped with the agent"];
  const took = duration === undefined ? "" : formatDuration(duration);
  if (isError) return [[exitCode == null ? "failed" : `exit ${exitCode}`, took].filter(Boolean).join(" · ")];
  if (!isDone({ output, duration })) return ["…"];
  return [h("span", { class: "tool-ok", role: "img", "aria-label": "succeeded" }, "✓"), took && ` ${took}`];
}

// Compute the diffs of a tool call's edits once. The edits share the comparison limit of a single edit.
function differences(entry) {
  const max = COMPARISONS_MAX / entry.edits.length;
  entry.diffs ??= entry.edits.map((edit) => diffLines(edit.old, edit.new, max));
  return entry.diffs;
}

function editCounts(entry) {
  if (!entry.edits.length) return [];
  const sum = (key) => differences(entry).reduce((total, diff) => total + diff[key], 0);
  return lineCounts(sum("additions"), sum("deletions")).map((element) =>
    h("span", { class: "tool-counts" }, element, " "),
  );
}

function bodyElement(entry) {
  const { command, edits, fields, omittedFields, omittedCharacters, output, isError } = entry;
  const container = h("div", { class: "tool-body" });
  const left = elementLimit();
  if (command !== null) container.append(textElement(command, left, "command"));
  edits.forEach(({ path }, at) => {
    if (relative(path) !== relative(entry.summary))
      container.append(h("p", { class: "field-name" }, visible(label(relative(path)))));
    container.append(diffElement(path, differences(entry)[at]));
  });
  for (const [name, text] of fields) container.append(...fieldElements(entry, name, text, left));
  if (omittedCharacters)
    container.append(h("p", { class: "muted" }, `… and ${count(omittedCharacters)} more characters`));
  if (omittedFields) container.append(h("p", { class: "muted" }, `… and ${omittedFields} more fields`));
  if (output && edits.length && !isError) container.append(foldedOutput(output));
  else if (output) container.append(h("p", { class: "field-name" }, "Output"), ...outputElements(output));
  else if (isDone(entry) && !edits.length) container.append(h("p", { class: "muted" }, "No output."));
  return container;
}

// Arguments whose value is their default.
const DEFAULTS = { replace_all: "false", run_in_background: "false", dangerouslyDisableSandbox: "false" };

function fieldElements(entry, name, text, left) {
  if (Object.hasOwn(DEFAULTS, name) && DEFAULTS[name] === text && entry.name !== "Agent") return [];
  if (entry.command !== null && name === "description")
    return repeatsCommand(entry) ? [] : [h("p", { class: "muted" }, visible(label(text)))];
  return [h("p", { class: "field-name" }, visible(label(name))), textElement(relative(text), left)];
}

const textElement = (text, left, style) => appendText(h("pre", { tabindex: "0", class: style }), text, "", left);

// Fold the output of an edit, because it repeats the change.
function foldedOutput(output) {
  const details = h("details", { class: "thinks" }, h("summary", {}, "Output"));
  details.addEventListener("toggle", () => details.append(...outputElements(output)), { once: true });
  return details;
}

// Long output: its first and last lines, and a button for the lines in between.
function outputElements(output) {
  const lines = output.split("\n");
  if (lines.length < FOLDED_LINES_MIN) return [textElement(output)];
  const first = textElement(lines.slice(0, FOLDED_LINES_SHOWN).join("\n"));
  const last = textElement(lines.slice(-FOLDED_LINES_SHOWN).join("\n"));
  const hidden = lines.length - 2 * FOLDED_LINES_SHOWN;
  const showAll = () => {
    const all = textElement(output);
    first.replaceWith(all);
    more.remove();
    last.remove();
    all.focus();
  };
  const more = h("button", { type: "button", class: "quiet unfold", onclick: showAll }, `Show ${hidden} more lines`);
  return [first, more, last];
}

const ENDED = "Ended with an error";
// The agent's codes in words. An agent can report an error whose reason is "success".
const END_LABELS = new Map([
  ["success", ENDED],
  ["error_during_execution", ENDED],
  ["error_max_turns", "Ended: the maximum number of turns was reached"],
]);
const endLabel = (reason) => END_LABELS.get(reason) ?? `Ended: ${visible(label(reason))}`;

function resultElement({ event, isRepeated, hasSuccessor }) {
  const facts = [
    event.turns !== null && `${event.turns} ${event.turns === 1 ? "turn" : "turns"}`,
    event.duration_ms !== null && formatDuration(event.duration_ms),
    // An agent that resumed a session counts the cost of the earlier tasks too.
    event.cost_usd !== null && !$("task-data").dataset.resumes && `${money(event.cost_usd)} as counted by the agent`,
  ].filter(Boolean);
  if (hasSuccessor && !event.is_error) return roundElement(event, isRepeated, facts);
  const container = h(
    "div",
    { class: event.is_error ? "result erred" : "result" },
    h("h3", {}, event.is_error ? endLabel(event.reason) : "Result"),
  );
  if (event.text && !isRepeated) container.append(markdown(withOmitted(event.text, event.omitted_characters)));
  if (facts.length) container.append(h("p", { class: "muted" }, facts.join(" · ")));
  return container;
}

// The end of a round of work, after which the agent continued.
function roundElement(event, isRepeated, facts) {
  const aside = h("div", { class: "aside" }, h("span", {}, ["End of a round of work", ...facts].join(" · ")));
  return event.text && !isRepeated
    ? h("div", {}, markdown(withOmitted(event.text, event.omitted_characters)), aside)
    : aside;
}
