// A page of the documentation: formats its text, and adds copy buttons to its code.

import { addCopyButton, showContents } from "/assets/guide_frame.js";
import { markdown } from "/assets/markdown.js";
import { $, h } from "/assets/page.js";
import { highlight, STYLES } from "/assets/syntax.js";

const ELEMENTS_MAX = 20_000;
const PATHS = { errors: "/errors", index: "/guide", "rest-reference": "/docs" };
const EXAMPLE_SERVER = /(\bhttp:\/\/|(?<![\w:/]))localhost:8122(?!\d)/g;

const guide = $("guide");
const pages = new Set([...guide.dataset.pages.split(" "), ...Object.keys(PATHS)]);

// The address of a link; null if the page is not in the dashboard.
function pageAddress(url) {
  if (url.startsWith("#")) return url;
  const [, page, anchor] = /^([\w-]+)\.md(#[\w-]*)?$/.exec(url) ?? [];
  return pages.has(page) ? `${PATHS[page] ?? `/guide/${page}`}${anchor ?? ""}` : null;
}

// The ids are the same as on the documentation's site.
const slug = (text) =>
  text
    .toLowerCase()
    .replace(/[^\w\- ]/g, "")
    .trim()
    .replaceAll(" ", "-");

function addIds(headings) {
  const seen = new Map();
  for (const heading of headings) {
    const id = slug(heading.textContent);
    const number = seen.get(id) ?? 0;
    seen.set(id, number + 1);
    heading.id = number ? `${id}_${number}` : id;
  }
}

// Commands in the documentation are for the default server. Show the address of this server instead, except in comments,
// which are about the default.
const withThisServer = (text) =>
  text
    .split("\n")
    .map((line) =>
      line.startsWith("#")
        ? line
        : line.replace(EXAMPLE_SERVER, (_, scheme) => (scheme ? location.origin : location.host)),
    )
    .join("\n");

function completeCode(code) {
  for (const node of code.childNodes) {
    const text = withThisServer(node.data ?? "");
    if (node.nodeType === Node.TEXT_NODE && text !== node.data) node.data = text;
  }
  addCopyButton(code.parentElement);
}

// Add colors when the worker responds; the page does not wait for them.
async function addColors(code) {
  const text = code.textContent;
  const [spans = []] = await highlight(code.dataset.language, [text]);
  const parts = [];
  let end = 0;
  for (let at = 0; at < spans.length; at += 3) {
    const [from, to, style] = spans.slice(at, at + 3);
    if (from > end) parts.push(text.slice(end, from));
    parts.push(h("span", { class: STYLES[style] || null }, text.slice(from, to)));
    end = to;
  }
  if (parts.length) code.replaceChildren(...parts, text.slice(end));
}

const options = { elementsMax: ELEMENTS_MAX, headingOffset: 0, localAddress: pageAddress, hasAnchors: true };
const formatted = markdown(guide.textContent, options);
addIds(formatted.querySelectorAll("h1, h2, h3, h4, h5, h6"));
for (const code of formatted.querySelectorAll("pre > code")) completeCode(code);
guide.replaceChildren(formatted);
for (const code of guide.querySelectorAll("code[data-language]")) addColors(code);
showContents([...guide.querySelectorAll("h2, h3")]);
if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
