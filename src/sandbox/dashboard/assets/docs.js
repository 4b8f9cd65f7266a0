// The API reference follows the system's color scheme, as the other pages do.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const apply = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", apply);
apply();

// `#schema-NAME` opens the schema with this name. Swagger UI adds a slash, and creates its parts after the page is loaded.
const PAUSE_MILLISECONDS = 100;
const TRIES_MAX = 300;
const wanted = /^#\/?schema-(\w+)$/.exec(location.hash)?.[1];
if (wanted) openSchema(wanted, TRIES_MAX);

function openSchema(name, tries) {
  const titles = [...document.querySelectorAll(".models .json-schema-2020-12__title")];
  const button = titles.find((title) => title.textContent === name)?.closest("button");
  if (button) {
    button.click();
    button.scrollIntoView();
    button.focus({ preventScroll: true });
    return;
  }
  document.querySelector('.models-control[aria-expanded="false"]')?.click();
  if (tries > 0) setTimeout(() => openSchema(name, tries - 1), PAUSE_MILLISECONDS);
}
