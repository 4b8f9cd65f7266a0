// Reads and changes single values of a manifest in YAML. The rest of the text, with its comments, stays unchanged.
import { isAlias, isMap, isScalar, isSeq, LineCounter, parseDocument, stringify, visit } from "/assets/yaml.bundle.js";

const TEXT_LENGTH_MAX = 100_000;
// The parser compares each key with all others; this module finds duplicates with a set instead.
const PARSING = { uniqueKeys: false, prettyErrors: false };
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
      this.yaml = parseDocument(text, { ...PARSING, lineCounter: new LineCounter() });
      this.problem = problemOf(this.yaml);
    } catch {
      this.problem = TOO_DEEP; // the parser is recursive
    }
  }

  keys(path = []) {
    const node = path.length ? this.yaml.getIn(path, true) : this.yaml.contents;
    return isMap(node) ? node.items.map((pair) => pair.key.value) : [];
  }

  // Return the line of the field, counted from 1; undefined if the text does not have the field.
  line(path) {
    const key = this.#pair(path)?.key;
    return key && this.text.slice(0, key.range[0]).split("\n").length;
  }

  // Return the value: a string, number, list or mapping; undefined if there is none.
  value(path) {
    return this.#node(path)?.toJS(this.yaml);
  }

  // Return the text of the value, "" if there is none, or null if it is not a single value.
  readText(path) {
    const node = this.#node(path);
    if (node === undefined) return "";
    return isScalar(node) ? textOf(node) : null;
  }

  // Return a list of strings, or null if the list has other values.
  readList(path) {
    const node = this.#node(path);
    if (isEmpty(node)) return [];
    return isSeq(node) && node.items.every(isScalar) ? node.items.map(textOf) : null;
  }

  // Return the records of a list as objects with string values, or null if a record has other fields.
  readRecords(path, names) {
    const node = this.#node(path);
    if (isEmpty(node)) return [];
    if (!isSeq(node)) return null;
    const records = node.items.map((item) => readMap(item));
    return records.every((record) => record && Object.keys(record).every((name) => names.includes(name)))
      ? records
      : null;
  }

  // Return a mapping with string values, or null if it has other values.
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

  // Return the document's text with this value: a string, number, list or mapping; undefined removes the value.
  set(path, value) {
    if (value === undefined && !this.#pair(path)) return this.text;
    const wanted = parseDocument(this.text, PARSING);
    change(wanted, path, value);
    const expected = JSON.stringify(wanted.toJS());
    for (const edit of [this.#replaced, this.#relisted, this.#inserted, this.#removed]) {
      const text = edit.call(this, path, value);
      if (text !== null && hasContent(text, expected)) return text;
    }
    return wanted.toString(FORMAT); // normalizes spaces, but keeps comments
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

  #splice(start, end, text) {
    return this.text.slice(0, start) + text + this.text.slice(end);
  }

  // The end of the last line of a node.
  #nodeEnd(node) {
    const end = node.range[1];
    return this.text[end - 1] === "\n" ? end : Math.min(this.#lineEnd(end) + 1, this.text.length);
  }

  #replaced(path, value) {
    const node = this.#node(path);
    if (value === undefined || typeof value === "object" || !isScalar(node) || !node.range) return null;
    const key = this.#pair(path).key;
    return this.#withScalar(node, value, key.range[0] - this.#lineStart(key.range[0]), key.range[1]);
  }

  // Replace a scalar. after: where its key ends.
  #withScalar(node, value, indent, after) {
    if (node.value === null && !node.source) {
      const start = this.text.indexOf(":", after) + 1;
      return this.#splice(start, start, ` ${rendered(value, indent)}`);
    }
    const [start, end] = node.range;
    const type = !String(value).includes("\n") && /^QUOTE/.test(node.type) ? node.type : undefined;
    const tail = /^BLOCK/.test(node.type) && this.text[end - 1] === "\n" ? "\n" : "";
    return this.#splice(start, end, rendered(value, indent, type) + tail);
  }

  // Replace only the entries of a list that differ. If one value of a single entry has changed, replace only this
  // value.
  #relisted(path, values) {
    const list = this.#node(path);
    if (!Array.isArray(values) || !isSeq(list) || !list.items.length || !values.length) return null;
    const { start, end, added } = listChange(list.items, values, this.yaml);
    const changed = list.items[start];
    if (added.length === 1 && end === start + 1) {
      if (isScalar(changed) && typeof added[0] === "string") return this.#withScalar(changed, added[0], 0, 0);
      const names = isMap(changed) ? Object.keys(added[0]).filter((name) => added[0][name] !== changed.get(name)) : [];
      const pair = names.length === 1 && changed.items.find((each) => each.key.value === names[0]);
      if (pair && isScalar(pair.value)) return this.#withScalar(pair.value, added[0][names[0]], 0, pair.key.range[1]);
    }
    if (list.flow) {
      const texts = list.items.map((item) => this.text.slice(item.range[0], item.range[1]));
      texts.splice(start, end - start, ...added.map((value) => JSON.stringify(value)));
      return this.#splice(list.range[0], list.range[1], `[${texts.join(", ")}]`);
    }
    const bounds = [...list.items.map((item) => this.#lineStart(item.range[0])), this.#nodeEnd(list.items.at(-1))];
    const indent = /^ */.exec(this.text.slice(bounds[0]))[0];
    const lines = added.length ? stringify(added, FORMAT).replace(/^(?=.)/gm, indent) : "";
    const separator = this.text[bounds[start] - 1] === "\n" ? "" : "\n";
    return this.#splice(bounds[start], bounds[end], separator + lines);
  }

  #inserted(path, value) {
    let depth = path.length - 1;
    while (depth > 0 && !isMap(this.#node(path.slice(0, depth)))) depth--;
    const map = depth ? this.#node(path.slice(0, depth)) : this.yaml.contents;
    if (value === undefined || !isMap(map) || map.flow || !map.items.length) return null;
    const first = map.items[0].key.range[0];
    const indent = " ".repeat(first - this.#lineStart(first));
    const last = map.items.at(-1);
    let end = last.value?.range?.[1] ?? last.key.range[1];
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
    return this.#splice(start, this.#nodeEnd(pair.value?.range ? pair.value : pair.key), "");
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
  let isUnique = true;
  visit(yaml, {
    Node: (_, node, parents) => {
      isPlain &&= !isAlias(node) && !node.anchor && !node.tag;
      isDeep ||= parents.length > 2 * DEPTH_MAX; // each level of a mapping has two nodes: a pair and its value
      if (isMap(node)) {
        isPlain &&= node.items.every(({ key }) => isScalar(key) && typeof key.value === "string");
        isUnique &&= new Set(node.items.map(({ key }) => key?.value)).size === node.items.length;
      }
      return isDeep ? visit.BREAK : undefined;
    },
  });
  if (isDeep) return TOO_DEEP;
  if (!isUnique) return "The YAML has the same field twice.";
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

function rendered(value, indent, type) {
  const scalar = parseDocument("").createNode(value);
  if (type) scalar.type = type;
  const lines = stringify({ k: scalar }, FORMAT).slice(3);
  return lines.replace(/\n$/, "").replace(/\n(?=.)/g, `\n${" ".repeat(indent)}`);
}

function change(yaml, path, value, parent = yaml) {
  if (value === undefined) return remove(yaml, path);
  const node = parent.getIn(path, true);
  if (Array.isArray(value)) {
    if (isSeq(node)) return changeList(yaml, node, value);
  } else if (typeof value === "object") {
    if (isMap(node)) return changeMap(yaml, node, value);
  } else if (isScalar(node)) {
    node.value = value;
    if (String(value).includes("\n") !== /^BLOCK/.test(node.type)) node.type = undefined;
    return undefined;
  }
  for (let depth = 1; depth < path.length; depth++)
    if (!isMap(parent.getIn(path.slice(0, depth), true))) parent.setIn(path.slice(0, depth), yaml.createNode({}));
  return parent.setIn(path, yaml.createNode(value));
}

function remove(yaml, path) {
  yaml.deleteIn(path);
  const parent = path.slice(0, -1);
  const node = parent.length ? yaml.getIn(parent, true) : null;
  if (isMap(node) && node.items.length === 0) remove(yaml, parent);
}

// The added entries replace those from start to end; the entries before and after them stay.
function listChange(items, values, yaml) {
  const now = items.map((item) => JSON.stringify(item.toJS(yaml)));
  const next = values.map((value) => JSON.stringify(value));
  let start = 0;
  while (start < now.length && start < next.length && now[start] === next[start]) start++;
  let tail = 0;
  while (tail < Math.min(now.length, next.length) - start && now.at(-1 - tail) === next.at(-1 - tail)) tail++;
  return { start, end: now.length - tail, added: values.slice(start, values.length - tail) };
}

function changeList(yaml, list, values) {
  const { start, end, added } = listChange(list.items, values, yaml);
  list.items.splice(start, end - start, ...added.map((value) => yaml.createNode(value)));
}

function changeMap(yaml, map, values) {
  for (const name of map.items.map((pair) => pair.key.value)) if (!Object.hasOwn(values, name)) map.delete(name);
  for (const [name, value] of Object.entries(values)) change(yaml, [name], value, map);
}

function hasContent(text, expected) {
  const parsed = parseDocument(text, PARSING);
  return problemOf(parsed) === null && JSON.stringify(parsed.toJS()) === expected;
}
