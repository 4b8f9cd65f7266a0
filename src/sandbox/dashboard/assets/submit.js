// The manifest editor: highlights and validates the manifest while the user types. The server validates it.
import { $, h, request, toast } from "/assets/page.js";

const PAUSE_MILLISECONDS = 250;
const PAINTED_MAX = 60_000;
const TASKS = "/api/v1/tasks";
const DRAFT = `draft of ${location.pathname}${location.search}`;
const YAML = { "content-type": "application/yaml" };

const sheet = $("manifest");
const paint = document.querySelector(".editor-paint");
const gutter = document.querySelector(".editor-gutter");
const verdict = $("verdict");
let fieldErrors = [];
let validation = null;
let timer = 0;

const LINE =
  /^(\s*(?:- )?)([\w.$-]+|"[^"]*")(:)(?=\s|$)|(#.*$)|("(?:[^"\\]|\\.)*"?|'[^']*'?)|(?<![\w.-])(\d[\w.]*|true|false|null)(?![\w.-])/g;

function painted(line) {
  const pieces = [];
  let end = 0;
  LINE.lastIndex = 0;
  for (let match; (match = LINE.exec(line)); end = LINE.lastIndex) {
    const isInWord = match[4] && match.index > 0 && !/\s/.test(line[match.index - 1]);
    if (isInWord) continue;
    if (match.index > end) pieces.push(line.slice(end, match.index));
    if (match[2]) pieces.push(match[1], h("span", { class: "y-k" }, match[2]), match[3]);
    else pieces.push(h("span", { class: match[4] ? "y-c" : match[5] ? "y-s" : "y-n" }, match[0]));
  }
  pieces.push(line.slice(end));
  return pieces;
}

function show() {
  const lines = sheet.value.split("\n");
  const bad = new Set(fieldErrors.map((fieldError) => fieldError.line).filter(Boolean));
  if (sheet.value.length > PAINTED_MAX) paint.replaceChildren(sheet.value);
  else {
    const rows = lines.map((line, at) => {
      if (!bad.has(at + 1)) return [...painted(line), "\n"];
      const indent = /^\s*/.exec(line)[0];
      return [indent, h("span", { class: "y-bad" }, ...painted(line.slice(indent.length))), "\n"];
    });
    paint.replaceChildren(...rows.flat());
  }
  gutter.replaceChildren(
    ...lines.flatMap((_, at) => [h("span", { class: bad.has(at + 1) ? "at-fault" : "" }, String(at + 1)), "\n"]),
  );
  syncScroll();
}

function syncScroll() {
  paint.scrollTop = gutter.scrollTop = sheet.scrollTop;
  paint.scrollLeft = sheet.scrollLeft;
}

function showVerdict(text, style) {
  verdict.textContent = text;
  verdict.className = `verdict ${style}`;
}

function showResult(error) {
  fieldErrors = error?.details ?? [];
  if (!error) showVerdict("This manifest is valid.", "good");
  else if (fieldErrors.length)
    showVerdict(fieldErrors.length === 1 ? "1 error" : `${fieldErrors.length} errors`, "ill");
  else showVerdict(error.message, "ill");
  $("errors").replaceChildren(
    ...fieldErrors.map((fieldError) =>
      h(
        "li",
        {},
        h(
          "button",
          { type: "button", onclick: () => goTo(fieldError) },
          h("span", { class: "mono" }, fieldError.field || "manifest"),
          h("span", {}, fieldError.message),
          fieldError.line ? h("span", { class: "end" }, `line ${fieldError.line}`) : null,
        ),
      ),
    ),
  );
  show();
}

function goTo({ line, column }) {
  if (!line) return sheet.focus();
  const lines = sheet.value.split("\n");
  const at = lines.slice(0, line - 1).reduce((sum, each) => sum + each.length + 1, 0) + Math.max(0, (column ?? 1) - 1);
  sheet.focus();
  sheet.setSelectionRange(at, at);
  sheet.scrollTop = Math.max(0, (line - 6) * 20);
}

// Keep the text while the user signs in again.
function saveDraftIfSignedOut(error) {
  if (error.status === 401)
    window.addEventListener("pagehide", () => sessionStorage.setItem(DRAFT, sheet.value), { once: true });
}

function restoreDraft() {
  sheet.value = sessionStorage.getItem(DRAFT) ?? sheet.value;
  sessionStorage.removeItem(DRAFT);
}

async function check() {
  validation?.abort();
  validation = new AbortController();
  const { signal } = validation;
  try {
    await request(`${TASKS}?dry_run=true`, { method: "POST", headers: YAML, body: sheet.value, signal });
    showResult(null);
  } catch (error) {
    saveDraftIfSignedOut(error);
    if (signal.aborted) return;
    if (error.status) showResult(error);
    else showVerdict("The server does not respond.", "ill");
  }
}

function changed() {
  show();
  clearTimeout(timer);
  timer = setTimeout(check, PAUSE_MILLISECONDS);
}

// One idempotency key per text: a second click, or a retry after a lost response, does not submit a second task.
let key = { text: null, value: "" };

async function submit() {
  if (key.text !== sheet.value)
    key = {
      text: sheet.value,
      value: Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join(
        "",
      ),
    };
  const button = document.querySelector("#submit [type=submit]");
  button.disabled = true;
  try {
    const response = await request(TASKS, {
      method: "POST",
      headers: { ...YAML, "idempotency-key": key.value },
      body: sheet.value,
    });
    location.assign(`/tasks/${encodeURIComponent((await response.json()).task_id)}`);
  } catch (error) {
    saveDraftIfSignedOut(error);
    if (error.status) showResult(error);
    else showVerdict("The server does not respond. Your text is not lost; try again.", "ill");
    if (!error.details) toast(error.message);
    button.disabled = false;
  }
}

sheet.addEventListener("input", changed);
sheet.addEventListener("scroll", syncScroll);
sheet.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
  else if (event.key === "Enter") {
    const before = sheet.value.slice(0, sheet.selectionStart);
    const indent = /^\s*/.exec(before.slice(before.lastIndexOf("\n") + 1))[0];
    if (!indent) return;
    event.preventDefault();
    document.execCommand("insertText", false, `\n${indent}`);
  }
});
$("submit").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
for (const button of document.querySelectorAll("[data-pattern]")) {
  button.addEventListener("click", () => {
    // Insert it as typed text, so that undo works.
    sheet.focus();
    sheet.select();
    document.execCommand("insertText", false, button.dataset.pattern);
    sheet.setSelectionRange(0, 0);
    sheet.scrollTop = 0;
    changed();
  });
}
// Adjust the height of the gutter when the user resizes the text area.
new ResizeObserver(() => (gutter.style.height = `${sheet.offsetHeight}px`)).observe(sheet);
restoreDraft();
show();
check();
