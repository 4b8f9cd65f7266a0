// On every page: running clocks, periodic refresh, copying, menus, signing out.
import {
  $,
  banner,
  clock,
  dateTime,
  formatLongDuration,
  redirectToSignIn,
  refresh,
  request,
  showStoredToast,
  toast,
} from "/assets/page.js";
import { openShortcutSheet } from "/assets/shortcuts.js";

function tick() {
  const now = Date.now();
  for (const time of document.querySelectorAll("time[data-ago], time[data-for], time[data-clock]")) {
    const at = new Date(time.dateTime);
    const seconds = (now - at) / 1000;
    let text = formatLongDuration(seconds);
    if ("clock" in time.dataset) text = clock(at);
    else if ("ago" in time.dataset)
      text = seconds < 5 ? "now" : `${formatLongDuration(seconds).split(" ").slice(0, 2).join(" ")} ago`;
    if (time.textContent !== text) time.textContent = text;
    if (!time.title) time.title = dateTime(at);
  }
}

tick();
setInterval(tick, 1000);
showStoredToast();

// Reload parts with data-refresh (interval in seconds, 2 if empty) while the page is visible.
const refreshedAt = new Map();
setInterval(() => {
  if (document.hidden) return;
  for (const part of document.querySelectorAll("[data-refresh]")) {
    const due = (refreshedAt.get(part.id) ?? performance.now()) + (Number(part.dataset.refresh) || 2) * 1000;
    if (!refreshedAt.has(part.id)) refreshedAt.set(part.id, performance.now());
    else if (performance.now() >= due) {
      refreshedAt.set(part.id, performance.now());
      refresh(part.id);
    }
  }
}, 500);
document.addEventListener("visibilitychange", () => refreshedAt.clear());

// Do not replace unchanged content, so that selections survive. Do not replace an open menu, a focused input or an element
// under a pressed pointer. Accept only HTML as a replacement.
const lastResponses = new Map();
let pressed = null;
document.addEventListener("pointerdown", (event) => (pressed = event.button === 0 ? event.target : null));
document.addEventListener("pointermove", (event) => event.buttons === 0 && (pressed = null));
// There may be no pointerup event after a context menu, a drag or a switch to another window.
for (const kind of ["pointerup", "pointercancel", "contextmenu", "dragend", "blur", "visibilitychange"])
  window.addEventListener(kind, () => (pressed = null));
document.addEventListener("htmx:beforeSwap", (event) => {
  const { target, serverResponse, xhr } = event.detail;
  if (xhr.responseURL && new URL(xhr.responseURL).pathname === "/sign-in") {
    event.detail.shouldSwap = false;
    redirectToSignIn();
    return;
  }
  if (!target.id) return;
  const isPage = xhr.getResponseHeader("Content-Type")?.startsWith("text/html");
  const isSame = lastResponses.get(target.id) === serverResponse;
  const isInUse =
    target.contains(pressed) || target.querySelector("details.menu[open], input:focus:not([type=checkbox])") !== null;
  if (!isPage || isSame || isInUse) event.detail.shouldSwap = false;
  else lastResponses.set(target.id, serverResponse);
});
document.addEventListener("htmx:afterSwap", tick);
document.addEventListener("htmx:sendError", () =>
  banner("The server is not responding. The page reconnects automatically."),
);
document.addEventListener("htmx:responseError", (event) =>
  banner(`The server responded with ${event.detail.xhr.status}; this page may be outdated.`),
);
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful) banner(null);
});

const COMMANDS = {
  yaml: (manifest) => manifest,
  cli: (manifest) => `sandbox task submit - --server ${location.origin} <<'MANIFEST'\n${manifest}MANIFEST\n`,
  curl: (manifest) =>
    `curl -X POST ${location.origin}/api/v1/tasks -H 'Content-Type: application/yaml' --data-binary @- <<'MANIFEST'\n${manifest}MANIFEST\n`,
};

// Omit the server from a copied command if it is the client's default server.
const DEFAULT_SERVERS = new Set(["http://localhost:8122", "http://127.0.0.1:8122"]);
const command = (text) =>
  DEFAULT_SERVERS.has(location.origin) ? `sandbox ${text}` : `sandbox ${text} --server ${location.origin}`;

const TOAST_CHARACTERS_MAX = 120;

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // The clipboard API is missing on pages over plain HTTP, except on loopback.
    const area = Object.assign(document.createElement("textarea"), { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const line = text.split("\n", 1)[0];
  toast(`Copied: ${line.length > TOAST_CHARACTERS_MAX ? `${line.slice(0, TOAST_CHARACTERS_MAX)}…` : line}`);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  for (const menu of document.querySelectorAll("details.menu[open]")) {
    if (!menu.contains(event.target) || event.target.closest(".menu-items :is(a, button)")) menu.open = false;
  }
  if (!button) return;
  if (button.dataset.action === "shortcuts") openShortcutSheet();
  if (button.dataset.copy) copy(button.dataset.copy);
  if (button.dataset.copyCommand) copy(command(button.dataset.copyCommand));
  if (button.dataset.copyManifest)
    copy(COMMANDS[button.dataset.copyManifest]($("manifest-text").textContent.trimStart()));
  if ("copyCode" in button.dataset) copy(button.parentElement.querySelector("pre").textContent);
  if (button.dataset.action === "sign-out") {
    request("/api/v1/session", { method: "DELETE" }).then(
      () => {
        // The next user of this tab must not see the drafts, and starts without a repository.
        addEventListener("pagehide", () => sessionStorage.clear());
        localStorage.removeItem("sandbox.repository");
        location.assign("/sign-in");
      },
      (error) => toast(error.message),
    );
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const menu = event.target.closest?.("details.menu[open]");
  if (menu) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});
