// Formats a page of the documentation: headings with ids, and links to the other pages.

import { markdown } from "/assets/markdown.js";
import { $ } from "/assets/page.js";

const ELEMENTS_MAX = 20_000;
const PATHS = { errors: "/errors", index: "/guide", "rest-reference": "/docs" };

const guide = $("guide");
const pages = new Set([...guide.dataset.pages.split(" "), ...Object.keys(PATHS)]);

// The address of a link; null if the page is not in the dashboard.
function pageAddress(url) {
  if (url.startsWith("#")) return url;
  const [, page, anchor] = /^([\w-]+)\.md(#[\w-]*)?$/.exec(url) ?? [];
  return pages.has(page) ? `${PATHS[page] ?? `/guide/${page}`}${anchor ?? ""}` : null;
}

// The ids are those of the documentation's site.
const slug = (text) =>
  text
    .toLowerCase()
    .replace(/[^\w\- ]/g, "")
    .trim()
    .replaceAll(" ", "-");

const text = guide.textContent;
const formatted = markdown(text, { elementsMax: ELEMENTS_MAX, headingOffset: 0, localAddress: pageAddress });
const seen = new Map();
for (const heading of formatted.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
  const id = slug(heading.textContent);
  const number = seen.get(id) ?? 0;
  seen.set(id, number + 1);
  heading.id = number ? `${id}_${number}` : id;
}
guide.replaceChildren(formatted);
if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
