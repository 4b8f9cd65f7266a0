// The REST API reference: Swagger UI follows the system's color scheme, and the page lists its sections and copies its commands.
import { addCopyButton, showContents } from "/assets/guide_frame.js";

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const apply = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", apply);
apply();

// The fragment can be the anchor of an operation or an object in the REST API reference, such as `#post-apiv1tasks` or
// `#remedy`, `#schema-NAME`, or the id of a section. Swagger UI, which starts later, has other fragments.
const PAUSE_MILLISECONDS = 100;
const TRIES_MAX = 300;
const fragment = /^#(?:\/?schema-)?([\w-]+)$/.exec(location.hash);
if (fragment) {
  history.replaceState(null, "", location.pathname);
  openPlace(fragment[1], TRIES_MAX);
}

// The anchor of an operation, as in the REST API reference.
function anchorOf(operation) {
  const [method, path] = [".opblock-summary-method", ".opblock-summary-path"].map(
    (part) => operation.querySelector(part).textContent,
  );
  return `${method}-${path.replace(/[^\w-]/g, "")}`.toLowerCase();
}

function findPlace(name) {
  const anchor = name.toLowerCase();
  const operation = [...document.querySelectorAll(".opblock")].find((each) =>
    [anchor, anchor.replace("-", "-apiv1")].includes(anchorOf(each)),
  );
  if (operation) return operation.querySelector(".opblock-summary-control");
  const titles = [...document.querySelectorAll(".models .json-schema-2020-12__title")];
  return titles.find((title) => title.textContent.toLowerCase() === anchor)?.closest("button");
}

function openPlace(name, tries) {
  const section = document.getElementById(name);
  const button = section ? null : findPlace(name);
  if (button) {
    if (button.ariaExpanded !== "true") button.click();
    button.focus({ preventScroll: true });
  }
  if (section || button) {
    history.replaceState(null, "", fragment[0]);
    (section ?? button).scrollIntoView();
    return;
  }
  // The list of objects is closed at first.
  if (document.querySelector(".opblock")) document.querySelector('.models-control[aria-expanded="false"]')?.click();
  if (tries > 0) setTimeout(() => openPlace(name, tries - 1), PAUSE_MILLISECONDS);
}

// List the sections as soon as Swagger UI has created them.
const page = document.getElementById("page");
const observer = new MutationObserver(() => {
  if (!page.querySelector(".opblock-tag") || !page.querySelector("section.models")) return;
  observer.disconnect();
  const introduction = [...page.querySelectorAll(".info h2:not(.title)")];
  for (const heading of introduction) heading.id = heading.textContent.toLowerCase().replaceAll(" ", "-");
  page.querySelectorAll(".info .description pre").forEach(addCopyButton);
  const groups = [...page.querySelectorAll("h3.opblock-tag")];
  const objects = page.querySelector("section.models");
  objects.id = "objects";
  const names = [...introduction.map((each) => each.textContent), ...groups.map((each) => each.dataset.tag), "Schemas"];
  showContents([...introduction, ...groups, objects], names, null);
});
observer.observe(page, { childList: true, subtree: true });
