// The documentation: formats a page, lists its sections, and adds copy buttons to its code.

import { markdown } from "/assets/markdown.js";
import { $, h } from "/assets/page.js";
import { registerShortcuts } from "/assets/shortcuts.js";
import { highlight, STYLES } from "/assets/syntax.js";

const ELEMENTS_MAX = 20_000;
const PATHS = { errors: "/errors", index: "/guide", "rest-reference": "/docs" };
const EXAMPLE_SERVER = /(\bhttp:\/\/|(?<![\w:/]))localhost:8122(?!\d)/g;
const SECTIONS_MIN = 2;

const guide = $("guide");
const pages = new Set([...(guide?.dataset.pages.split(" ") ?? []), ...Object.keys(PATHS)]);

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
  const pre = code.parentElement;
  const frame = h("div", { class: "guide-code" });
  pre.replaceWith(frame);
  frame.append(h("button", { type: "button", "data-copy-code": true, "aria-label": "Copy the code" }, "Copy"), pre);
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

// The list of the page's sections, which marks the one in view.
// names: the texts of the links.
export function showContents(headings, names = headings.map((heading) => heading.textContent), innerTag = "H3") {
  if (headings.length < SECTIONS_MIN) return;
  const links = headings.map(({ id, tagName }, at) =>
    h("a", { href: `#${id}`, class: tagName === innerTag && "inner" }, names[at]),
  );
  const nav = $("guide-contents").querySelector("nav");
  nav.append(...links);
  $("guide-contents").hidden = false;
  let current = null;
  const mark = () => {
    const top = headings.findLastIndex((heading) => heading.getBoundingClientRect().top < 80);
    const isAtEnd = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 2;
    const linked = headings.findIndex(({ id }) => id === decodeURIComponent(location.hash.slice(1)));
    const next = links[isAtEnd && linked > top ? linked : top] ?? null;
    if (next === current) return;
    current?.removeAttribute("aria-current");
    current = next;
    current?.setAttribute("aria-current", "location");
    const box = $("guide-contents");
    if (current && box.scrollHeight > box.clientHeight) box.scrollTop = current.offsetTop - box.clientHeight / 2;
  };
  let isWaiting = false;
  const markLater = () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      mark();
    });
  };
  window.addEventListener("scroll", markLater, { passive: true });
  window.addEventListener("hashchange", markLater);
  markLater();
}

// Scroll the list of pages to the current page, but not the window.
function showCurrentPage() {
  const current = $("guide-pages").querySelector("[aria-current]");
  if (!current) return;
  const below = current.getBoundingClientRect().bottom - $("guide-pages").getBoundingClientRect().bottom;
  if (below > 0) $("guide-pages").scrollTop += below + current.offsetHeight;
}

// The lists are open if there is space for them next to the text.
function openWhere(details, query) {
  const media = window.matchMedia(query);
  const apply = () => {
    details.open = media.matches;
  };
  media.addEventListener("change", apply);
  apply();
}

openWhere($("guide-pages"), "(min-width: 901px)");
if ($("guide-contents")) openWhere($("guide-contents"), "(min-width: 1201px)");
showCurrentPage();

if (guide) {
  const options = { elementsMax: ELEMENTS_MAX, headingOffset: 0, localAddress: pageAddress, hasAnchors: true };
  const formatted = markdown(guide.textContent, options);
  addIds(formatted.querySelectorAll("h1, h2, h3, h4, h5, h6"));
  for (const code of formatted.querySelectorAll("pre > code")) completeCode(code);
  guide.replaceChildren(formatted);
  for (const code of guide.querySelectorAll("code[data-language]")) addColors(code);
  showContents([...guide.querySelectorAll("h2, h3")]);
  if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
} else showContents([...document.querySelectorAll(".guide-body > .codes-sections > :is(h2, h3)")]);

// The results below the search field: the arrow keys move through them, Escape closes them.
const words = $("guide-words");
const found = $("guide-found");
$("guide-search").addEventListener("keydown", (event) => {
  const places = [words, ...found.querySelectorAll("a")];
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const at = places.indexOf(document.activeElement);
  if (event.key === "Escape") found.replaceChildren();
  else if (step && at >= 0 && places[at + step]) {
    event.preventDefault();
    places[at + step].focus();
  }
});
found.addEventListener("click", (event) => {
  if (event.target.closest("a")) document.activeElement.blur(); // a section of this page
});

registerShortcuts("Docs", [{ keys: "/", label: "Search the documentation", run: () => words.focus() }]);
