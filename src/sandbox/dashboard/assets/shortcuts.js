// Keyboard shortcuts and their sheet, which `?` opens. A page registers its keys; those of all pages are registered here.
import { h } from "/assets/page.js";

const SEQUENCE_MILLISECONDS = 1200;
const SETTING = "sandbox.shortcuts";

const groups = new Map();
let prefix = "";
let prefixTimer = 0;
let sheet = null;

// Add keys to a group of the sheet: [{ keys, label, run }]. keys: characters or names of keys as in KeyboardEvent.key, such
// as "j" or "Escape"; two keys separated by a space are pressed one after the other. `run` receives the event. If it
// returns false, the shortcut does not currently apply, and the browser handles the key.
export function registerShortcuts(group, shortcuts) {
  groups.set(group, [...(groups.get(group) ?? []), ...shortcuts]);
}

export function openShortcutSheet() {
  sheet ??= document.body.appendChild(
    h("dialog", { id: "shortcuts", "aria-labelledby": "shortcuts-title", onclick: closeOutside }),
  );
  sheet.replaceChildren(...sheetContent());
  sheet.showModal();
}

function closeOutside(event) {
  if (event.target === sheet) sheet.close();
}

function sheetContent() {
  const toggle = h("input", { type: "checkbox", checked: isEnabled() });
  toggle.addEventListener("change", () => localStorage.setItem(SETTING, toggle.checked ? "on" : "off"));
  return [
    h(
      "div",
      { class: "shortcuts-head" },
      h("h2", { id: "shortcuts-title" }, "Keyboard shortcuts"),
      h("button", { type: "button", class: "quiet", onclick: () => sheet.close() }, "Close"),
    ),
    h("div", { class: "shortcuts-groups" }, ...[...groups].map(([name, shortcuts]) => groupElement(name, shortcuts))),
    h("label", { class: "shortcuts-switch" }, toggle, "Enable single-character shortcuts"),
  ];
}

function groupElement(name, shortcuts) {
  const rows = shortcuts
    .filter(({ label }) => label)
    .flatMap(({ keys, label }) => [
      h("dt", {}, ...keys.split(" ").flatMap((key, at) => (at ? [" then ", h("kbd", {}, key)] : [h("kbd", {}, key)]))),
      h("dd", {}, label),
    ]);
  return h("section", {}, h("h3", {}, name), h("dl", {}, ...rows));
}

const isEnabled = () => localStorage.getItem(SETTING) !== "off";

const isTyping = (target) => target.isContentEditable || ["INPUT", "TEXTAREA", "SELECT"].includes(target.tagName);

function find(keys) {
  return [...groups.values()].flat().filter((shortcut) => shortcut.keys === keys);
}

function startsSequence(key) {
  return [...groups.values()].flat().some((shortcut) => shortcut.keys.startsWith(`${key} `));
}

function setPrefix(key) {
  clearTimeout(prefixTimer);
  prefix = key;
  if (key) prefixTimer = setTimeout(() => setPrefix(""), SEQUENCE_MILLISECONDS);
}

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (isTyping(event.target) || document.querySelector("dialog[open]")) return;
  if (event.key.length === 1 && event.key !== "?" && !isEnabled()) return;
  const keys = prefix ? `${prefix} ${event.key}` : event.key;
  setPrefix("");
  if (find(keys).some(({ run }) => run(event) !== false)) event.preventDefault();
  else if (startsSequence(keys)) setPrefix(keys);
});

// Follow a link in the header, if the header has this link for the user.
const clickLink = (selector) => () => {
  const link = document.querySelector(selector);
  link?.click();
  return link !== null;
};

registerShortcuts("Everywhere", [
  { keys: "?", label: "Show this sheet", run: openShortcutSheet },
  { keys: "g t", label: "Go to the tasks", run: clickLink('.top nav a[href="/"]') },
  { keys: "g s", label: "Go to the server", run: clickLink('.top nav a[href="/server"]') },
  { keys: "c", label: "New task", run: clickLink('.top a[href="/submit"]') },
]);
