// Reads and changes single values of a manifest in YAML. The rest of the text, with its comments, stays as it is.
import { isAlias, isMap, isScalar, isSeq, LineCounter, parseDocument, stringify, visit } from "/assets/yaml.bundle.js";

export const TEXT_LENGTH_MAX = 200_000; // parsing takes about 50 ms
const DEPTH_MAX = 64;
const TOO_DEEP = "The YAML is nested too deeply for the form.";
const FORMAT = { lineWidth: 0, flowCollectionPadding: false };
const NUMBER = /^-?\d{1,15}(\.\d+)?$/;

export class ManifestDocument {
  // problem: why the text cannot be changed value by value; null if it can.
  constructor(text) {
    this.text = text;
    this.problem = null;
    if (text.length > TEXT_LENGTH_MAX) {
      this.problem = "The manifest is too long for the form.";
      return;
    }
    try {
      this.yaml = parseDocument(text, { lineCounter: new LineCounter(), prettyErrors: false });
      this.problem = problemOf(this.yaml);
    } catch {
      this.problem = TOO_DEEP; // the parser is recursive
    }
  }

  keys(path = []) {
    const node = path.length ? this.yaml.getIn(path, true) : this.yaml.contents;
    return isMap(node) ? node.items.map((pair) => pair.key.value) : [];
  }

  // Return the text of the value, "" if there is none, or null if it is no single value.
  readText(path) {
    const node = this.#node(path);
    if (node === undefined) return "";
    return isScalar(node) ? textOf(node) : null;
  }

  // Return the texts of a list, or null if it has other values.
  readList(path) {
    const node = this.#node(path);
    if (isEmpty(node)) return [];
    return isSeq(node) && node.items.every(isScalar) ? node.items.map(textOf) : null;
  }

  // Return the records of a list as objects of texts, or null if one has other fields.
  readRecords(path, names) {
    const node = this.#node(path);
    if (isEmpty(node)) return [];
    if (!isSeq(node)) return null;
    const records = node.items.map((item) => readMap(item));
    return records.every((record) => record && Object.keys(record).every((name) => names.includes(name)))
      ? records
      : null;
  }

  // Return a mapping of texts, or null if it has other values.
  readMap(path) {
    const node = this.#node(path);
    return isEmpty(node) ? {} : readMap(node);
  }

  // Whether `set` can set the value: all nodes above it are mappings or absent.
  isReachable(path) {
    return path.slice(0, -1).every((_, depth) => {
      const node = this.#node(path.slice(0, depth + 1));
      return isEmpty(node) || isMap(node);
    });
  }

  // Return the document's text with another value. A string, number, list or mapping; undefined removes the value.
  set(path, value) {
    const wanted = parseDocument(this.text);
    change(wanted, path, value);
    const expected = JSON.stringify(wanted.toJS());
    for (const text of [this.#replaced(path, value), this.#inserted(path, value), this.#removed(path, value)]) {
      if (text !== null && hasContent(text, expected)) return text;
    }
    return wanted.toString(FORMAT); // normalizes spaces; comments are kept
  }

  #node(path) {
    const parent = path.length > 1 ? this.#node(path.slice(0, -1)) : this.yaml.contents;
    return isMap(parent) ? (parent.get(path.at(-1), true) ?? undefined) : undefined;
  }

  #pair(path) {
    const parent = path.length > 1 ? this.#node(path.slice(0, -1)) : this.yaml.contents;
    return isMap(parent) ? parent.items.find((pair) => pair.key.value === path.at(-1)) : undefined;
  }

  #lineStart(offset) {
    return this.text.lastIndexOf("\n", offset - 1) + 1;
  }

  #lineEnd(offset) {
    const end = this.text.indexOf("\n", offset);
    return end < 0 ? this.text.length : end;
  }

  #replaced(path, value) {
    const node = this.#node(path);
    if (value === undefined || Array.isArray(value) || !isScalar(node) || !node.range) return null;
    const [start, end] = node.range;
    const pair = this.#pair(path);
    const lineStart = this.#lineStart(pair.key.range[0]);
    const indent = pair.key.range[0] - lineStart;
    const type = String(value).includes("\n") ? undefined : /^QUOTE/.test(node.type) ? node.type : undefined;
    const separator = this.text.slice(pair.key.range[1], start).endsWith(" ") ? "" : " ";
    const isBlock = /^BLOCK/.test(node.type);
    const tail = isBlock && this.text[end - 1] === "\n" ? "\n" : "";
    return this.text.slice(0, start) + separator + rendered(value, indent, type) + tail + this.text.slice(end);
  }

  #inserted(path, value) {
    let depth = path.length - 1;
    while (depth > 0 && !isMap(this.#node(path.slice(0, depth)))) depth--;
    const map = depth ? this.#node(path.slice(0, depth)) : this.yaml.contents;
    if (value === undefined || !isMap(map) || map.flow || !map.items.length) return null;
    const first = map.items[0].key.range[0];
    const indent = " ".repeat(first - this.#lineStart(first));
    const last = map.items.at(-1);
    let end = endOf(last.value) ?? last.key.range[1];
    if (this.text[end - 1] !== "\n") end = this.#lineEnd(end);
    const added = path.slice(depth).reduceRight((inner, name) => ({ [name]: inner }), value);
    const lines = stringify(added, FORMAT)
      .trimEnd()
      .replace(/^(?=.)/gm, indent);
    const before = this.text.slice(0, end);
    return `${before}${before.endsWith("\n") ? "" : "\n"}${lines}\n${this.text.slice(end).replace(/^\n/, "")}`;
  }

  #removed(path, value) {
    const pair = value === undefined && this.#pair(path);
    if (!pair) return null;
    const parent = path.slice(0, -1);
    if (parent.length && this.#node(parent).items.length === 1) return this.#removed(parent, undefined);
    const start = this.#lineStart(pair.key.range[0]);
    let end = endOf(pair.value) ?? pair.key.range[1];
    if (this.text[end - 1] !== "\n") end = this.#lineEnd(end) + 1;
    return this.text.slice(0, start) + this.text.slice(end);
  }
}

function problemOf(yaml) {
  const [error] = yaml.errors;
  if (error) {
    const { line } = yaml.options.lineCounter?.linePos(error.pos[0]) ?? {};
    return line ? `The YAML has an error in line ${line}.` : "The YAML has an error.";
  }
  if (!isMap(yaml.contents)) return "The YAML is not a mapping of fields.";
  let isPlain = true;
  let isDeep = false;
  visit(yaml, {
    Node: (_, node, parents) => {
      isPlain &&= !isAlias(node) && !node.anchor && !node.tag;
      isDeep ||= parents.length > 2 * DEPTH_MAX; // each level of a mapping is a pair and its value
      return isDeep ? visit.BREAK : undefined;
    },
    Pair: (_, pair) => {
      isPlain &&= isScalar(pair.key) && typeof pair.key.value === "string";
    },
  });
  if (isDeep) return TOO_DEEP;
  return isPlain ? null : "The YAML has anchors, tags or keys that are not text.";
}

const isEmpty = (node) => node === undefined || (isScalar(node) && node.value === null);

function textOf(node) {
  if (node.value === null) return "";
  return typeof node.value === "string" ? node.value : (node.source ?? String(node.value));
}

function readMap(node) {
  if (!isMap(node) || !node.items.every((pair) => isScalar(pair.value))) return null;
  return Object.fromEntries(node.items.map((pair) => [pair.key.value, textOf(pair.value)]));
}

// A number if it looks like one; the server checks its type and its range.
export const toNumber = (text) => (NUMBER.test(text) ? Number(text) : text);

function endOf(node) {
  return node?.range?.[1];
}

function rendered(value, indent, type) {
  const scalar = parseDocument("").createNode(value);
  if (type) scalar.type = type;
  const lines = stringify({ k: scalar }, FORMAT).slice(3);
  return lines.replace(/\n$/, "").replace(/\n(?=.)/g, `\n${" ".repeat(indent)}`);
}

function change(yaml, path, value) {
  if (value === undefined) return remove(yaml, path);
  const node = yaml.getIn(path, true);
  if (Array.isArray(value) && isSeq(node)) return changeList(yaml, node, value);
  if (isScalar(node) && !Array.isArray(value)) {
    node.value = value;
    if (String(value).includes("\n") !== /^BLOCK/.test(node.type)) node.type = undefined;
    return undefined;
  }
  for (let depth = 1; depth < path.length; depth++)
    if (!isMap(yaml.getIn(path.slice(0, depth), true))) yaml.setIn(path.slice(0, depth), yaml.createNode({}));
  return yaml.setIn(path, yaml.createNode(value));
}

function remove(yaml, path) {
  yaml.deleteIn(path);
  const parent = path.slice(0, -1);
  const node = parent.length ? yaml.getIn(parent, true) : null;
  if (isMap(node) && node.items.length === 0) remove(yaml, parent);
}

// Keep the entries that are the same at the beginning and at the end, with their comments.
function changeList(yaml, list, values) {
  const now = list.items.map((item) => JSON.stringify(item.toJS(yaml)));
  const next = values.map((value) => JSON.stringify(value));
  let start = 0;
  while (start < now.length && start < next.length && now[start] === next[start]) start++;
  let tail = 0;
  while (tail < Math.min(now.length, next.length) - start && now.at(-1 - tail) === next.at(-1 - tail)) tail++;
  const added = values.slice(start, values.length - tail).map((value, at) => {
    const before = list.items[start + at];
    // One changed text keeps its quotes and its comment.
    if (now.length === next.length && isScalar(before)) return Object.assign(before.clone(), { value });
    return yaml.createNode(value);
  });
  list.items.splice(start, now.length - start - tail, ...added);
}

function hasContent(text, expected) {
  const parsed = parseDocument(text);
  return parsed.errors.length === 0 && JSON.stringify(parsed.toJS()) === expected;
}
