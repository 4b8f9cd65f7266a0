// What a line of output shows: its level, and folded JSON. Computed for lines in view only.
import { summarizeAgentLine, toolResultOf, withIdsLast } from "/assets/agent_line.js";
import { count, h } from "/assets/page.js";
import { appendText, elementLimit, withoutColors } from "/assets/untrusted_text.js";

const JSON_CHARACTERS_MAX = 50_000;
const PREVIEW_CHARACTERS_MAX = 240;
const VALUE_CHARACTERS_MAX = 80;
const LEVEL_SEARCHED = 300;
const OPENED_CHARACTERS_MAX = 100_000;
const DEPTH_MAX = 100;

const LEVELS = [
  [
    "error",
    /\b(?:ERROR|FATAL|CRITICAL|PANIC|EMERGENCY)\b|\blevel=(?:error|fatal|panic)\b|^\s*\[?(?:error|fatal|panic)\b[\]:]/,
  ],
  ["warn", /\b(?:WARN|WARNING)\b|\blevel=warn(?:ing)?\b|^\s*(?:npm )?\[?warn(?:ing)?\b[\]: ]/],
  ["debug", /\b(?:DEBUG|TRACE)\b|\blevel=(?:debug|trace)\b|^\s*\[?(?:debug|trace)\b[\]:]/],
];
const LEVEL_NAMES = { fatal: "error", critical: "error", panic: "error", warning: "warn", trace: "debug" };
const LEVEL_NUMBERS = { 10: "debug", 20: "debug", 40: "warn", 50: "error", 60: "error" };
const LEVEL_KEYS = ["level", "severity", "levelname", "log.level"];

// Describe a line: { level, preview, kind, moreLines }. preview: a summary of its JSON; null if it is not a JSON object or array.
// kind: the kind of a line of the agent's event stream; undefined for all other lines. moreLines: see summarizeAgentLine.
export function describe(line) {
  if (line.view) return line.view;
  const text = withoutColors(line.text);
  const value = parse(text);
  line.view =
    value === null ? { level: levelOf(text.slice(0, LEVEL_SEARCHED)), preview: null } : describeValue(line, value);
  return line.view;
}

function describeValue(line, value) {
  const summary = line.stream === "stdout" ? summarizeAgentLine(value) : null;
  if (summary) return { level: "", preview: summary.text, kind: summary.kind, moreLines: summary.moreLines };
  return { level: levelOfValue(value), preview: preview(value) };
}

function parse(text) {
  if (text.length > JSON_CHARACTERS_MAX || !/^\s*[[{]/.test(text)) return null;
  try {
    const value = JSON.parse(text);
    return typeof value === "object" ? value : null;
  } catch {
    return null;
  }
}

const levelOf = (text) => LEVELS.find(([, pattern]) => pattern.test(text))?.[0] ?? "";

function levelOfValue(value) {
  const found = LEVEL_KEYS.map((key) => (Object.hasOwn(value, key) ? value[key] : undefined)).find((each) => each);
  if (typeof found === "number") return LEVEL_NUMBERS[found] ?? "";
  if (typeof found !== "string") return "";
  const name = found.toLowerCase();
  return Object.hasOwn(LEVEL_NAMES, name) ? LEVEL_NAMES[name] : ["error", "warn", "debug"].includes(name) ? name : "";
}

function preview(value) {
  const isList = Array.isArray(value);
  let text = "";
  for (const [key, each] of Object.entries(value)) {
    if (text) text += ", ";
    text += isList ? brief(each) : `${key.slice(0, VALUE_CHARACTERS_MAX)}: ${brief(each)}`;
    if (text.length > PREVIEW_CHARACTERS_MAX) return `${isList ? "[" : "{"}${text.slice(0, PREVIEW_CHARACTERS_MAX)}…`;
  }
  return isList ? `[${text}]` : `{${text}}`;
}

function brief(value) {
  if (typeof value === "string")
    return JSON.stringify(value.length > VALUE_CHARACTERS_MAX ? `${value.slice(0, VALUE_CHARACTERS_MAX)}…` : value);
  if (Array.isArray(value)) return value.length ? `[… ${value.length}]` : "[]";
  if (value !== null && typeof value === "object") return Object.keys(value).length ? "{…}" : "{}";
  return String(value);
}

const BRACKETS = /"(?:[^"\\]|\\.)*"?|[[{]|[\]}]/g;
const TOKENS = /("(?:[^"\\]|\\.)*"?)(\s*:)?|-?\d[\d.eE+-]*|\b(?:true|false|null)\b/g;

// Deeply nested JSON stays on one line: its indentation grows with the square of the depth.
function indent(json, isOfAgent) {
  let depth = 0;
  for (const [token] of json.matchAll(BRACKETS)) {
    if (token === "[" || token === "{") depth++;
    else if (token === "]" || token === "}") depth--;
    if (depth > DEPTH_MAX) return json;
  }
  const value = JSON.parse(json);
  return JSON.stringify(isOfAgent ? withIdsLast(value) : value, null, 2);
}

// The element of an expanded tool result, with its line breaks.
export function toolResultElement(text) {
  const result = toolResultOf(JSON.parse(withoutColors(text)));
  const element = appendText(h("pre", { class: "json" }), result.slice(0, OPENED_CHARACTERS_MAX));
  const omitted = result.length - OPENED_CHARACTERS_MAX;
  if (omitted > 0) element.append(h("span", { class: "muted" }, `… and ${count(omitted)} more characters`));
  return element;
}

// The element of expanded JSON. isOfAgent: the text is a line of the agent's event stream.
export function jsonElement(text, isOfAgent = false) {
  const pretty = indent(withoutColors(text), isOfAgent);
  const shown = pretty.slice(0, OPENED_CHARACTERS_MAX);
  const element = h("pre", { class: "json" });
  const left = elementLimit();
  let end = 0;
  TOKENS.lastIndex = 0;
  for (let match; left.pieces > 0 && (match = TOKENS.exec(shown)); end = match.index + (match[1] ?? match[0]).length) {
    if (match.index > end) appendText(element, shown.slice(end, match.index), "", left);
    const style = match[2] ? "y-k" : match[1] ? "y-s" : "y-n";
    left.pieces--;
    appendText(element.appendChild(h("span", { class: style })), match[1] ?? match[0], "", left);
  }
  appendText(element, shown.slice(end), "", left);
  const omitted = pretty.length - shown.length;
  if (omitted > 0) element.append(h("span", { class: "muted" }, `… and ${count(omitted)} more characters`));
  return element;
}
