// The list of tasks: keeps the selection and the loaded rows when the list is refreshed, and cancels selected tasks.
import { $, h, refresh, request } from "/assets/page.js";
import { registerShortcuts } from "/assets/shortcuts.js";

const TASKS = "/api/v1/tasks";
const REQUESTS_MAX = 4;
const NAMES_SHOWN_MAX = 50;

const selected = new Map(); // names by id

const checkboxes = () => [...document.querySelectorAll(".c-pick input")];

function showSelection() {
  const bulk = $("bulk");
  if (!bulk) return;
  bulk.hidden = selected.size === 0;
  $("bulk-count").textContent = `${selected.size} selected`;
}

// Check the boxes of selected tasks again, and deselect those that can no longer be cancelled.
function restoreSelection() {
  const boxes = checkboxes();
  const ids = new Set(boxes.map((box) => box.value));
  for (const id of [...selected.keys()]) if (!ids.has(id)) selected.delete(id);
  for (const box of boxes) box.checked = selected.has(box.value);
  showSelection();
}

// The refreshed part contains the first rows. Rows that newer ones push out of it are added below it, so that no row is
// missing or duplicated.
let firstRows = [];
const rowId = (row) => row.querySelector(".row-link").id;

function keepRows(isRefreshed) {
  const body = document.querySelector("#first-rows tbody");
  const listed = new Set([...document.querySelectorAll("#tasks .row-link")].map((link) => link.id));
  for (const link of document.querySelectorAll("#rest .row-link")) if (listed.has(link.id)) link.closest("tr").remove();
  const end = firstRows.findLastIndex((row) => listed.has(rowId(row))) + 1;
  const pushedOut = isRefreshed && body && end > 0 ? firstRows.slice(end) : [];
  if (pushedOut.length) ($("rest").querySelector("table") ?? newTable(body)).tBodies[0].prepend(...pushedOut);
  firstRows = [...(body?.rows ?? [])];
}

// A table for the rows after the initial ones.
function newTable(body) {
  const table = body.closest("table").cloneNode(true);
  table.tHead.classList.add("unseen");
  table.ariaLabel = "More tasks";
  table.tBodies[0].replaceChildren();
  $("rest").prepend(h("div", { class: "list-frame next-rows" }, table));
  return table;
}

document.addEventListener("change", (event) => {
  const box = event.target.closest(".c-pick input");
  if (!box) return;
  if (box.checked) selected.set(box.value, box.dataset.name);
  else selected.delete(box.value);
  showSelection();
});
document.addEventListener("htmx:afterSwap", (event) => {
  keepRows(event.detail.requestConfig?.elt?.id === "tasks");
  restoreSelection();
});
// The filters in the URL may have changed since the form was created.
document.addEventListener("htmx:replacedInHistory", () => {
  const params = [...new URLSearchParams(location.search)].filter(
    ([name]) => !["q", "cursor", "offset"].includes(name),
  );
  $("search-kept").replaceChildren(...params.map(([name, value]) => h("input", { type: "hidden", name, value })));
});

async function cancelTask(id) {
  try {
    await request(`${TASKS}/${encodeURIComponent(id)}`, { method: "DELETE" });
    return { text: "is being cancelled", isDone: true };
  } catch (error) {
    return { text: error.status ? error.message : "The server does not respond.", isDone: false };
  }
}

const plural = (count) => `${count} task${count === 1 ? "" : "s"}`;

function openDialog() {
  const names = [...selected.values()];
  const rest = names.length - NAMES_SHOWN_MAX;
  $("bulk-title").textContent = `Cancel ${plural(names.length)}?`;
  $("bulk-tasks").replaceChildren(
    ...names.slice(0, NAMES_SHOWN_MAX).map((name) => h("li", {}, name)),
    ...(rest > 0 ? [h("li", { class: "muted" }, `and ${rest} more`)] : []),
  );
  $("bulk-confirm").textContent = `Cancel ${plural(names.length)}`;
  $("bulk-confirm").hidden = false;
  $("bulk-back").textContent = "Back";
  $("bulk-dialog").showModal();
}

async function cancelSelected() {
  const tasks = [...selected];
  $("bulk-confirm").hidden = true;
  $("bulk-back").textContent = "Close";
  $("bulk-title").textContent = `Cancelling ${plural(tasks.length)}…`;
  const results = tasks.map(([, name]) => ({ name, element: h("span", { class: "muted" }, "…") }));
  $("bulk-tasks").replaceChildren(...results.map(({ name, element }) => h("li", {}, h("span", {}, name), element)));
  let next = 0;
  let failedCount = 0;
  const work = async () => {
    while (next < tasks.length) {
      const at = next++;
      const { text, isDone } = await cancelTask(tasks[at][0]);
      results[at].element.textContent = text;
      results[at].element.className = isDone ? "muted" : "reason";
      if (isDone) selected.delete(tasks[at][0]);
      else failedCount++;
    }
  };
  await Promise.all(Array.from({ length: REQUESTS_MAX }, work));
  const done = `${plural(tasks.length - failedCount)} cancelled`;
  $("bulk-title").textContent = failedCount ? `${done}, ${failedCount} not cancelled` : done;
  restoreSelection();
  refresh("tasks");
}

$("bulk-cancel")?.addEventListener("click", openDialog);
$("bulk-back")?.addEventListener("click", () => $("bulk-dialog").close());
$("bulk-confirm")?.addEventListener("click", cancelSelected);
$("bulk-all")?.addEventListener("click", () => {
  for (const box of checkboxes()) selected.set(box.value, box.dataset.name);
  restoreSelection();
});
$("bulk-clear")?.addEventListener("click", () => {
  selected.clear();
  restoreSelection();
});
keepRows(false);
restoreSelection();

// Focus the row before or after the one with focus; if no row has it, the first or the last.
function moveRow(step) {
  const links = [...document.querySelectorAll("#list .row-link")];
  const at = links.indexOf(document.activeElement.closest("tr")?.querySelector(".row-link"));
  links.at(at < 0 ? (step > 0 ? 0 : -1) : Math.min(Math.max(at + step, 0), links.length - 1))?.focus();
  return links.length > 0;
}

registerShortcuts("Tasks", [
  { keys: "/", label: "Search", run: () => $("q").focus() },
  { keys: "j", label: "Next task", run: () => moveRow(1) },
  { keys: "k", label: "Previous task", run: () => moveRow(-1) },
  {
    keys: "x",
    label: "Select the task",
    run() {
      const box = document.activeElement.closest("tr")?.querySelector("input[type=checkbox]");
      box?.click();
      return box != null;
    },
  },
]);
