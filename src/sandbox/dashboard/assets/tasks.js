// The list of tasks: keeps the selection and the loaded rows when the list is refreshed, and cancels or deletes selected
// tasks.
import { $, count, h, refresh, request } from "/assets/page.js";
import { forgetReview } from "/assets/review_store.js";
import { registerShortcuts } from "/assets/shortcuts.js";

const TASKS = "/api/v1/tasks";
const REQUESTS_MAX = 4;
const NAMES_SHOWN_MAX = 50;

const ACTIONS = {
  cancel: {
    appliesTo: (task) => !task.hasEnded,
    verb: "Cancel",
    running: "Cancelling",
    done: "cancelled",
    note: "",
    async run(id) {
      await request(`${TASKS}/${encodeURIComponent(id)}`, { method: "DELETE" });
      return "is being cancelled";
    },
  },
  delete: {
    appliesTo: (task) => task.hasEnded,
    verb: "Delete",
    running: "Deleting",
    done: "deleted",
    note:
      "This removes the conversation, the output, the patch, all other artifacts and the preserved sandbox of each task. " +
      "You cannot undo this.",
    async run(id) {
      await request(`${TASKS}/${encodeURIComponent(id)}/data`, { method: "DELETE" });
      removeRow(id);
      forgetReview(`${id}.patch`);
      return "was deleted";
    },
  },
};

const selected = new Map(); // name and hasEnded, by id
const plural = (number) => `${count(number)} task${number === 1 ? "" : "s"}`;
const checkboxes = () => [...document.querySelectorAll("tbody .c-pick input")];
const taskOf = (box) => ({ name: box.dataset.name, hasEnded: "ended" in box.dataset });
const selectedFor = ({ appliesTo }) => [...selected].filter(([, task]) => appliesTo(task));

function showSelection() {
  const bulk = $("bulk");
  if (!bulk) return;
  bulk.hidden = selected.size === 0;
  $("bulk-count").textContent = `${count(selected.size)} selected`;
  for (const [name, action] of Object.entries(ACTIONS)) {
    const number = selectedFor(action).length;
    $(`bulk-${name}`).hidden = number === 0;
    $(`bulk-${name}`).textContent = `${action.verb} ${plural(number)}`;
  }
  const all = document.querySelector(".pick-all");
  if (!all) return;
  const listed = checkboxes().length;
  all.checked = listed > 0 && selected.size === listed;
  all.indeterminate = selected.size > 0 && selected.size < listed;
}

function setSelected(box, isSelected) {
  box.checked = isSelected;
  if (isSelected) selected.set(box.value, taskOf(box));
  else selected.delete(box.value);
}

// With the shift key, a click also applies to the rows since the last click.
let lastPick = null; // a task's id
function pick(box, isRange) {
  const boxes = checkboxes();
  const ends = [boxes.indexOf(box), isRange ? boxes.findIndex(({ value }) => value === lastPick) : -1];
  const [first, last] = ends[1] < 0 ? [ends[0], ends[0]] : [Math.min(...ends), Math.max(...ends)];
  for (const each of boxes.slice(first, last + 1)) setSelected(each, box.checked);
  lastPick = box.value;
}

// Check the boxes of selected tasks again, and deselect tasks that are no longer listed.
function restoreSelection() {
  const boxes = new Map(checkboxes().map((box) => [box.value, box]));
  for (const id of [...selected.keys()]) if (!boxes.has(id)) selected.delete(id);
  for (const [id, box] of boxes) {
    box.checked = selected.has(id);
    if (box.checked) selected.set(id, taskOf(box));
  }
  showSelection();
}

// The refreshed part contains the first rows. Rows that newer ones push out of it are added below it, so that no row is
// missing or duplicated.
let firstRows = [];
const deleted = new Set(); // the ids of removed rows
const rowId = (row) => row.querySelector(".row-link").id;

function keepRows(isRefreshed) {
  const body = document.querySelector("#first-rows tbody");
  const listed = new Set([...document.querySelectorAll("#tasks .row-link")].map((link) => link.id));
  for (const link of document.querySelectorAll("#rest .row-link")) if (listed.has(link.id)) link.closest("tr").remove();
  const end = firstRows.findLastIndex((row) => listed.has(rowId(row))) + 1;
  const pushedOut =
    isRefreshed && body && end > 0 ? firstRows.slice(end).filter((row) => !deleted.has(rowId(row))) : [];
  if (pushedOut.length) ($("rest").querySelector("table") ?? newTable(body)).tBodies[0].prepend(...pushedOut);
  firstRows = [...(body?.rows ?? [])];
}

// A table for the rows after the initial ones.
function newTable(body) {
  const table = body.closest("table").cloneNode(true);
  table.tHead.classList.add("unseen");
  table.tHead.querySelector(".c-pick")?.replaceChildren();
  table.ariaLabel = "More tasks";
  table.tBodies[0].replaceChildren();
  $("rest").prepend(h("div", { class: "list-frame next-rows" }, table));
  return table;
}

document.addEventListener("click", (event) => {
  const box = event.target.closest(".c-pick input");
  if (!box) return;
  if (box.classList.contains("pick-all")) for (const each of checkboxes()) setSelected(each, box.checked);
  else pick(box, event.shiftKey);
  showSelection();
});
// On a phone, the menu of filters has the same counts as the filters above the list, which are refreshed less often.
function copyCounts() {
  const links = document.querySelectorAll(".state-filters a");
  for (const [at, link] of document.querySelectorAll(".chips a").entries())
    if (links[at]) links[at].replaceChildren(...[...link.childNodes].map((node) => node.cloneNode(true)));
}

document.addEventListener("htmx:afterSwap", (event) => {
  copyCounts();
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

// While the user types, and until the server responds, the links and forms of the list still have the earlier search. Those
// that keep the search must keep the typed one. `typedSearch` returns null if the list already shows it.
const shownSearch = () => new URLSearchParams(location.search).get("q") ?? "";
const typedSearch = () => ($("q").value === shownSearch() ? null : $("q").value);

function keepTypedSearch(event) {
  const link = event.target.closest("#list a");
  const typed = typedSearch();
  if (!link || typed === null || "clearsSearch" in link.dataset) return;
  const url = new URL(link.href);
  const isSameSearch = (url.searchParams.get("q") ?? "") === shownSearch();
  if (url.origin !== location.origin || url.pathname !== "/" || !isSameSearch) return;
  for (const name of ["q", "cursor", "offset"]) url.searchParams.delete(name);
  if (typed) url.searchParams.set("q", typed);
  link.href = url;
}
for (const type of ["click", "auxclick"]) document.addEventListener(type, keepTypedSearch, true);

document.addEventListener("submit", ({ target: form }) => {
  const typed = typedSearch();
  if (typed === null || !form.closest("#list")) return;
  form.querySelector("[name=q]")?.remove();
  if (typed) form.append(h("input", { type: "hidden", name: "q", value: typed }));
});

// Remove the row of a deleted task, even if its part of the list is not refreshed.
function removeRow(id) {
  deleted.add(`task-${id}`);
  for (const box of checkboxes()) if (box.value === id) box.closest("tr").remove();
}

let chosenAction = null;
let chosenTasks = [];

// The beginning of the id distinguishes tasks with the same name.
function nameParts(id, name) {
  const isShared = chosenTasks.filter(([, task]) => task.name === name).length > 1;
  return isShared ? [name, " ", h("span", { class: "muted mono" }, id.slice(0, 8))] : [name];
}

// The dialog applies to the tasks that it lists, even if the selection changes while it is open.
function openDialog(action) {
  chosenAction = action;
  chosenTasks = selectedFor(action);
  const names = chosenTasks.map(([, { name }]) => name);
  const rest = names.length - NAMES_SHOWN_MAX;
  $("bulk-title").textContent = `${action.verb} ${plural(names.length)}?`;
  $("bulk-note").textContent = action.note;
  $("bulk-note").hidden = !action.note;
  $("bulk-tasks").replaceChildren(
    ...chosenTasks.slice(0, NAMES_SHOWN_MAX).map(([id, { name }]) => h("li", {}, ...nameParts(id, name))),
    ...(rest > 0 ? [h("li", { class: "muted" }, `and ${rest} more`)] : []),
  );
  $("bulk-confirm").textContent = `${action.verb} ${plural(names.length)}`;
  $("bulk-confirm").hidden = false;
  $("bulk-back").textContent = "Back";
  $("bulk-dialog").showModal();
}

async function runAction(action, id) {
  try {
    return { text: await action.run(id), isDone: true };
  } catch (error) {
    return { text: error.status ? error.message : "The server is not responding.", isDone: false };
  }
}

async function applyAction() {
  const [action, tasks] = [chosenAction, chosenTasks];
  $("bulk-confirm").hidden = true;
  $("bulk-note").hidden = true;
  $("bulk-back").textContent = "Close";
  $("bulk-back").focus();
  $("bulk-title").textContent = `${action.running} ${plural(tasks.length)}…`;
  const results = tasks.map(([id, { name }]) => ({ id, name, element: h("span", { class: "muted" }, "…") }));
  $("bulk-tasks").replaceChildren(
    ...results.map(({ id, name, element }) => h("li", {}, h("span", {}, ...nameParts(id, name)), element)),
  );
  let next = 0;
  let failedCount = 0;
  const work = async () => {
    while (next < tasks.length) {
      const at = next++;
      const { text, isDone } = await runAction(action, tasks[at][0]);
      results[at].element.textContent = text;
      results[at].element.className = isDone ? "muted" : "reason";
      if (isDone) selected.delete(tasks[at][0]);
      else failedCount++;
    }
  };
  await Promise.all(Array.from({ length: REQUESTS_MAX }, work));
  const done = `${plural(tasks.length - failedCount)} ${action.done}`;
  $("bulk-title").textContent = failedCount ? `${done}, ${count(failedCount)} not ${action.done}` : done;
  restoreSelection();
  refresh("tasks");
  refresh(document.querySelector(".total-cost")?.id);
}

for (const [name, action] of Object.entries(ACTIONS))
  $(`bulk-${name}`)?.addEventListener("click", () => openDialog(action));
$("bulk-back")?.addEventListener("click", () => $("bulk-dialog").close());
$("bulk-confirm")?.addEventListener("click", applyAction);
// Select all listed tasks to which the offered actions apply, so that finished tasks are not deleted by mistake.
$("bulk-all")?.addEventListener("click", () => {
  const offered = Object.values(ACTIONS).filter((action) => selectedFor(action).length > 0);
  for (const box of checkboxes()) {
    const task = taskOf(box);
    if (offered.some(({ appliesTo }) => appliesTo(task))) selected.set(box.value, task);
  }
  restoreSelection();
});
$("bulk-clear")?.addEventListener("click", () => {
  selected.clear();
  restoreSelection();
});
keepRows(false);
restoreSelection();

// Focus the row before or after the focused one; if no row is focused, focus the first or the last one.
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
