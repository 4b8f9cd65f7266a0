// Highlights source text in a worker: hostile text can be slow to parse, and the page terminates a worker that is too
// slow.
import hljs from "/assets/highlight.min.js";

// The classes of highlight.js, reduced to the colors of the page.
const CLASSES = {
  comment: 1,
  quote: 1,
  doctag: 1,
  meta: 1,
  string: 2,
  regexp: 2,
  code: 2,
  link: 2,
  keyword: 3,
  built_in: 3,
  type: 3,
  literal: 3,
  name: 3,
  "selector-tag": 3,
  number: 4,
  symbol: 4,
  bullet: 4,
  title: 5,
  section: 5,
  "selector-class": 5,
  "selector-id": 5,
  attr: 6,
  attribute: 6,
  property: 6,
  variable: 6,
  "template-variable": 6,
};

// Replies to { id, language, texts } with { id, spans }: for each text [start, end, class, …]. Nested spans are split.
self.onmessage = ({ data: { id, language, texts } }) => {
  let spans = [];
  try {
    spans = texts.map((text) => spansOf(text, language));
  } catch (error) {
    console.warn(`not highlighted: ${error.message}`);
  }
  self.postMessage({ id, spans });
};

function spansOf(text, language) {
  if (!hljs.getLanguage(language)) return new Int32Array();
  const tree = hljs.highlight(text, { language, ignoreIllegals: true })._emitter.rootNode;
  const spans = [];
  let offset = 0;
  const stack = [[tree, 0, 0]];
  while (stack.length) {
    const top = stack[stack.length - 1];
    const [node, style, at] = top;
    if (at >= node.children.length) {
      stack.pop();
      continue;
    }
    top[2]++;
    const child = node.children[at];
    if (typeof child === "string") {
      if (style) spans.push(offset, offset + child.length, style);
      offset += child.length;
    } else stack.push([child, classOf(child) || style, 0]);
  }
  return Int32Array.from(spans);
}

const classOf = ({ scope }) => CLASSES[scope] ?? CLASSES[scope?.split(".")[0]] ?? 0;
