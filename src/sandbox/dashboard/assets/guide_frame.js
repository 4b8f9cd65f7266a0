// The frame of the documentation: the list of pages, the search, and the list of the page's sections.
import { $, h } from "/assets/page.js";
import { registerShortcuts } from "/assets/shortcuts.js";

const SECTIONS_MIN = 2;

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

// Put a button that copies the code above its block.
export function addCopyButton(pre) {
  const frame = h("div", { class: "guide-code" });
  pre.replaceWith(frame);
  frame.append(h("button", { type: "button", "data-copy-code": true, "aria-label": "Copy the code" }, "Copy"), pre);
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

const codes = document.querySelectorAll(".codes-sections > :is(h2, h3)");
if (codes.length) showContents([...codes]);

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
