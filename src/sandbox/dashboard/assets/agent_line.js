// Summarizes the lines of an agent's event stream (stream-json). Each line is JSON, whose values are untrusted.

const TEXT_CHARACTERS_MAX = 240;
const PARTS_MAX = 10;
const SUMMARY_FIELDS = [
  "command",
  "file_path",
  "notebook_path",
  "pattern",
  "path",
  "url",
  "query",
  "description",
  "prompt",
];
const ID_FIELDS = new Set(["uuid", "session_id", "run_id", "tool_use_id", "parent_tool_use_id", "timestamp"]);

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const textOf = (value) =>
  typeof value === "string"
    ? value
        .slice(0, 4 * TEXT_CHARACTERS_MAX)
        .replace(/\s+/g, " ")
        .trim()
    : "";
const nameOf = (value, otherwise) => textOf(value).slice(0, 80) || otherwise;
const listOf = (value) => (Array.isArray(value) ? value.slice(0, PARTS_MAX) : []);
const numberOf = (value) => (typeof value === "number" && Number.isFinite(value) ? Math.round(value) : null);

const shorten = (text) => (text.length > TEXT_CHARACTERS_MAX ? `${text.slice(0, TEXT_CHARACTERS_MAX - 1)}…` : text);

// Return { kind, text, moreLines } for a known line of the event stream, otherwise null. moreLines: for a tool's
// result, whose first line is the text, the number of further lines.
export function summarizeAgentLine(value) {
  if (!isObject(value) || typeof value.session_id !== "string" || typeof value.type !== "string") return null;
  const summary = Object.hasOwn(TYPES, value.type) ? TYPES[value.type](value) : null;
  return summary && { kind: summary.kind, text: shorten(summary.text), moreLines: summary.moreLines ?? 0 };
}

// The text of the tool result in a line of the event stream, with its line breaks.
export function toolResultOf({ message }) {
  return resultText(blocksOf(message)[0].content);
}

// A copy of a line with its ids last.
export function withIdsLast(value) {
  const entries = Object.entries(value);
  const isId = ([key]) => ID_FIELDS.has(key);
  return Object.fromEntries([...entries.filter((entry) => !isId(entry)), ...entries.filter(isId)]);
}

const TYPES = {
  assistant: ({ message }) => join(blocksOf(message).map(summarizeBlock)),
  user: ({ message }) => {
    const text = isObject(message) ? textOf(message.content) : "";
    return text ? { kind: "user", text } : join(blocksOf(message).map(summarizeBlock));
  },
  result: ({ result, subtype, is_error }) => ({
    kind: is_error === false ? "result" : "result, error",
    text: textOf(result) || textOf(subtype),
  }),
  tool_progress({ tool_name, elapsed_time_seconds }) {
    const seconds = numberOf(elapsed_time_seconds);
    return {
      kind: nameOf(tool_name, "tool"),
      text: seconds === null ? "still running" : `still running, ${seconds} s`,
    };
  },
  system: (value) => (Object.hasOwn(SYSTEM, value.subtype) ? SYSTEM[value.subtype](value) : null),
};

const SYSTEM = {
  init: ({ model }) => ({
    kind: "started",
    text: `with ${textOf(model) || "its model"}`,
  }),
  api_retry({ attempt, max_retries, error_status, error }) {
    const reason = numberOf(error_status) ?? (textOf(error) || "unknown error");
    return { kind: "model request failed", text: `${reason}, retry ${numberOf(attempt)} of ${numberOf(max_retries)}` };
  },
  task_started: ({ description, is_backgrounded }) => ({
    kind: is_backgrounded === true ? "in the background" : "long call",
    text: textOf(description),
  }),
  task_updated: ({ patch }) => {
    if (!isObject(patch)) return null;
    if (patch.is_backgrounded === true) return { kind: "long call", text: "moved to the background" };
    return typeof patch.status === "string" ? { kind: "long call", text: textOf(patch.status) } : null;
  },
  task_notification: ({ summary, status }) => ({
    kind: "call ended",
    text: [textOf(status), textOf(summary)].filter(Boolean).join(", "),
  }),
  background_tasks_changed: ({ tasks }) => ({
    kind: "in the background",
    text:
      listOf(tasks)
        .map((task) => (isObject(task) ? nameOf(task.description, "a call") : "a call"))
        .join("; ") || "nothing",
  }),
};

const blocksOf = (message) => (isObject(message) ? listOf(message.content).filter(isObject) : []);

function summarizeBlock(block) {
  switch (block.type) {
    case "text":
      return { kind: "assistant", text: textOf(block.text) };
    case "thinking":
      return { kind: "thinking", text: textOf(block.thinking) };
    case "tool_use":
      return { kind: nameOf(block.name, "tool"), text: inputOf(block.input) };
    case "tool_result":
      return summarizeResult(block);
    default:
      return { kind: nameOf(block.type, "block"), text: "" };
  }
}

function inputOf(input) {
  if (!isObject(input)) return "";
  const texts = [...SUMMARY_FIELDS, ...Object.keys(input)].map((name) =>
    Object.hasOwn(input, name) ? textOf(input[name]) : "",
  );
  return texts.find(Boolean) ?? "";
}

function summarizeResult({ content, is_error }) {
  const [first, ...others] = resultText(content).split("\n");
  return { kind: is_error === true ? "tool error" : "tool result", text: textOf(first), moreLines: others.length };
}

// Without empty lines at the beginning and at the end.
function resultText(content) {
  const parts = typeof content === "string" ? [content] : listOf(content).map(partText);
  return parts
    .join("\n")
    .replace(/^(?:[^\S\n]*\n)+/, "")
    .trimEnd();
}

const partText = (block) =>
  isObject(block) ? (typeof block.text === "string" ? block.text : nameOf(block.type, "")) : "";

function join(parts) {
  if (!parts.length) return null;
  const [{ kind, text }, ...others] = parts;
  if (!others.length) return parts[0];
  return { kind, text: [text, ...others.map((part) => `${part.kind}: ${part.text}`)].join(" · ") };
}
